"""A comparison's rounds summed up: accuracies with intervals, confusions, and one sentence on what the gain needs.

In: rounds (seeds), each with the outcome of every condition on its judged images. Out: the parts of a `Comparison`.
Accuracies are means over rounds and images. numpy only.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.classifier import Outcome
from analysis.intervals import LEVELS, resample_means
from analysis.interventions import Condition
from analysis.results import (
    ComparedMask,
    ComparedPredictions,
    Conclusion,
    CountOverlap,
    Counts,
    Scores,
    Share,
    mean_scores,
)

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
        mean: dict[str, Any] = dict(
            mean_scores([r.outcomes[draw].scores() for r in rounds for draw in draws if draw in r.outcomes])
        )
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


class Change(NamedTuple):
    """A change in accuracy, in percentage points, with its 95 % interval."""

    points: float
    low: float
    high: float

    @property
    def word(self) -> str:
        """gain or loss where both ends of the interval are on that side of 0; otherwise uncertain."""
        return "gain" if self.low > 0 else "loss" if self.high < 0 else "uncertain"

    def say(self) -> str:
        """+1.2 points, +0.4 to +2.0: a certain gain."""
        what = {"gain": "a certain gain", "loss": "a certain loss", "uncertain": "an uncertain change"}[self.word]
        return f"{self.points:+.1f} points, {self.low:+.1f} to {self.high:+.1f}: {what}"


def conclude(rounds: Sequence[Round], overlap: CountOverlap, k: int, n_top: int, seed: int) -> Conclusion:
    """Which shares of the gain need only the base model's k latents, or only its images; also in words."""
    base, adapted = (Condition(model, "all", "original") for model in MODELS)
    latents = share_with_base_latents(rounds, k, seed)
    texts = share(rounds, Condition("base", "all", "swap"), adapted, base, seed)
    before, after = (float(np.mean([r.right(c).mean() for r in rounds])) for c in (base, adapted))
    whole = change(rounds, adapted, base, seed)
    least, most = (Condition(model, model, "class", k, 0, True) for model in MODELS)
    seen = change(rounds, most, least, seed)
    sentence = (
        f"Accuracy goes from {before:.1%} to {after:.1%} ({whole.say()}). {say_latents(latents, seen, k)} "
        f"{say_texts(texts, whole)} "
        f"The two models share {overlap.task.jaccard:.0%} of a class's top {n_top} latents."
    )
    return Conclusion(sentence, k, whole.points, seen.points, latents, texts, whole[1:], seen[1:])


def say_latents(kept: Share, seen: Change, k: int) -> str:
    """What the latents of the base model do for the adapted one, given the change when each sees k of its own."""
    start = f"When each model sees only the {k} latents a class that it uses most, the adapted model"
    if seen.word == "loss":
        return f"{start} does worse ({seen.say()}), so there is no gain that new concepts could explain."
    if seen.word == "uncertain" or kept.kind == "nothing":
        return f"{start} does not certainly do better ({seen.say()}), so no share of a gain is given."
    rest = {
        "part": f"keeps {kept.say()} of that gain; what it keeps needs no new concept",
        "none": f"does no better than the base model ({kept.say()} of that gain), so all of the gain needs new latents",
        "uncertain": f"keeps a part of that gain that is not certainly above zero ({kept.say()})",
    }[kept.kind]
    return f"{start} does better ({seen.say()}). With the {k} that the base model uses most, it {rest}."


def say_texts(texts: Share, whole: Change) -> str:
    """What the texts of the adapted model do with the images of the base model, given the whole change."""
    if whole.word == "loss":
        return "The whole change is a loss, so its texts have no share of a gain."
    if whole.word == "uncertain" or texts.kind == "nothing":
        return "The whole change is not certainly a gain, so its texts are given no share of one."
    part = {
        "part": f"{texts.say()} of the whole gain",
        "none": f"none of the whole gain ({texts.say()})",
        "uncertain": f"a part of the whole gain that is not certainly above zero ({texts.say()})",
    }[texts.kind]
    return f"Its texts with the base model's images account for {part}."


def change(rounds: Sequence[Round], after: Condition, before: Condition, seed: int) -> Change:
    """after - before with its interval."""
    values = [(r.right(after) - r.right(before))[:, None] for r in rounds]
    means = resample_means(values, [r.judged for r in rounds], seed=seed)[:, 0]
    low, high = np.percentile(means, LEVELS)
    middle = np.mean([value.mean() for value in values])
    return Change(*(float(100 * number) for number in (middle, low, high)))


def share_with_base_latents(rounds: Sequence[Round], k: int, seed: int) -> Share:
    """(A[adapted, base] - A[base, base]) / (A[adapted, adapted] - A[base, base]).

    A[model, chosen_by] is the accuracy of a model that sees the top k latents chosen by a model, error term on.
    """

    def seen(model: str, chosen_by: str) -> Condition:
        return Condition(model, chosen_by, "class", k, 0, True)

    return share(rounds, seen("adapted", "base"), seen("adapted", "adapted"), seen("base", "base"), seed)


def share(rounds: Sequence[Round], part: Condition, whole: Condition, before: Condition, seed: int) -> Share:
    """(part - before) / (whole - before) with its interval; None unless whole - before is certainly a gain."""
    values = [np.stack([r.right(after) - r.right(before) for after in (part, whole)], axis=1) for r in rounds]
    means = resample_means(values, [r.judged for r in rounds], seed=seed)
    lowest, highest = np.percentile(means[:, 1], LEVELS)
    if lowest <= 0:
        return Share(None, None, None, "loss" if highest < 0 else None)
    ratios = means[:, 0] / np.where(means[:, 1], means[:, 1], np.nan)
    low, high = np.nanpercentile(ratios, LEVELS)
    gained, total = np.concatenate(values).mean(0)
    return Share(float(gained / total), float(low), float(high))
