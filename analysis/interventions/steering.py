"""set_latents(): the classifier with latents held at a value or raised. measure_steerability(): which latents steer.

    d_v   mean over images of p(v) with the latent set to a on every token minus p(v) without, the error term kept
    S     sum of d_v^2, steerability; a latent is steerable when S > 0.1
    P     max of d_v, steering power; the word it is reached at is the latent's top word
    coverage   number of different top words among the steerable latents

p is the softmax of logit scale x cosine over the words. The baseline sets dimensions of the stream in place of latents.
Values are in the SAE's normalized units, in which an activation has mean square 1 a dimension.

Source: Joseph et al. 2025 (arXiv 2504.08729), as a co-author's notebooks compute it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actcache import SettingsError
from actcache.prompts import open_towers
from actcache.store import StoreGroup, Stores
from analysis.classifier import BATCH_IMAGES, Outcomes, Spliced, as_numpy
from analysis.interventions.study import (
    PLAIN_JUDGE,
    Judge,
    Report,
    Study,
    check_latents,
    open_inputs,
    open_study,
    study_parents,
)
from analysis.naming import read_vocabulary
from analysis.results import describe_result, find_result, finish_result
from saetrain import Run

STEERABLE = 0.1
STRENGTHS = (10.0, 50.0, 150.0)
N_LATENTS = 200
N_IMAGES = 32


@torch.no_grad()
def set_latents(
    run: Run | str | Path,
    store: Stores | StoreGroup,
    out: str | Path | None = None,
    *,
    set: Mapping[int, float] | None = None,
    add: Mapping[int, float] | None = None,
    judge: Judge = PLAIN_JUDGE,
    keep_error: bool = False,
    model: str | None = None,
    pretrained: str | None = None,
    device: str = "auto",
    batch_size: int = BATCH_IMAGES,
    overwrite: bool = False,
    on_progress: Report | None = None,
) -> dict[str, Any]:
    """What the classifier says with some latents held at a value (`set`) or raised by one (`add`) on every token.

    Args:
        set, add: latent -> value, in normalized units; a value raised below 0 is 0.
        keep_error: the error term stays, so that nothing else changes; else the reconstruction is what is moved.
        The others as `mask_latents`.

    Returns:
        The result: `before` and `after` (accuracy with interval, loss), `shift`: class -> mean change of its
        probability, `predicted`: class -> images before and after.

    Raises:
        SettingsError: a latent out of range or named twice; as `open_study`.
    """
    run, store = open_inputs(run, store)
    fixed, raised = dict(set or {}), dict(add or {})
    check_latents(run, [*fixed, *raised])
    settings = {
        **asdict(judge), "set": {str(n): v for n, v in fixed.items()}, "add": {str(n): v for n, v in raised.items()},
        "keep_error": keep_error,
    }  # fmt: skip
    head = describe_result("steering", settings, study_parents([run], store))
    if found := find_result(out, head, overwrite=overwrite):
        return found
    study = open_study(run, store, judge, model=model, pretrained=pretrained, device=device, batch_size=batch_size)
    scene = study.scene
    before, after, shift = Outcomes(), Outcomes(), torch.zeros(len(scene.names), dtype=torch.float64)
    for images, spliced in study.batches(scene.images, on_progress):
        new = spliced.old if keep_error else spliced.whole
        for wanted, raise_it in ((fixed, False), (raised, True)):
            new = new + spliced.shift(torch.tensor(list(wanted)), torch.tensor(list(wanted.values())), add=raise_it)
        old_logits, new_logits = scene.logits(spliced.x), scene.logits(spliced.stream(new))
        before.add(old_logits, scene.labels[images])
        after.add(new_logits, scene.labels[images])
        shift += (new_logits.double().softmax(1) - old_logits.double().softmax(1)).sum(0).cpu()
    counts = [np.bincount(o.result().predicted, minlength=len(scene.names)).tolist() for o in (before, after)]
    body = {
        **study.facts(), "n_judged": len(scene.images),
        "before": before.result().numbers(), "after": after.result().numbers(),
        "shift": dict(zip(scene.names, (shift / len(scene.images)).tolist(), strict=True)),
        "predicted": {name: [a, b] for name, a, b in zip(scene.names, *counts, strict=True)},
    }  # fmt: skip
    return finish_result(out, head, body)


@torch.no_grad()
def measure_steerability(
    run: Run | str | Path,
    store: Stores | StoreGroup,
    out: str | Path | None = None,
    *,
    latents: Sequence[int] = (),
    n_latents: int = N_LATENTS,
    strengths: Sequence[float] = STRENGTHS,
    vocabulary: str | Path | None = None,
    judge: Judge = PLAIN_JUDGE,
    model: str | None = None,
    pretrained: str | None = None,
    device: str = "auto",
    batch_size: int = BATCH_IMAGES,
    overwrite: bool = False,
    on_progress: Report | None = None,
) -> dict[str, Any]:
    """Steerability of latents, beside that of as many dimensions of the stream.

    Args:
        latents: which ones; by default a seeded sample of `n_latents` of those that fire on the images.
        strengths: the values they are set to.
        vocabulary: the words; by default the general ones. They are put into `judge.templates`.
        judge: `limit` is 32 images where it is not given.
        The others as `mask_latents`. on_progress: (latents and dimensions done, in all).

    Returns:
        The result: `summary`, one row a (kind, strength): the share that is steerable, coverage, mean S and P; `rows`,
        one a (kind, unit, strength): S, P, their top word.

    Raises:
        SettingsError: a latent out of range, a bad vocabulary, a strength that is no number; as `open_study`.
    """
    run, store = open_inputs(run, store)
    judge = replace(judge, limit=N_IMAGES if judge.limit is None else judge.limit)
    words = read_vocabulary(vocabulary)
    check_latents(run, latents)
    if n_latents < 1:
        raise SettingsError(f"--n-latents must be at least 1, got {n_latents}.")
    if not strengths or not np.isfinite(strengths).all():
        raise SettingsError(f"--strength must be numbers, got {', '.join(map(str, strengths)) or 'none'}.")
    settings = {
        **asdict(judge), "latents": list(latents), "n_latents": n_latents, "strengths": list(strengths),
        "vocabulary": list(words),
    }  # fmt: skip
    head = describe_result("steerability", settings, study_parents([run], store))
    if found := find_result(out, head, overwrite=overwrite):
        return found
    towers = open_towers(store.stores[0].artifact, model=model, pretrained=pretrained, device=device)
    study = open_study(
        run, store, judge, model=model, pretrained=pretrained, device=device, batch_size=batch_size, towers=towers
    )
    texts = towers.text.embed_classes(words, study.templates)
    batches = [spliced for _, spliced in study.batches(study.scene.images)]
    chosen = list(latents) or sample_latents(batches, n_latents, judge.seed)
    rng = np.random.Generator(np.random.Philox(judge.seed))
    dimensions = sorted(rng.permutation(run.d_model)[: len(chosen)].tolist())
    plain = [_probabilities(study, x.x, texts) for x in batches]
    rows, total = [], len(chosen) + len(dimensions)
    for number, (kind, unit) in enumerate([*(("latent", s) for s in chosen), *(("dimension", j) for j in dimensions)]):
        for strength in strengths:
            shifts = [
                (_probabilities(study, x.stream(x.old + _move(x, kind, unit, strength)), texts) - p).sum(0)
                for x, p in zip(batches, plain, strict=True)
            ]
            d = torch.stack(shifts).sum(0) / len(study.scene.images)
            rows.append(
                {
                    "kind": kind, "unit": unit, "strength": strength, "steerability": float(d.square().sum()),
                    "power": float(d.max()), "word": words[int(d.argmax())],
                }
            )  # fmt: skip
        if on_progress:
            on_progress(number + 1, total)
    body = {
        **study.facts(), "n_judged": len(study.scene.images), "n_words": len(words), "summary": _summarize(rows),
        "rows": rows,
    }  # fmt: skip
    return finish_result(out, head, body)


def sample_latents(batches: Sequence[Spliced], n_latents: int, seed: int) -> list[int]:
    """Some of the latents that fire on the batches, ascending."""
    live = np.unique(np.concatenate([as_numpy(x.latents) for x in batches]))
    rng = np.random.Generator(np.random.Philox(seed))
    return sorted(rng.permutation(live)[:n_latents].tolist())


def _probabilities(study: Study, x: Tensor, texts: Tensor) -> Tensor:
    """Softmax over the words, [B, V] float64."""
    return (study.scene.logit_scale * study.scene.embed(x) @ texts.T).double().softmax(1).cpu()


def _move(x: Spliced, kind: str, unit: int, value: float) -> Tensor:
    if kind == "latent":
        return x.shift(torch.tensor([unit]), torch.tensor([value]), add=False)
    moved = torch.zeros_like(x.old)
    moved[..., unit] = value / x.sae.scale + x.sae.mean[unit] - x.old[..., unit]
    return moved


def _summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kind"], row["strength"]), []).append(row)

    def mean(group: list[dict[str, Any]], name: str) -> float:
        return float(np.mean([row[name] for row in group]))

    return [
        {
            "kind": kind, "strength": strength, "n": len(group),
            "steerable": float(np.mean([row["steerability"] > STEERABLE for row in group])),
            "coverage": len({row["word"] for row in group if row["steerability"] > STEERABLE}),
            "steerability": mean(group, "steerability"), "power": mean(group, "power"),
        }
        for (kind, strength), group in groups.items()
    ]  # fmt: skip
