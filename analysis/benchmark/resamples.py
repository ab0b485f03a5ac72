"""Resamples: bootstrap weights of the judged images, the same for every subject and measure, so differences are paired.

A resample draws as many images as are judged, with replacement, and an image counts as often as it was drawn. The
counts come in blocks: first how many draws fall into each block, then which images of the block they hit. This is the
same multinomial distribution as drawing from all images at once, and no [n, I] array is needed for it.
Source: Efron and Tibshirani 1993, percentile intervals; the paired design is that of Koehn 2004 (EMNLP).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.benchmark.measured import Measured
from analysis.intervals import LEVELS

BLOCK = 1024
"""Images whose weights are drawn together."""
NO_DIFFERENCE = "no difference"
SEEDS = 2**31
"""Number of the stream that draws seeds; those of the blocks of images are smaller."""


@dataclass(frozen=True)
class Resamples:
    """n resamples of `n_images` judged images.

    w = resamples.weights(0, 64)            # [n, 64]: for the first 64 judged images
    sums = w @ per_image_sums               # [n]: their part of a sum on every resample
    """

    n_images: int
    n: int = 200
    seed: int = 0

    def weights(self, start: int, stop: int) -> NDArray[np.int64]:
        """[n, stop - start]: how often each resample holds the judged images number start to stop - 1."""
        if not 0 <= start <= stop <= self.n_images:
            raise IndexError(f"{start} to {stop} does not lie in 0 to {self.n_images}")
        blocks = range(start // BLOCK, -(-stop // BLOCK))
        parts = [_draw_block(self, block) for block in blocks]
        joined = np.concatenate(parts, axis=1) if parts else np.empty((self.n, 0), np.int64)
        return joined[:, start - blocks.start * BLOCK : stop - blocks.start * BLOCK] if parts else joined

    def means(
        self, values: NDArray[np.float64], places: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(means [M], their replicates [n, M]) of numbers that some judged images have, [len(places), M].

        A replicate is NaN where a resample holds none of these images.

        Args:
            places: the numbers of these images among the judged ones, ascending; all of them by default.
        """
        places = np.arange(self.n_images) if places is None else places
        sums, counts = np.zeros((self.n, values.shape[1])), np.zeros(self.n)
        for block in np.unique(places // BLOCK).tolist():
            first, last = np.searchsorted(places, (block * BLOCK, (block + 1) * BLOCK))
            weights = _draw_block(self, block)[:, places[first:last] - block * BLOCK].astype(np.float64)
            sums += weights @ values[first:last]
            counts += weights.sum(1)
        replicates = divide(sums, counts[:, None], counts[:, None] > 0)
        return values.mean(0, dtype=np.float64), replicates

    @cached_property
    def _per_block(self) -> NDArray[np.int64]:
        """[n, blocks]: draws that fall into each block."""
        sizes = np.diff([*range(0, self.n_images, BLOCK), self.n_images])
        return _generator(self.seed, 0).multinomial(self.n_images, sizes / self.n_images, size=self.n)


def divide(a: NDArray[np.float64], b: NDArray[np.float64], where: NDArray[np.bool_]) -> NDArray[np.float64]:
    """a / b where that exists, and NaN elsewhere."""
    quotient: NDArray[np.float64] = np.divide(a, b, out=np.full_like(a, np.nan), where=where)
    return quotient


def _generator(seed: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, number])))


@lru_cache(maxsize=4)
def _draw_block(resamples: Resamples, block: int) -> NDArray[np.int64]:
    size = min(BLOCK, resamples.n_images - block * BLOCK)
    drawn = _generator(resamples.seed, 1 + block).multinomial(resamples._per_block[:, block], np.full(size, 1 / size))
    drawn.setflags(write=False)
    return drawn


def interval(replicates: NDArray[np.float64] | None) -> tuple[float, float] | None:
    """The 95 % percentile interval of a number; None where it has no replicates, or they do not exist."""
    if replicates is None or not np.isfinite(replicates).all():
        return None
    low, high = np.percentile(replicates, LEVELS)
    return float(low), float(high)


def average(seeds: Sequence[Measured], resamples: Resamples) -> Measured | None:
    """The mean of a measure over runs that differ only in their seed; None where one has no value or no replicates.

    Each resample of the images draws the seeds, too, with replacement, so an interval holds what other images and
    other trainings would change (a bootstrap of both levels: Davison and Hinkley 1997, section 3.8). The draws are the
    same for every measure and every group of as many seeds.
    """
    if len(seeds) == 1:
        return seeds[0]
    values = [each.value for each in seeds if each.value is not None]
    columns = [each.replicates for each in seeds if each.replicates is not None]
    if min(len(values), len(columns)) < len(seeds):
        return None
    drawn = _generator(resamples.seed, SEEDS).integers(len(seeds), size=(resamples.n, len(seeds)))
    replicates = np.take_along_axis(np.stack(columns, axis=1), drawn, axis=1).mean(1)
    return Measured(seeds[0].name, float(np.mean(values)), replicates, seeds[0].higher_is_better)


class Compared(NamedTuple):
    """A paired difference, first minus second. `verdict`: `better` or `worse` than the second, or `no difference`."""

    difference: float
    low: float
    high: float
    verdict: str


def compare(first: Measured, second: Measured) -> Compared | None:
    """The difference of two subjects on the same resamples; None where one of them has no value or no interval.

    It is `no difference` where 0 lies inside the interval, its ends included.
    """
    if first.value is None or second.value is None or first.replicates is None or second.replicates is None:
        return None
    span = interval(first.replicates - second.replicates)
    if span is None:
        return None
    low, high = span
    verdict = NO_DIFFERENCE if low <= 0 <= high else "better" if (low > 0) == first.higher_is_better else "worse"
    return Compared(first.value - second.value, low, high, verdict)
