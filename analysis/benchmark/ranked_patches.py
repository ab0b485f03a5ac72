"""Numbers of patches in the order of a latent's codes, on the judged images and on each of their resamples.

A resample that holds an image twice holds its patches twice. So a number is a function of running sums of weights in
the order of the values. The patches on which the latent is silent are one more step, of value 0, and enter by their
number alone.
"""

import numpy as np
from numpy.typing import NDArray

from analysis.benchmark.resamples import BLOCK, Resamples, divide

Array = NDArray[np.float64]

CELLS = 1 << 22
"""Numbers of all resamples that are held at once, 32 MB."""


def draw_weights(resamples: Resamples, places: NDArray[np.int64]) -> NDArray[np.int16]:
    """[n + 1, M]: how often some images count, on the images themselves (row 0) and on each resample.

    Args:
        places: [M] their numbers among the images that are drawn from, ascending.
    """
    weights = np.ones((resamples.n + 1, len(places)), dtype=np.int16)
    for start in range(0, resamples.n_images, BLOCK):
        stop = min(start + BLOCK, resamples.n_images)
        first, last = np.searchsorted(places, (start, stop))
        weights[1:, first:last] = resamples.weights(start, stop)[:, places[first:last] - start]
    return weights


def average_precision(
    weights: NDArray[np.int16], image: NDArray[np.int64], score: Array, hit: Array, mass: Array, n_patches: int
) -> Array:
    """[n + 1]: AP of patches that are ranked by a score, which is 0 for all that are not listed; NaN without a hit.

    Equal scores are one step. A patch may be a hit in part, which gives the AP over its pixels.

    Args:
        weights: [n + 1, M] of the images.
        image, score, hit: [k] for each listed patch, its image, its score, which is not 0, and the share that is a hit.
        mass: [M] sum of the hits of all patches of an image. n_patches: of an image.
    """
    order = np.argsort(-score, kind="stable")
    image, score, hit = image[order], score[order], hit[order]
    steps = np.flatnonzero(np.diff(score, prepend=np.inf))
    place = int(np.searchsorted(-score[steps], 0.0))  # of the silent patches: behind positive scores, before negative
    result = np.empty(len(weights))
    n_rows = max(1, CELLS // max(1, len(image)))
    for start in range(0, len(weights), n_rows):
        drawn = weights[start : start + n_rows]
        total = drawn @ mass
        listed = drawn[:, image].astype(np.float64)
        count, found = (np.add.reduceat(part, steps, axis=1) for part in (listed, listed * hit))
        silent = drawn.sum(1, dtype=np.float64) * n_patches - count.sum(1)
        missed = np.maximum(total - found.sum(1), 0)
        count, found = np.insert(count, place, silent, axis=1), np.insert(found, place, missed, axis=1)
        precision = np.cumsum(found, axis=1) / np.maximum(np.cumsum(count, axis=1), 1)
        result[start : start + n_rows] = divide((found * precision).sum(1), total, total > 0)
    return result


def purity(weights: NDArray[np.int16], image: NDArray[np.int64], labels: NDArray[np.bool_], n_top: int) -> Array:
    """[n + 1]: the largest share of the first `n_top` patches that have a label in common.

    Patches that are missing, because fewer are listed, count against it.

    Args:
        image, labels: [k] and [k, C], for each patch, in order, its image and the labels that it has.
    """
    passed = np.cumsum(weights[:, image], axis=1, dtype=np.int64)
    n_needed = 1 + np.count_nonzero((passed < n_top).any(0))
    passed, labels = passed[:, :n_needed], labels[:n_needed]
    taken = np.diff(np.minimum(passed, n_top), axis=1, prepend=0)
    return np.asarray((taken @ labels.astype(np.float64)).max(1, initial=0.0) / n_top)
