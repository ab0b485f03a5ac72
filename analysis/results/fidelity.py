"""The result of evaluate: zero-shot scores with an SAE in place of the stream, beside ablations."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar

from analysis.results.result import Result, Row


@dataclass(frozen=True)
class Scores:
    """What a classifier achieves on some images; the interval is 95 %.

    Attributes:
        class_accuracy: mean over the classes of their recall.
        loss: mean loss, by the loss that the judge was trained with (`judge.loss`): cross-entropy of a softmax, or
            SigLIP's sigmoid loss.
        softmax_loss: mean cross-entropy, where `loss` is another one.
    """

    accuracy: float
    accuracy_low: float
    accuracy_high: float
    class_accuracy: float
    loss: float
    softmax_loss: float | None = field(default=None, kw_only=True)

    def columns(self) -> Row:
        more = {} if self.softmax_loss is None else {"softmax_loss": self.softmax_loss}
        return {
            "accuracy": self.accuracy, "from": self.accuracy_low, "to": self.accuracy_high, "loss": self.loss, **more,
        }  # fmt: skip


def mean_scores(scores: Sequence[Scores]) -> dict[str, float | None]:
    """The mean of each number of some scores; a number that they do not have stays None."""
    rows = [asdict(each) for each in scores]
    return {
        name: None if value is None else sum(row[name] for row in rows) / len(rows) for name, value in rows[0].items()
    }


@dataclass(frozen=True)
class VariantScores(Scores):
    """same_prediction: the share of images that are classified as with the original activations."""

    same_prediction: float


@dataclass(frozen=True)
class RecoveredShares:
    """(ablated - SAE) / (ablated - original) for zero and mean ablation; None where the ablation does no harm."""

    accuracy_zero: float | None
    accuracy_mean: float | None
    loss_zero: float | None
    loss_mean: float | None


@dataclass(frozen=True)
class RunFidelity:
    """One run: `variants` holds original, sae, sae+error, zero and mean."""

    run: str
    hook_point: str
    tokens: str
    n_images: int
    variants: Mapping[str, VariantScores]
    recovered: RecoveredShares


@dataclass(frozen=True)
class Fidelity(Result):
    """What a classifier answers with the SAE spliced in, for one run or several."""

    KIND: ClassVar[str] = "fidelity"

    n_classes: int
    classes: tuple[str, ...]
    runs: tuple[RunFidelity, ...]

    def tables(self) -> list[list[Row]]:
        """A row per run and variant. same: share of images classified as before."""
        rows: list[Row] = [
            {"run": run.run, "layer": run.hook_point.removeprefix("blocks.").split(".")[0], "tokens": run.tokens,
             "variant": name, **scores.columns(), "same": scores.same_prediction}
            for run in self.runs for name, scores in run.variants.items()
        ]  # fmt: skip
        return [rows]
