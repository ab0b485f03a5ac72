"""Rounds of a crossover summed up: accuracies with intervals, confusions, and one sentence of what the gain needs.

In: rounds (seeds), each with the outcomes of every condition on its judged images. Out: the plain dicts that `compare`
writes. Accuracies are means over rounds and images. numpy only.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.classifier import Outcome
from analysis.comparison.crossover import MODELS, Condition, Round
from analysis.comparison.overlap import improvement_rate
from analysis.intervals import LEVELS, resample_means

MAX_CLASSES = 100
"""Of more classes no confusions are kept: 100 classes and 100 conditions are a million counts already."""
INTERVALS = {
    False: "95 %: images drawn anew (bootstrap, 1,000 times); halves and random draws are those of one seed",
    True: "95 %: images and seeds (halves, random draws) drawn anew together (two-way bootstrap, 1,000 times)",
}


def summarize(rounds: Sequence[Round], names: Sequence[str], seed: int) -> dict[str, Any]:
    """interval, accuracy, improvement, masks, confusion and prediction of `compare`'s result."""
    found = rounds[0].outcomes
    groups: dict[Condition, list[Condition]] = {}  # the draws of a random mask are one row
    for condition in found:
        groups.setdefault(condition._replace(draw=0), []).append(condition)
    low, high = interval(rounds, groups.values(), seed)
    accuracy, rows = {}, []
    for i, (condition, draws) in enumerate(groups.items()):
        numbers = [one.outcomes[draw].numbers() for one in rounds for draw in draws if draw in one.outcomes]
        mean = {name: float(np.mean([n[name] for n in numbers])) for name in numbers[0]}
        mean |= {"accuracy_low": float(low[i]), "accuracy_high": float(high[i])}
        if condition.selection in ("original", "swap"):
            text = condition.model if condition.selection == "original" else _other(condition.model)
            accuracy[f"{condition.model} image, {text} text"] = mean
        else:
            shown = {name: mean[name] for name in ("accuracy", "accuracy_low", "accuracy_high")}
            rows.append(_describe(condition) | shown)
    before, after = (accuracy[f"{model} image, {model} text"]["accuracy"] for model in MODELS)
    small = len(names) <= MAX_CLASSES
    confusion = {model: _confuse(rounds, Condition(model, "all", "original"), len(names)) for model in MODELS if small}
    prediction = [
        _describe(condition) | {"counts": _confuse(rounds, condition, len(names))}
        for condition in found
        if small and condition.selection in ("class", "dataset")
    ]
    return {
        "interval": INTERVALS[len(rounds) > 1], "accuracy": accuracy, "improvement": improvement_rate(before, after),
        "masks": rows, "confusion": confusion, "prediction": prediction,
    }  # fmt: skip


def _describe(condition: Condition) -> dict[str, Any]:
    return {
        "classified_by": condition.model, "chosen_by": condition.chosen_by, "selection": condition.selection,
        "k": condition.k or "all", "keep_error": condition.keep_error,
    }  # fmt: skip


def _other(model: str) -> str:
    return MODELS[1 - MODELS.index(model)]


def interval(
    rounds: Sequence[Round], groups: Iterable[Sequence[Condition]], seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(low, high) of the accuracy of each group of conditions, whose mean is taken first."""
    groups = list(groups)
    values = [np.stack([_mean(one, group) for group in groups], axis=1) for one in rounds]
    low, high = np.percentile(resample_means(values, [one.judged for one in rounds], seed=seed), LEVELS, axis=0)
    return low, high


def _mean(one: Round, group: Sequence[Condition]) -> NDArray[np.float64]:
    return np.asarray(np.mean([one.right(condition) for condition in group if condition in one.outcomes], axis=0))


def _confuse(rounds: Sequence[Round], condition: Condition, n_classes: int) -> list[list[int]]:
    return np.sum([confuse(one.outcomes[condition], n_classes) for one in rounds], axis=0).tolist()  # type: ignore[no-any-return]


def confuse(outcome: Outcome, n_classes: int) -> NDArray[np.int64]:
    """[C, C]: images of true class (row) that were said to be of a class (column)."""
    flat = np.bincount(outcome.label * n_classes + outcome.predicted, minlength=n_classes**2)
    return flat.reshape(n_classes, n_classes)


# ---------------------------------------------------------------------------------------------------------------------
# The share of the gain


def conclude(rounds: Sequence[Round], overlap: Mapping[str, Any], k: int, n_top: int, seed: int) -> dict[str, Any]:
    """The shares of the gain that are there with the base model's k latents and with its images, also in words."""
    base, adapted = (Condition(model, "all", "original") for model in MODELS)
    latents = share_with_base_latents(rounds, k, seed)
    texts = share(rounds, Condition("base", "all", "swap"), adapted, base, seed)
    seen = [Condition(model, model, "class", k, 0, True) for model in MODELS]
    before, after, least, most = (
        float(np.mean([one.right(c).mean() for one in rounds])) for c in (base, adapted, *seen)
    )
    sentence = (
        f"Accuracy goes from {before:.1%} to {after:.1%} ({100 * (after - before):+.1f} points). "
        f"Seeing only the {k} latents a class that the base model uses most, the adapted model keeps "
        f"{say(latents)} of the gain it makes with the {k} of its own ({100 * (most - least):+.1f} points); "
        "what it keeps needs no new concept. "
        f"Its texts with the base model's images make {say(texts)} of the whole gain; "
        f"the two models share {overlap['task']['jaccard']:.0%} of a class's top {n_top} latents."
    )
    points = {"points": 100 * (after - before), "seen_points": 100 * (most - least)}
    return {"sentence": sentence, "k": k, **points, "without_new_concepts": latents, "text_only": texts}


def share_with_base_latents(rounds: Sequence[Round], k: int, seed: int) -> dict[str, float | None]:
    """With A the accuracy of a model (first) that sees the top k latents chosen by a model (second), error term on:

    (A[adapted, base] - A[base, base]) / (A[adapted, adapted] - A[base, base]).
    """

    def seen(model: str, chosen_by: str) -> Condition:
        return Condition(model, chosen_by, "class", k, 0, True)

    return share(rounds, seen("adapted", "base"), seen("adapted", "adapted"), seen("base", "base"), seed)


def share(
    rounds: Sequence[Round], part: Condition, whole: Condition, before: Condition, seed: int
) -> dict[str, float | None]:
    """(part - before) / (whole - before) with its interval; None where whole - before is not above 0 for certain."""
    values = [np.stack([one.right(after) - one.right(before) for after in (part, whole)], axis=1) for one in rounds]
    means = resample_means(values, [one.judged for one in rounds], seed=seed)
    if np.percentile(means[:, 1], LEVELS[0]) <= 0:
        return {"share": None, "low": None, "high": None}
    ratios = means[:, 0] / np.where(means[:, 1], means[:, 1], np.nan)
    low, high = np.nanpercentile(ratios, LEVELS)
    mine, total = np.concatenate(values).mean(0)
    return {"share": float(mine / total), "low": float(low), "high": float(high)}


def say(found: Mapping[str, float | None]) -> str:
    """A share in words."""
    if found["share"] is None:
        return "an unknown share (that gain is not certain)"
    return f"{found['share']:.0%} ({found['low']:.0%} to {found['high']:.0%})"
