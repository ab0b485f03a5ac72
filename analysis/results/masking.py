"""The result of intervene: the masking curve, latents kept and dropped, beside random controls."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from analysis.results.result import Result, Row


@dataclass(frozen=True)
class MaskScores:
    """The classifier's scores under one kind of mask.

    Attributes:
        selection: all, class, predicted, dataset, list or random.
        mode: keep or drop; original: nothing is masked.
        k: number of latents, or "all".
        n_latents: mean number of latents in the lists; None for all latents.
        tokens_per_image: number of tokens per image on which the mean latent of the lists is above tau.
        draws: accuracy of each random draw; the other numbers are means over the draws.
        loss, softmax_loss: as in `Scores`.
    """

    selection: str
    mode: str
    k: int | str
    n_latents: float | None
    tokens_per_image: float | None
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    class_accuracy: float
    loss: float
    draws: tuple[float, ...] | None = None
    softmax_loss: float | None = None


@dataclass(frozen=True)
class MaskMargin:
    """Accuracy minus that of the random control, with a paired 95 % interval."""

    selection: str
    mode: str
    k: int
    margin: float
    low: float
    high: float


@dataclass(frozen=True)
class MaskRecall:
    """Recall of each class."""

    selection: str
    mode: str
    k: int | str
    recall: Mapping[str, float]


@dataclass(frozen=True)
class MaskingCurve(Result):
    """What a classifier answers when only k latents are kept, or k are dropped.

    Attributes:
        n_chosen, n_judged: images that latents were chosen on, and that are classified.
        curve: one for each way to choose latents, mode and k.
        margins: how much better a choice is than a random one.
        recalls: the share of each class that is classified right.
    """

    KIND: ClassVar[str] = "masks"

    run: str
    hook_point: str
    tokens: str
    classes: tuple[str, ...]
    n_chosen: int
    n_judged: int
    n_latents: int
    curve: tuple[MaskScores, ...]
    margins: tuple[MaskMargin, ...]
    recalls: tuple[MaskRecall, ...]

    def tables(self) -> list[list[Row]]:
        """A row per selection, mode and k."""
        rows: list[Row] = [
            {"selection": row.selection, "mode": row.mode, "k": row.k, "accuracy": row.accuracy,
             "from": row.accuracy_low, "to": row.accuracy_high, "loss": row.loss}
            for row in self.curve
        ]  # fmt: skip
        return [rows]
