"""Which class a classifier predicts for some images, and at what loss. Logits in, batch by batch; numbers out."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from analysis.classifier.streams import as_numpy
from analysis.intervals import wilson_interval
from analysis.results import Scores


@dataclass(frozen=True)
class Outcome:
    """Predictions for some images, in their order.

    Attributes:
        label, predicted: [I], true and predicted class.
        loss: [I], by the loss that the model was trained with.
        softmax_loss: [I], where `loss` is another one.
    """

    label: NDArray[np.int64]
    predicted: NDArray[np.int64]
    loss: NDArray[np.float64]
    softmax_loss: NDArray[np.float64] | None = None

    @property
    def right(self) -> NDArray[np.bool_]:
        return np.asarray(self.predicted == self.label)

    def scores(self) -> Scores:
        """The 95 % interval of the accuracy is Wilson's."""
        low, high = wilson_interval(int(self.right.sum()), len(self.right))
        return Scores(
            accuracy=float(self.right.mean()),
            accuracy_low=low,
            accuracy_high=high,
            class_accuracy=float(np.mean(list(self.recalls().values()))),
            loss=float(self.loss.mean()),
            softmax_loss=None if self.softmax_loss is None else float(self.softmax_loss.mean()),
        )

    def recalls(self) -> dict[int, float]:
        """Accuracy of each class."""
        classes, number, n_images = np.unique(self.label, return_inverse=True, return_counts=True)
        shares = np.bincount(number, weights=self.right) / n_images
        return dict(zip(classes.tolist(), shares.tolist(), strict=True))


def softmax_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy [B] of softmax(logits [B, C]) with the true classes [B]; CLIP's, with the classes as texts."""
    return F.cross_entropy(logits, truth, reduction="none")


def sigmoid_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """-log sigmoid(y logit), summed over the classes: [B]; y is 1 for the true class and -1 for the others.

    This is SigLIP's loss (arXiv 2303.15343), whose mean over images is what open_clip's SigLipLoss computes. Unlike the
    softmax loss it changes when all logits are shifted, as a bad reconstruction may shift them.
    """
    sign = 2 * F.one_hot(truth, logits.shape[1]) - 1
    return -F.logsigmoid(sign * logits).sum(1)


class Outcomes:
    """Collects batches of logits into an Outcome."""

    def __init__(self, loss: str = "softmax") -> None:
        """loss: softmax, or sigmoid, beside which the softmax loss is kept."""
        self._losses = (softmax_loss,) if loss == "softmax" else (sigmoid_loss, softmax_loss)
        self._parts: list[tuple[NDArray[Any], ...]] = []

    def add(self, logits: Tensor, label: NDArray[np.int64]) -> None:
        """logits [B, C]."""
        logits, truth = logits.detach().cpu(), torch.from_numpy(label)
        losses = (as_numpy(loss(logits.double(), truth)) for loss in self._losses)
        self._parts.append((label, as_numpy(logits.argmax(1)), *losses))

    def result(self) -> Outcome:
        return Outcome(*(np.concatenate(column) for column in zip(*self._parts, strict=True)))
