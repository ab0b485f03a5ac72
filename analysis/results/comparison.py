"""The result of compare: what prompt tuning changed, the latents or the mapping from latents to classes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from analysis.results.fidelity import Scores
from analysis.results.result import Result

Counts = tuple[tuple[int, ...], ...]
"""[C][C] images: a row per true class, a column per predicted class."""


@dataclass(frozen=True)
class OverlapMeans:
    """Means over the classes of the numbers in `Overlap`."""

    jaccard: float | None
    rank_biased_overlap: float | None
    n_high: float
    n_high_to_low: float
    n_low_to_high: float


@dataclass(frozen=True)
class Overlap:
    """The top latents of both models, and latents that are frequent in both, fell or rose; at most 10 are listed."""

    jaccard: float | None
    rank_biased_overlap: float | None
    n_high: int
    n_high_to_low: int
    n_low_to_high: int
    shared: tuple[int, ...]
    base_only: tuple[int, ...]
    adapted_only: tuple[int, ...]


@dataclass(frozen=True)
class ClassOverlap(Overlap):
    class_: str


@dataclass(frozen=True)
class DatasetOverlap(Overlap):
    """Pearson correlation of the counts and of ln(1 + count), over latents that fire in either model."""

    correlation: float | None
    log_correlation: float | None


@dataclass(frozen=True)
class CountOverlap:
    """Overlap class by class, its mean, and that of the sums over classes.

    Attributes:
        scatter: latents that fire in either model, their count in the base model, and in the adapted model.
    """

    classes: tuple[ClassOverlap, ...]
    task: OverlapMeans
    dataset: DatasetOverlap
    scatter: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class ComparedMask:
    """Accuracy under a mask.

    Attributes:
        classified_by: base or adapted. chosen_by: base, adapted, or all where no latents were chosen.
        selection: class, dataset, random or all.
        k: number of latents, or "all".
    """

    classified_by: str
    chosen_by: str
    selection: str
    k: int | str
    keep_error: bool
    accuracy: float
    accuracy_low: float
    accuracy_high: float


@dataclass(frozen=True)
class ComparedPredictions:
    """Predictions under a mask, as in ComparedMask."""

    classified_by: str
    chosen_by: str
    selection: str
    k: int | str
    keep_error: bool
    counts: Counts


@dataclass(frozen=True)
class Share:
    """A share of the gain with its 95 % interval; all None where it is uncertain that there is a gain.

    Attributes:
        change: "loss" where it is certain that there is a loss instead.
    """

    share: float | None
    low: float | None
    high: float | None
    change: str | None = None

    def say(self) -> str:
        if self.share is None:
            return "no share, because the loss is certain" if self.change else "no share, because no gain is certain"
        return f"{self.share:.0%} ({self.low:.0%} to {self.high:.0%})"

    @property
    def kind(self) -> str:
        """What the two ends of the interval allow to say: part, none or uncertain; without a certain gain nothing."""
        if self.share is None or self.low is None or self.high is None:
            return "nothing"
        return "part" if self.low > 0 else "none" if self.high <= 0 else "uncertain"


@dataclass(frozen=True)
class Conclusion:
    """What the gain needs, see docs/decisions/0019.

    Attributes:
        points: gain in accuracy, in percentage points. seen_points: the same when each model sees its own k latents.
        interval, seen_interval: their 95 % intervals. None in results made before these were recorded.
    """

    sentence: str
    k: int
    points: float
    seen_points: float
    without_new_concepts: Share
    text_only: Share
    interval: tuple[float, float] | None = None
    seen_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class DictionaryCell:
    """One SAE spliced into one model, without the error term, on held-out images."""

    sae: str  # first or second
    run: str
    model: str  # base or adapted
    fvu: float
    l0: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    loss: float
    original_accuracy: float


@dataclass(frozen=True)
class DictionaryShare:
    """The share of the gain that needs no new concept, with one of the SAEs."""

    sae: str
    share: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class TwoDictionaries:
    """A second SAE, trained on the adapted model's activations, beside the first.

    Attributes:
        n_firing: number of latents of the first and of the second that fire.
        n_without_counterpart: firing latents of the second whose decoder cosine with each of the first stays below
            `counterpart_cosine`.
        mean_largest_shuffled: mean_largest_cosine with the first SAE's channels in random order, which is what the best
            of so many partners is worth by chance. None in older files.
    """

    n_images: int
    k: int
    cells: tuple[DictionaryCell, ...]
    shares: tuple[DictionaryShare, ...]
    n_firing: tuple[int, ...]
    n_without_counterpart: int
    counterpart_cosine: float
    mean_largest_cosine: float | None
    sentence: str
    mean_largest_shuffled: float | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison(Result):
    """A base model compared with its adapted version.

    Attributes:
        n_chosen, n_judged: images per seed.
        interval: what the intervals cover.
        accuracy: "base image, adapted text" and so on: the four ways to combine images and texts.
        improvement: share of the base model's errors that are gone. None where it makes none.
        confusion, prediction: summed over seeds; empty for more than 100 classes.
    """

    KIND: ClassVar[str] = "comparison"

    classes: tuple[str, ...]
    n_chosen: int
    n_judged: int
    hook_point: str
    prompts: Mapping[str, object]
    overlap: CountOverlap
    interval: str = "95 % over images"
    accuracy: Mapping[str, Scores]
    improvement: float | None
    masks: tuple[ComparedMask, ...]
    confusion: Mapping[str, Counts] = field(default_factory=dict)
    prediction: tuple[ComparedPredictions, ...] = ()
    conclusion: Conclusion
    dictionaries: TwoDictionaries | None = None

    def lines(self) -> list[str]:
        """What the numbers say, in a sentence for each question."""
        return [self.conclusion.sentence, *([self.dictionaries.sentence] if self.dictionaries else [])]
