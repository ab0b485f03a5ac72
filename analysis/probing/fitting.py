"""A linear probe on columns of numbers: fitted on some images, its penalty chosen on others, judged on yet others.

Classes: multinomial logistic regression, as the linear probe that judges (`fit_logistic`). Numbers: ridge regression,

    w = argmin sum_i (y_i - b - w . z_i)^2 + n lambda |w|^2,   z the standardized columns, n the images it is fitted on

with the lambda of PENALTIES whose squared error is smallest on the fifth of the choosing images that is not fitted.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.classifier import choose_validation, fit_logistic, standardize
from analysis.probing.target import Split

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
BLOCK_IMAGES = 4096
"""Judged images whose columns are held at once."""

Rows = Callable[[NDArray[np.int64]], NDArray[np.float64]]
"""Reads the columns [n, E] of some images, given as ascending stored positions."""


@dataclass(frozen=True)
class Probed:
    """A probe that was judged.

    Attributes:
        outcomes: [m], of each judged image 1 or 0 for a right or wrong class, or the squared error of its number.
        weights: [E] for numbers; [C, E] for classes, less their mean over the classes, which says nothing.
    """

    outcomes: NDArray[np.float64]
    weights: NDArray[np.float64]


@dataclass(frozen=True)
class Task:
    """What probes are fitted to and judged by.

    Attributes:
        held_out: [n] of the choosing images, those on which the penalty is chosen; the others are fitted.
        targets: [n] what is fitted: the truth, or shuffled labels.
    """

    split: Split
    held_out: NDArray[np.bool_]
    targets: NDArray[Any]

    @classmethod
    def of(cls, split: Split, seed: int) -> "Task":
        truth = split.truth[0]
        groups = truth if split.names is not None else np.zeros(len(truth), dtype=np.int64)
        return cls(split, choose_validation(groups, seed), truth)

    @property
    def fitted(self) -> NDArray[np.int64]:
        """Stored positions of the images that are fitted, on which latents are ranked."""
        return self.split.choosing[~self.held_out]

    def shuffle(self, rng: np.random.Generator) -> "Task":
        """Shuffled labels, within the images that are fitted and within the others, so that each keeps its classes."""
        targets = self.targets.copy()
        for part in (self.held_out, ~self.held_out):
            targets[part] = rng.permutation(targets[part])
        return replace(self, targets=targets)

    def probe(self, read: Rows) -> Probed:
        """Fit a probe on columns, and judge it."""
        rows = read(self.split.choosing)
        mean, deviation = standardize(rows[~self.held_out])
        rows = (rows - mean) / deviation
        if self.split.names is not None:
            fit = fit_logistic(rows, self.targets, self.held_out)
            weights, bias = fit.weight, fit.bias
        else:
            weight, offset = fit_ridge(rows, self.targets, self.held_out)
            weights, bias = weight[None], np.array([offset])
        outcomes = []
        for images, truth in self._blocks():
            answers = (read(images) - mean) / deviation @ weights.T + bias
            outcomes.append(
                answers.argmax(1) == truth if self.split.names is not None else (answers[:, 0] - truth) ** 2
            )
        found = weights - weights.mean(0) if self.split.names is not None else weights[0]
        return Probed(np.concatenate(outcomes).astype(np.float64), found)

    def _blocks(self) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
        for first in range(0, len(self.split.judged), BLOCK_IMAGES):
            part = slice(first, first + BLOCK_IMAGES)
            yield self.split.judged[part], self.split.truth[1][part]


def fit_ridge(
    rows: NDArray[np.float64], numbers: NDArray[np.float64], held_out: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], float]:
    """(weight [E], offset) of the ridge regression with the best penalty; rows [n, E] are standardized."""
    z, y = rows[~held_out], numbers[~held_out]
    center, offset = z.mean(0), float(y.mean())
    z = z - center
    values, vectors = np.linalg.eigh(z.T @ z)
    products = vectors.T @ (z.T @ (y - offset))
    values = np.maximum(values, 0.0)
    best, smallest = np.zeros(rows.shape[1]), np.inf
    for penalty in PENALTIES:
        weight = vectors @ (products / (values + len(y) * penalty))
        errors = (rows[held_out] - center) @ weight + offset - numbers[held_out]
        if (loss := float((errors**2).mean())) < smallest:
            best, smallest = weight, loss
    return best, offset - float(center @ best)
