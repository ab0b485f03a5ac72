"""A comparison's rounds summed up: accuracies with intervals, confusions, and one sentence on what the gain needs.

In: rounds (seeds), each with the outcome of every condition on its judged images. Out: the parts of a `Comparison`.
Accuracies are means over rounds and images. numpy only.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.classifier import Outcome
from analysis.intervals import LEVELS, resample_means
from analysis.interventions import Condition
from analysis.results import ComparedMask, ComparedPredictions, Conclusion, CountOverlap, Counts, Scores, Share

MODELS = ("base", "adapted")
MAX_CLASSES = 100
"""No confusions are kept for more classes: 100 classes and 100 conditions are already a million counts."""
INTERVALS = {
    False: "95 %: images drawn anew (bootstrap, 1,000 times); halves and random draws are those of one seed",
    True: "95 %: images and seeds (halves, random draws) drawn anew together (two-way bootstrap, 1,000 times)",
}


@dataclass(frozen=True)
class Round:
    """One seed: the images that latents are chosen on, those that are judged (stored positions), and the outcomes."""

    seed: int
    chosen: NDArray[np.int64]
    judged: NDArray[np.int64]
    outcomes: Mapping[Condition, Outcome]

    def right(self, condition: Condition) -> NDArray[np.float64]:
        """[n]: 1 where the prediction is right."""
        return self.outcomes[condition].right.astype(np.float64)


def summarize(rounds: Sequence[Round], seed: int) -> tuple[dict[str, Scores], tuple[ComparedMask, ...]]:
    """`accuracy` and `masks` of a Comparison. The draws of a random mask are one row."""
    groups: dict[Condition, list[Condition]] = {}
    for condition in rounds[0].outcomes:
        groups.setdefault(condition._replace(draw=0), []).append(condition)
    low, high = interval(rounds, groups.values(), seed)
    accuracy, rows = {}, []
    for i, (condition, draws) in enumerate(groups.items()):
        scores = [asdict(r.outcomes[draw].scores()) for r in rounds for draw in draws if draw in r.outcomes]
        mean = {name: float(np.mean([numbers[name] for numbers in scores])) for name in scores[0]}
        mean |= {"accuracy_low": float(low[i]), "accuracy_high": float(high[i])}
        if condition.selection in ("original", "swap"):
            image = MODELS.index(condition.model)
            text = image if condition.selection == "original" else 1 - image
            accuracy[f"{MODELS[image]} image, {MODELS[text]} text"] = Scores(**mean)
        else:
            bounds = (mean["accuracy"], mean["accuracy_low"], mean["accuracy_high"])
            rows.append(ComparedMask(*_describe(condition), *bounds))
    return accuracy, tuple(rows)


def count_predictions(
    rounds: Sequence[Round], n_classes: int
) -> tuple[dict[str, Counts], tuple[ComparedPredictions, ...]]:
    """`confusion` and `prediction` of a Comparison; empty for more than MAX_CLASSES."""
    if n_classes > MAX_CLASSES:
        return {}, ()
    confusion = {model: _confuse(rounds, Condition(model, "all", "original"), n_classes) for model in MODELS}
    prediction = [
        ComparedPredictions(*_describe(condition), _confuse(rounds, condition, n_classes))
        for condition in rounds[0].outcomes
        if condition.selection in ("class", "dataset")
    ]
    return confusion, tuple(prediction)


def _describe(condition: Condition) -> tuple[str, str, str, int | str, bool]:
    """classified_by, chosen_by, selection, k, keep_error."""
    return (
        condition.model, condition.chosen_by, condition.selection, condition.k or "all", condition.keep_error,
    )  # fmt: skip


def interval(
    rounds: Sequence[Round], groups: Iterable[Sequence[Condition]], seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(low, high) of the accuracy of each group of conditions, whose mean is taken first."""
    groups = list(groups)
    values = [np.stack([_mean(r, group) for group in groups], axis=1) for r in rounds]
    low, high = np.percentile(resample_means(values, [r.judged for r in rounds], seed=seed), LEVELS, axis=0)
    return low, high


def _mean(r: Round, group: Sequence[Condition]) -> NDArray[np.float64]:
    return np.asarray(np.mean([r.right(condition) for condition in group if condition in r.outcomes], axis=0))


def _confuse(rounds: Sequence[Round], condition: Condition, n_classes: int) -> Counts:
    """[C][C]: number of images of a true class (row) that are predicted to be of a class (column)."""
    outcomes = [r.outcomes[condition] for r in rounds]
    cells = np.concatenate([outcome.label * n_classes + outcome.predicted for outcome in outcomes])
    total = np.bincount(cells, minlength=n_classes**2).reshape(n_classes, n_classes)
    return tuple(map(tuple, total.tolist()))


# ---------------------------------------------------------------------------------------------------------------------
# The share of the gain


def conclude(rounds: Sequence[Round], overlap: CountOverlap, k: int, n_top: int, seed: int) -> Conclusion:
    """Which shares of the gain need only the base model's k latents, or only its images; also in words."""
    base, adapted = (Condition(model, "all", "original") for model in MODELS)
    latents = share_with_base_latents(rounds, k, seed)
    texts = share(rounds, Condition("base", "all", "swap"), adapted, base, seed)
    seen = [Condition(model, model, "class", k, 0, True) for model in MODELS]
    before, after, least, most = (float(np.mean([r.right(c).mean() for r in rounds])) for c in (base, adapted, *seen))
    points, seen_points = 100 * (after - before), 100 * (most - least)
    sentence = (
        f"Accuracy goes from {before:.1%} to {after:.1%} ({points:+.1f} points). "
        f"Seeing only the {k} latents a class that the base model uses most, the adapted model keeps "
        f"{latents.say()} of the gain it makes with the {k} of its own ({seen_points:+.1f} points); "
        "what it keeps needs no new concept. "
        f"Its texts with the base model's images make {texts.say()} of the whole gain; "
        f"the two models share {overlap.task.jaccard:.0%} of a class's top {n_top} latents."
    )
    return Conclusion(sentence, k, points, seen_points, latents, texts)


def share_with_base_latents(rounds: Sequence[Round], k: int, seed: int) -> Share:
    """(A[adapted, base] - A[base, base]) / (A[adapted, adapted] - A[base, base]).

    A[model, chosen_by] is the accuracy of a model that sees the top k latents chosen by a model, error term on.
    """

    def seen(model: str, chosen_by: str) -> Condition:
        return Condition(model, chosen_by, "class", k, 0, True)

    return share(rounds, seen("adapted", "base"), seen("adapted", "adapted"), seen("base", "base"), seed)


def share(rounds: Sequence[Round], part: Condition, whole: Condition, before: Condition, seed: int) -> Share:
    """(part - before) / (whole - before) with its interval; None unless whole - before is certainly above 0."""
    values = [np.stack([r.right(after) - r.right(before) for after in (part, whole)], axis=1) for r in rounds]
    means = resample_means(values, [r.judged for r in rounds], seed=seed)
    if np.percentile(means[:, 1], LEVELS[0]) <= 0:
        return Share(None, None, None)
    ratios = means[:, 0] / np.where(means[:, 1], means[:, 1], np.nan)
    low, high = np.nanpercentile(ratios, LEVELS)
    gained, total = np.concatenate(values).mean(0)
    return Share(float(gained / total), float(low), float(high))
