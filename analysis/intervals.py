"""95 % confidence intervals of shares, means and differences over images. numpy only."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054
"""Of the normal distribution, 95 % two-sided."""
N_RESAMPLES = 1000
LEVELS = (2.5, 97.5)


def wilson_interval(n_right: int, n: int) -> tuple[float, float]:
    """Of a share n_right / n (Wilson 1927): sensible at 0 and 1 too. (nan, nan) for n = 0."""
    if n == 0:
        return float("nan"), float("nan")
    share, z2 = n_right / n, Z * Z
    center = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * float(np.sqrt(share * (1 - share) / n + z2 / (4 * n * n)))
    return max(0.0, center - half), min(1.0, center + half)


def bootstrap_intervals(values: NDArray[np.floating], *, seed: int = 0) -> tuple[NDArray[np.float64], ...]:
    """(low, high) [M] of the means of `values` [I, M]: images drawn anew 1,000 times, the same for every column.

    Paired: a column that is a difference of two conditions gives the interval of that difference.
    """
    low, high = np.percentile(resample_means([values], [np.arange(len(values))], seed=seed), LEVELS, axis=0)
    return low, high


def resample_means(
    values: Sequence[NDArray[np.floating]], images: Sequence[NDArray[np.int64]], *, seed: int = 0
) -> NDArray[np.float64]:
    """[1000, M]: means over rounds and images, both drawn anew each time, independently (Owen 2007, pigeonhole).

    Args:
        values: of each round [n, M]; rounds are e.g. seeds, each of which looks at some of the images.
        images: of each round [n], which image a row is of; one that several rounds look at is drawn for all at once.
    """
    distinct, n_rounds = np.unique(np.concatenate(images)), len(values)
    places = [np.searchsorted(distinct, some) for some in images]
    rng = np.random.Generator(np.random.Philox(seed))
    means = np.empty((N_RESAMPLES, values[0].shape[1]))
    for i in range(N_RESAMPLES):  # one at a time: [1000, I] would not fit for a million images
        weights = np.bincount(rng.integers(len(distinct), size=len(distinct)), minlength=len(distinct))
        times = np.bincount(rng.integers(n_rounds, size=n_rounds), minlength=n_rounds) if n_rounds > 1 else [1]
        parts = [(t, weights[place], rows) for t, place, rows in zip(times, places, values, strict=True) if t]
        total = sum(int(t) * int(w.sum()) for t, w, _ in parts)
        means[i] = sum(t * (w @ rows) for t, w, rows in parts) / max(total, 1)
    return means
