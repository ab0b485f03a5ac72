"""What a result records of the judge: the classifier whose answers were counted."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ProbeFacts:
    """How a linear probe was trained.

    Attributes:
        features: cls, patch (the mean of the patches), pooled, or several joined by +.
        normalization: standardized, by mean and deviation over the images that it was fitted on.
        c: inverse weight of the penalty, chosen on the validation images.
        n_images: number of training images; `n_validation` of them were held out to choose c.
        accuracy: on the validation images.
        images: a hash of the contents of the training images.
    """

    features: str
    normalization: str
    c: float
    seed: int
    n_images: int
    n_validation: int
    accuracy: float
    images: str


@dataclass(frozen=True)
class JudgeFacts:
    """The judge.

    Attributes:
        kind: zero-shot, probe, or head (the checkpoint's own classifier).
        loss: softmax or sigmoid, what the field `loss` of scores is.
    """

    kind: Literal["zero-shot", "probe", "head"]
    loss: Literal["softmax", "sigmoid"]
    probe: ProbeFacts | None = None

    @property
    def name(self) -> str:
        """The accuracy of this judge, for a title or an axis."""
        names = {"probe": "probe accuracy", "head": "accuracy of the checkpoint's classifier"}
        return names.get(self.kind, "zero-shot accuracy")

    def lines(self) -> list[str]:
        """What the terminal and the report say of a judge; nothing of texts with the softmax loss, the usual one."""
        if self.probe is not None:
            p = self.probe
            return [
                f"judged by a linear probe on {p.features.replace('+', ' and ')}, trained on {p.n_images:,} images "
                f"(C {p.c:g}, accuracy {p.accuracy:.1%} on {p.n_validation:,} of them that it was not fitted on)"
            ]
        if self.kind == "head":
            return ["judged by the checkpoint's own classifier"]
        return ["loss is the sigmoid loss that the model was trained with"] if self.loss == "sigmoid" else []
