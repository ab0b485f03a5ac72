"""probe_latents(): how well a few latents predict a column of the image table.

In: codes, and a column: a class, a domain, an attribute, or a number. Out: the k-sparse curve, the chosen latents with
their names and weights, and beside them the raw activations, random latents that fire as often, and shuffled labels.

Everything that is chosen (the ranking of latents, the penalty) is chosen on other images than those that are judged:
latents are ranked and probes fitted on four fifths of the choosing images, and the penalty is chosen on a fifth.

Source: k-sparse probing (Gurnee et al. 2023, arXiv 2305.01610).
"""

import importlib.util
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from actcache import SettingsError
from actcache.options import identity_of
from actcache.progress import Progress
from actcache.seen import SeenImages
from actcache.store import select_images
from analysis.concepts import ConceptTable
from analysis.config import ProbingConfig
from analysis.lineage import seen_in_codes
from analysis.naming import find_names
from analysis.probing.curve import Curve, Scores, judge_difference, measure_curve, resample_images, sum_up
from analysis.probing.fitting import Task
from analysis.probing.raw import find_raw, name_features, read_raw
from analysis.probing.target import Split, Target, read_target, split_images
from analysis.results import (
    ProbeDifference,
    ProbeLatent,
    ProbeMean,
    ProbePoint,
    Probing,
    RawProbe,
    describe_result,
    find_result,
    finish_result,
)
from saetrain import CodeStore

CONTROLS = ("random", "shuffled")


def probe_latents(
    codes: CodeStore | str | Path,
    out: str | Path | None = None,
    config: ProbingConfig = ProbingConfig("label_name"),
    *,
    concepts: ConceptTable | str | Path | None = None,
    store: str | Path | None = None,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> Probing:
    """Measure the k-sparse curve of a column.

    Args:
        out: a JSON file for the result; the same call again returns what the file holds.
        concepts: names for the latents; by default those of the tables of these codes that lie beside them.
        store: the activations that the codes were made from, if they have moved. Without them, the probe on the raw
            activations is left out.
        on_progress: called with (tasks done, tasks in all), for one pass over the codes after the other, and then for
            the probes.

    Raises:
        SettingsError: an unknown column, one without values or with a single class, nothing left to judge, scikit-learn
            is missing. ParentMismatchError: concepts or activations of other codes.
    """
    codes = codes if isinstance(codes, CodeStore) else CodeStore.open(codes)
    if importlib.util.find_spec("sklearn") is None:
        raise SettingsError("Probing needs the package scikit-learn: pip install 'patchsae[quality]'.")
    names = find_names(codes, concepts)
    raw = find_raw(codes, None if store is None else str(store))
    parents = {"codes": codes.artifact}
    if concepts is not None:
        table = concepts if isinstance(concepts, ConceptTable) else ConceptTable.open(concepts)
        parents["concepts"] = table.artifact
    head = describe_result(Probing, identity_of(config), parents)
    if (earlier := find_result(Probing, out, head, overwrite=overwrite)) is not None:
        if earlier.raw is None and store is not None:
            raise SettingsError(
                f"{out} was made without the activations of --store. Pass --overwrite to measure it again with them."
            )
        return earlier
    target = read_target(codes.images, config.label, config.as_)
    split, seen = _choose_images(codes, target, config)
    task = Task.of(split, config.seed)
    how = {"score": config.score, "n_random": config.n_random, "n_shuffled": config.n_random, "seed": config.seed}
    curve = measure_curve(codes, task, config.k, **how, on_progress=on_progress)  # type: ignore[arg-type]
    outcomes, n_features = dict(curve.outcomes), 0
    if not isinstance(raw, str):
        probed = task.probe(read_raw(codes, raw))
        outcomes["raw", 0], n_features = probed.outcomes, probed.weights.shape[-1]
    truth = None if split.names is not None else split.truth[1]
    scores = Scores(outcomes, truth, partial(resample_images, seed=config.seed))
    measured = _summarize(scores)
    result = Probing(
        *head, column=target.column, target="class" if split.names is not None else "number",
        measure="accuracy" if split.names is not None else "r2", hook_point=str(codes.hook_point), tokens=codes.tokens,
        classes=split.names, n_classes_left_out=split.n_classes_left_out, n_images_left_out=split.n_images_left_out,
        n_chosen=len(split.choosing), n_judged=len(split.judged), n_latents=codes.n_latents,
        n_firing=int((curve.ranked.n_images > 0).sum()), chance=_find_chance(split), curve=measured[0],
        means=measured[1], differences=measured[2],
        raw=None if n_features == 0 else RawProbe(name_features(codes), n_features, *sum_up(scores.of(("raw", 0)))),
        raw_left_out=raw if isinstance(raw, str) else None,
        latents=_list_latents(curve, split, len(task.fitted), names),
    )  # fmt: skip
    return finish_result(out, replace(result, seen=(seen,)))


def _choose_images(codes: CodeStore, target: Target, config: ProbingConfig) -> tuple[Split, SeenImages]:
    candidates = codes.valid & target.present
    if config.where is not None:
        candidates &= select_images(codes.images, config.where)
    if not candidates.any():
        where = "" if config.where is None else f" for which --where {config.where!r} holds"
        raise SettingsError(
            f"No image of {codes.path}{where} has a value in the column {target.column!r}. Relax the condition, or "
            "name another column."
        )
    seen = seen_in_codes(codes)
    judged, counted = seen.judge(np.flatnonzero(candidates), config, str(codes.path))
    return split_images(target, candidates, judged, config.seed), counted


def _find_chance(split: Split) -> float:
    """Accuracy of the class that most choosing images have; a constant has an R^2 of 0."""
    if split.names is None:
        return 0.0
    return float((split.truth[1] == np.bincount(split.truth[0]).argmax()).mean())


def _summarize(
    scores: Scores,
) -> tuple[tuple[ProbePoint, ...], tuple[ProbeMean, ...], tuple[ProbeDifference, ...]]:
    points = tuple(
        ProbePoint(selection, k, *sum_up(scores.of((selection, k))))
        for selection, k in scores.conditions
        if selection != "raw"
    )
    means = tuple(
        ProbeMean(selection, *sum_up(values))
        for selection in ("chosen", *CONTROLS)
        if (values := scores.mean(selection)) is not None
    )
    differences = []
    for k in [k for selection, k in scores.conditions if selection == "chosen"]:
        for other in (("raw", 0), *((control, k) for control in CONTROLS)):
            if other in scores.conditions:
                value, low, high = sum_up(scores.of(("chosen", k)) - scores.of(other))
                differences.append(ProbeDifference(other[0], k, value, low, high, judge_difference(low, high)))
    return points, means, tuple(differences)


def _list_latents(curve: Curve, split: Split, n_fitted: int, names: dict[int, str]) -> tuple[ProbeLatent, ...]:
    rows = []
    for place, latent in enumerate(curve.latents.tolist()):
        k = min(k for k in curve.weights if k > place)
        weight, class_ = curve.weights[k][..., place], None
        if split.names is not None:
            # of two classes, the weights are opposite: then it is the class that the latent speaks for
            top, bottom = int(weight.argmax()), int(weight.argmin())
            number = top if weight[top] >= -weight[bottom] * (1 - 1e-9) else bottom
            weight, class_ = weight[number], split.names[number]
        images = float(curve.ranked.n_images[latent] / n_fitted)
        ranking = float(curve.ranked.value[0, latent])
        rows.append(ProbeLatent(latent, names.get(latent, ""), ranking, images, k, float(weight), class_))
    return tuple(rows)
