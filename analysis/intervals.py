"""95 % confidence intervals of shares, means and differences over images. numpy only."""

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
    n_images = len(values)
    rng = np.random.Generator(np.random.Philox(seed))
    means = np.empty((N_RESAMPLES, values.shape[1]))
    for i in range(N_RESAMPLES):  # one at a time: [1000, I] would not fit for a million images
        weights = np.bincount(rng.integers(n_images, size=n_images), minlength=n_images)
        means[i] = weights @ values / n_images
    low, high = np.percentile(means, LEVELS, axis=0)
    return low, high
