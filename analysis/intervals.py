"""95 % confidence intervals of shares, means and differences over images. numpy only."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""
N_RESAMPLES = 1000
LEVELS = (2.5, 97.5)


def wilson_interval(n_right: int, n: int) -> tuple[float, float]:
    """95 % interval of the share n_right / n (Wilson 1927), sensible at 0 and 1 too. (nan, nan) for n = 0."""
    if n == 0:
        return float("nan"), float("nan")
    share, z2 = n_right / n, Z * Z
    center = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * float(np.sqrt(share * (1 - share) / n + z2 / (4 * n * n)))
    return max(0.0, center - half), min(1.0, center + half)


def bootstrap_intervals(values: NDArray[np.floating], *, seed: int = 0) -> tuple[NDArray[np.float64], ...]:
    """(low, high) [M] of the means of `values` [I, M], from 1,000 resamples of the images, the same for every column.

    The resamples are paired: a column that is a difference of two conditions gives the interval of that difference.
    """
    low, high = np.percentile(resample_means([values], [np.arange(len(values))], seed=seed), LEVELS, axis=0)
    return low, high


def resample_means(
    values: Sequence[NDArray[np.floating]], images: Sequence[NDArray[np.int64]], *, seed: int = 0
) -> NDArray[np.float64]:
    """[1000, M]: means over rounds and images, both resampled each time, independently (Owen 2007, pigeonhole).

    Args:
        values: one array [n, M] per round; rounds are, for example, seeds, each of which judges some of the images.
        images: one array [n] per round: the image of each row. An image of several rounds is drawn for all of them.
    """
    distinct, n_rounds = np.unique(np.concatenate(images)), len(values)
    places = [np.searchsorted(distinct, of_round) for of_round in images]
    rng = np.random.Generator(np.random.Philox(seed))
    means = np.empty((N_RESAMPLES, values[0].shape[1]))
    for i in range(N_RESAMPLES):  # one at a time: [1000, I] would not fit for a million images
        weights = np.bincount(rng.integers(len(distinct), size=len(distinct)), minlength=len(distinct))
        times = np.bincount(rng.integers(n_rounds, size=n_rounds), minlength=n_rounds) if n_rounds > 1 else [1]
        parts = [(t, weights[place], rows) for t, place, rows in zip(times, places, values, strict=True) if t]
        total = sum(int(t) * int(w.sum()) for t, w, _ in parts)
        means[i] = sum(t * (w @ rows) for t, w, rows in parts) / max(total, 1)
    return means
