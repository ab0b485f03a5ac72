"""set_latents(): the classifier with latents held at a value or raised. measure_steerability(): which latents steer.

    d_v   mean over images of p(v) with the latent set to a on every token, minus p(v) without; the error term is kept
    S     sum of d_v^2, steerability; a latent is steerable when S > 0.1
    P     max of d_v, steering power; the word at which it is reached is the latent's top word
    coverage   number of different top words among the steerable latents

p is the softmax of logit scale x cosine over the words; a judge without texts knows its classes instead of words, and p
is the softmax of its logits. The baseline sets dimensions of the stream instead of latents.
Values are in the SAE's normalized units, in which an activation has mean square 1 per dimension.

Source: Joseph et al. 2025 (arXiv 2504.08729), as a co-author's notebooks compute it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from actcache import SettingsError
from actcache.models import read_templates
from actcache.options import check_number
from actcache.progress import Progress
from actcache.store import StoreGroup, Stores
from analysis.classifier import Outcomes, Spliced, as_numpy
from analysis.config import ModelOptions, SteerabilityConfig, StudyConfig
from analysis.interventions.study import Study, check_latents, open_inputs, run_study
from analysis.naming import read_vocabulary
from analysis.results import Head, Steerability, Steering, SteeringRow, SteeringSummary
from saetrain import Run

STEERABLE = 0.1
N_IMAGES = 32


def set_latents(
    run: Run | str | Path,
    store: Stores | StoreGroup,
    out: str | Path | None = None,
    *,
    set: Mapping[int, float] | None = None,
    add: Mapping[int, float] | None = None,
    keep_error: bool = False,
    study: StudyConfig = StudyConfig(),
    model: ModelOptions = ModelOptions(),
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> Steering:
    """How the classifier's answers move when latents are held at a value (`set`) or raised (`add`) on every token.

    Args:
        set, add: latent -> value, in normalized units; a value that would fall below 0 is 0.
        keep_error: keep the error term, so that nothing else changes; otherwise the reconstruction is moved.
        The others are those of `mask_latents`.

    Raises:
        SettingsError: a latent out of range or named twice. Others as `run_study`.
    """
    run, store = open_inputs(run, store)
    fixed, raised = (
        {check_number("latent", n, int): check_number(flag, v, float) for n, v in (values or {}).items()}
        for flag, values in (("set", set), ("add", add))
    )
    check_latents(run, [*fixed, *raised])

    @torch.no_grad()
    def measure(head: Head, studies: Iterator[Study]) -> Steering:
        (opened,) = studies
        classifier = opened.classifier
        before, after = (Outcomes(classifier.judge.facts.loss) for _ in range(2))
        shift = torch.zeros(len(classifier.names), dtype=torch.float64)
        for images, spliced in opened.batches(classifier.images, on_progress):
            new = spliced.old if keep_error else spliced.whole
            for values, is_added in ((fixed, False), (raised, True)):
                new = new + spliced.shift(torch.tensor(list(values)), torch.tensor(list(values.values())), add=is_added)
            old_logits, new_logits = classifier.logits(spliced.x), classifier.logits(spliced.stream(new))
            before.add(old_logits, classifier.labels[images])
            after.add(new_logits, classifier.labels[images])
            shift += (new_logits.cpu().double().softmax(1) - old_logits.cpu().double().softmax(1)).sum(0)
        outcomes, names = (before.result(), after.result()), classifier.names
        counts = [np.bincount(outcome.predicted, minlength=len(names)).tolist() for outcome in outcomes]
        return Steering(
            *head, *opened.facts, n_judged=len(classifier.images),
            before=outcomes[0].scores(), after=outcomes[1].scores(),
            shift=dict(zip(names, (shift / len(classifier.images)).tolist(), strict=True)),
            predicted={name: (a, b) for name, a, b in zip(names, *counts, strict=True)},
        )  # fmt: skip

    settings = {
        "set": {str(n): v for n, v in fixed.items()}, "add": {str(n): v for n, v in raised.items()},
        "keep_error": keep_error,
    }  # fmt: skip
    return run_study(
        Steering, [run], store, out, measure, settings=settings, study=study, model=model, overwrite=overwrite
    )


def measure_steerability(
    run: Run | str | Path,
    store: Stores | StoreGroup,
    out: str | Path | None = None,
    config: SteerabilityConfig = SteerabilityConfig(),
    *,
    vocabulary: str | Path | None = None,
    study: StudyConfig = StudyConfig(),
    model: ModelOptions = ModelOptions(),
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> Steerability:
    """Steerability of latents, beside that of the same number of dimensions of the stream.

    Args:
        vocabulary: a file of words; by default the general ones. They are put into `study.templates`. A judge without
            texts takes its classes instead.
        study: `limit` defaults to 32 images here.
        on_progress: called with (latents and dimensions done, in all).
        The others are those of `mask_latents`.

    Raises:
        SettingsError: a latent out of range, a bad vocabulary, a strength that is not finite. Others as `run_study`.
    """
    run, store = open_inputs(run, store)
    study = replace(study, limit=N_IMAGES if study.limit is None else study.limit)
    if vocabulary is not None and study.judge in ("probe", "head"):
        raise SettingsError(
            f"--vocabulary needs texts, which --judge {study.judge} does not have. Leave it out, since its classes are "
            "its words."
        )
    words = read_vocabulary(vocabulary)
    check_latents(run, config.latents)
    if not config.strengths:
        raise SettingsError("--strength must be given at least once, got none.")

    @torch.no_grad()
    def measure(head: Head, studies: Iterator[Study]) -> Steerability:
        (opened,) = studies
        known = words if opened.classifier.judge.facts.kind == "zero-shot" else opened.classifier.names
        rows = _steer(opened, config, known, on_progress)
        return Steerability(
            *head, *opened.facts, n_judged=len(opened.classifier.images), n_words=len(known),
            summary=_summarize(rows), rows=tuple(rows),
        )  # fmt: skip

    settings = {**asdict(config), "vocabulary": list(words)}
    return run_study(
        Steerability, [run], store, out, measure, settings=settings, study=study, model=model, overwrite=overwrite
    )


def _steer(
    study: Study, config: SteerabilityConfig, words: Sequence[str], on_progress: Progress | None
) -> list[SteeringRow]:
    classifier, seed = study.classifier, study.config.seed
    texts = None
    if classifier.judge.facts.kind == "zero-shot":
        texts = study.towers.text.embed_classes(words, read_templates(study.config.templates))
    batches = [spliced for _, spliced in study.batches(classifier.images)]
    latents = list(config.latents) or sample_latents(batches, config.n_latents, seed)
    rng = np.random.Generator(np.random.Philox(seed))
    dimensions = sorted(rng.permutation(study.run.d_model)[: len(latents)].tolist())
    before = [_probabilities(study, x.x, texts) for x in batches]
    units = [*(("latent", s) for s in latents), *(("dimension", j) for j in dimensions)]
    rows = []
    for number, (kind, unit) in enumerate(units, start=1):
        for strength in config.strengths:
            shifts = [
                (_probabilities(study, x.stream(x.old + _move(x, kind, unit, strength)), texts) - p).sum(0)
                for x, p in zip(batches, before, strict=True)
            ]
            d = torch.stack(shifts).sum(0) / len(classifier.images)
            rows.append(
                SteeringRow(kind, unit, strength, float(d.square().sum()), float(d.max()), words[int(d.argmax())])
            )
        if on_progress:
            on_progress(number, len(units))
    return rows


def sample_latents(batches: Sequence[Spliced], n_latents: int, seed: int) -> list[int]:
    """A sample of the latents that fire on the batches, ascending."""
    live = np.unique(np.concatenate([as_numpy(x.latents) for x in batches]))
    rng = np.random.Generator(np.random.Philox(seed))
    return sorted(rng.permutation(live)[:n_latents].tolist())


def _probabilities(study: Study, x: Tensor, texts: Tensor | None) -> Tensor:
    """Softmax over the words, or over the classes of a judge without texts: [B, V] float64."""
    if texts is None:
        return study.classifier.logits(x).cpu().double().softmax(1)
    return (study.towers.text.logit_scale * study.classifier.embed(x) @ texts.T).cpu().double().softmax(1)


def _move(x: Spliced, kind: str, unit: int, value: float) -> Tensor:
    if kind == "latent":
        return x.shift(torch.tensor([unit]), torch.tensor([value]), add=False)
    moved = torch.zeros_like(x.old)
    wanted = x.sae.denormalize(torch.full_like(x.old, value), like=x.old)
    moved[..., unit] = (wanted - x.old)[..., unit]
    return moved


def _summarize(rows: Sequence[SteeringRow]) -> tuple[SteeringSummary, ...]:
    groups: dict[tuple[str, float], list[SteeringRow]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.strength), []).append(row)
    return tuple(
        SteeringSummary(
            kind, strength, n=len(group),
            steerable=float(np.mean([row.steerability > STEERABLE for row in group])),
            coverage=len({row.word for row in group if row.steerability > STEERABLE}),
            steerability=float(np.mean([row.steerability for row in group])),
            power=float(np.mean([row.power for row in group])),
        )
        for (kind, strength), group in groups.items()
    )  # fmt: skip
