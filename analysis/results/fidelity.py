"""The result of evaluate: zero-shot scores with an SAE in place of the stream, beside ablations."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from analysis.results.result import Result, Row


@dataclass(frozen=True)
class Scores:
    """What a classifier achieves on some images; the interval is 95 %.

    Attributes:
        class_accuracy: mean over the classes of their recall.
        loss: mean cross-entropy.
    """

    accuracy: float
    accuracy_low: float
    accuracy_high: float
    class_accuracy: float
    loss: float

    def columns(self) -> Row:
        return {
            "accuracy": self.accuracy, "from": self.accuracy_low, "to": self.accuracy_high, "loss": self.loss,
        }  # fmt: skip


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
