"""Logistic regression with a chosen penalty, in float64: standardized rows in, weights out. It needs no torch.

C, the inverse weight of the penalty, is raised until the loss on a fifth of the images, on which nothing is fitted,
gets worse. The fit is scikit-learn's multinomial logistic regression.

Source of the grid over C: the linear evaluations of DINOv2 and DINOv3.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

VALIDATION_SHARE = 0.2
GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Values of C; on standardized features the best one lies between 1e-3 and 0.1 for 1,000 to 20,000 images."""
N_ITERATIONS = 1000
TOLERANCE = 1e-6
"""Largest element of the gradient of the mean loss at which a fit ends."""


@dataclass(frozen=True)
class Fit:
    """Logistic regression: weight [C, E], bias [C], C, and the accuracy on the images that it was not fitted on."""

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    c: float
    accuracy: float


def fit_logistic(rows: NDArray[np.float64], classes: NDArray[np.int64], judged: NDArray[np.bool_]) -> Fit:
    """Multinomial logistic regression with the last C of GRID that makes the loss on the judged rows smaller.

    Args:
        rows: [n, E]. classes: [n], 0..C-1, all of them among the rows that are fitted.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    best, smallest = None, np.inf
    # each fit starts where the last one ended, so it has to end where the loss is smallest, wherever it started
    model: Any = LogisticRegression(max_iter=N_ITERATIONS, warm_start=True, tol=TOLERANCE)
    for c in GRID:
        with warnings.catch_warnings():  # of separable classes the largest C need not converge
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.set_params(C=c).fit(rows[~judged], classes[~judged])
        weight, bias = model.coef_.copy(), model.intercept_.copy()
        if len(weight) == 1:  # of two classes it keeps one logit, the second minus the first
            weight, bias = np.concatenate([np.zeros_like(weight), weight]), np.array([0.0, bias[0]])
        logits = rows[judged] @ weight.T + bias
        top = logits.max(1, keepdims=True)
        wrong = np.log(np.exp(logits - top).sum(1)) + top[:, 0] - logits[np.arange(len(logits)), classes[judged]]
        if (loss := float(wrong.mean())) >= smallest:
            break  # a weaker penalty fits the noise, and its fit takes longest
        smallest = loss
        best = Fit(weight, bias, c, float((logits.argmax(1) == classes[judged]).mean()))
    assert best is not None
    return best


def choose_validation(classes: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """[n]: a fifth of each class at random, rounded down, but at least one image."""
    rng = np.random.Generator(np.random.Philox(seed))
    judged = np.zeros(len(classes), dtype=bool)
    order = rng.permutation(len(classes))
    for number in np.unique(classes):
        mine = order[classes[order] == number]
        judged[mine[: max(1, int(VALIDATION_SHARE * len(mine)))]] = True
    return judged


def standardize(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(mean, deviation) [E] of rows [n, E]; the deviation of a feature that is the same everywhere counts as 1."""
    deviation = rows.std(0)
    return rows.mean(0), np.where(deviation > 1e-8, deviation, 1.0)  # such a feature says nothing
