"""The package's probes: latents ranked by the F statistic, and scikit-learn's logistic regression on the best.

The F statistic comes from sums by class. The probe is the same call on the same columns, so that fits which do not
converge within the package's iterations end at the same weights, too.
"""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.benchmark.visaebench.images import SEED

Array = NDArray[np.float64]


def measure_f(counts: NDArray[np.int64], sums: Array, squares: Array) -> Array:
    """The F statistic of each latent over the classes, as `f_classif` has it: [..., F].

    It is NaN for a latent that is constant, and infinite for one that is constant within each class.

    Args:
        counts: [C] or [..., C] images of each class. sums: [..., C, F] of the values. squares: [..., F] of all classes.
    """
    n, n_classes = counts.sum(-1), counts.shape[-1]
    mean = sums.sum(-2) ** 2 / np.asarray(n)[..., None]
    between = (sums**2 / counts[..., None]).sum(-2) - mean
    within = squares - mean - between
    with np.errstate(divide="ignore", invalid="ignore"):
        f: Array = (between / (n_classes - 1)) / (within / np.asarray(n - n_classes)[..., None])
    return f


def rank(f: Array) -> NDArray[np.int64]:
    """The latents from the largest F down; those that have none come last."""
    return np.argsort(np.nan_to_num(f, nan=-np.inf))[::-1]


def fit_probe(x: NDArray[np.float32], y: NDArray[np.int64], max_iter: int) -> Any:
    """A logistic regression with C = 1. The package does not mind whether it has converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(solver="lbfgs", max_iter=max_iter, C=1.0, random_state=SEED).fit(x, y)


def score(
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    split: tuple[NDArray[np.int64], NDArray[np.int64]],
    max_iter: int = 500,
) -> float:
    """The accuracy on the test part of a probe that was fitted on the training part."""
    train, test = split
    return float(fit_probe(x[train], y[train], max_iter).score(x[test], y[test]))
