"""Which class a classifier predicts for some images, and at what loss. Logits in, batch by batch; numbers out."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from analysis.classifier.zero_shot import as_numpy
from analysis.intervals import wilson_interval
from analysis.results import Scores


@dataclass(frozen=True)
class Outcome:
    """Predictions for some images, in their order."""

    label: NDArray[np.int64]  # [I] true class
    predicted: NDArray[np.int64]  # [I]
    loss: NDArray[np.float64]  # [I]

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
        )

    def recalls(self) -> dict[int, float]:
        """Accuracy of each class."""
        classes, number, n_images = np.unique(self.label, return_inverse=True, return_counts=True)
        shares = np.bincount(number, weights=self.right) / n_images
        return dict(zip(classes.tolist(), shares.tolist(), strict=True))


class Outcomes:
    """Collects batches of logits into an Outcome."""

    def __init__(self) -> None:
        self._parts: list[tuple[NDArray[Any], ...]] = []

    def add(self, logits: Tensor, label: NDArray[np.int64]) -> None:
        """logits [B, C]."""
        truth = torch.from_numpy(label).to(logits.device)
        loss = F.cross_entropy(logits.double(), truth, reduction="none")
        self._parts.append((label, as_numpy(logits.argmax(1)), as_numpy(loss)))

    def result(self) -> Outcome:
        return Outcome(*(np.concatenate(column) for column in zip(*self._parts, strict=True)))
