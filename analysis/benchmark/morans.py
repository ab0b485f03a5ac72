"""Moran's I of latents on images: do the patches on which a latent fires lie next to each other?

    I = (P / S) x_c' W x_c / x_c' x_c        Moran's I of one latent on one image

x are the activations on all P patches of the grid, with zeros, and x_c = x - mean x. W links each patch with its 8
neighbors, and S is the number of ordered links. With Q = sum of x_p x_q over neighboring patches p < q,

    x_c' W x_c = 2 Q - 2 mean x sum_p deg(p) x_p + (mean x)^2 S

needs the active patches only. An image counts for a latent if at least 5 patches are active and at most 0.9 P of them,
as in visaebench: fewer have hardly any neighbors, and if nearly all are active, there is no place to speak of.

If the activations were put on random patches, the expectation of I would be -1 / (P - 1) exactly. The variance of I
under such permutations is known in closed form.

Sources: Moran 1950; Cliff and Ord 1981, Spatial Processes, for both moments under randomization.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.reduce import cut_blocks, split_rows
from saetrain import LatentCodes

LEAST_PATCHES, MOST_SHARE = 5, 0.9
LEAST_IMAGES = 10
"""A latent counts if it has as many images; with fewer, its mean says little, and a resample may hold none of them."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """Patches in rows and columns, each of which neighbors the 8 around it."""

    n_rows: int
    n_columns: int

    @property
    def n_patches(self) -> int:
        return self.n_rows * self.n_columns

    @property
    def most(self) -> int:
        """The largest number of active patches at which an image counts."""
        return int(MOST_SHARE * self.n_patches)

    @property
    def null(self) -> float:
        """The expectation of I if the activations were put on random patches."""
        return -1 / (self.n_patches - 1)

    @cached_property
    def degree(self) -> Array:
        """[P]: the number of neighbors of each patch."""
        down, across = (np.convolve(np.ones(n), np.ones(3))[1 : n + 1] for n in (self.n_rows, self.n_columns))
        return (np.outer(down, across) - 1).reshape(-1)


class Morans(NamedTuple):
    """Moran's I of pairs of a latent and an image, sorted by latent, then image."""

    latent: NDArray[np.int64]
    image: NDArray[np.int64]
    moran: Array
    variance: Array  # of I, if the activations of the image were put on random patches


def find_morans(entries: LatentCodes, n_tokens: int, grid: Grid, counted: NDArray[np.bool_]) -> Morans:
    """Moran's I of every pair that has enough active patches, and not too many.

    Args:
        entries: of one shard. counted: [I], the images that are looked at.
    """
    parts = [_find_in_block(block.first, block.indptr, block.row, block.value, n_tokens, grid, counted)
             for block in cut_blocks(entries)]  # fmt: skip
    return Morans._make(np.concatenate(column) for column in zip(_NONE, *parts, strict=True))


_NONE = Morans(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty(0))


def _find_in_block(
    first: int, indptr: NDArray[np.int64], row: NDArray[np.unsignedinteger], value: NDArray[np.float16],
    n_tokens: int, grid: Grid, counted: NDArray[np.bool_],
) -> Morans:  # fmt: skip
    image, token = split_rows(row, n_tokens)
    used = (token > 0) & counted[image]
    latent = np.repeat(np.arange(first, first + len(indptr) - 1), np.diff(indptr))[used]
    image, patch, x = image[used].astype(np.int64), token[used].astype(np.int64) - 1, value[used].astype(np.float64)
    if not len(x):
        return _NONE
    start = np.flatnonzero(np.r_[True, (image[1:] != image[:-1]) | (latent[1:] != latent[:-1])])
    n_active = np.diff(np.r_[start, len(x)])
    enough = (n_active >= LEAST_PATCHES) & (n_active <= grid.most)
    if not enough.any():
        return _NONE
    kept = np.repeat(enough, n_active)
    latent, image, n_active = latent[start[enough]], image[start[enough]], n_active[enough]
    index, variance = measure_morans(patch[kept], x[kept], n_active, grid)
    return Morans(latent, image, index, variance)


def measure_morans(patch: NDArray[np.int64], x: Array, n_active: NDArray[np.int64], grid: Grid) -> tuple[Array, Array]:
    """(I [N], its variance under permutations of the patches [N]) of N pairs.

    Args:
        patch: [n] row * n_columns + column of the active patches, ascending within each pair.
        x: [n] their activations. n_active: [N] active patches of each pair; at least one, and not all of P >= 4.
    """
    n_patches, degree = grid.n_patches, grid.degree
    linked = x * _sum_later_neighbors(patch, x, n_active, grid)
    start = np.cumsum(n_active) - n_active
    sums = np.add.reduceat(np.stack([x, x**2, x**3, x**4, degree[patch] * x, linked]), start, axis=1)
    s1, s2, s3, s4, by_degree, q = sums
    mean, n_links = s1 / n_patches, degree.sum()
    m2 = s2 / n_patches - mean**2
    index = (2 * q - 2 * mean * by_degree + mean**2 * n_links) / (n_links * m2)
    m4 = (s4 - 4 * mean * s3 + 6 * mean**2 * s2) / n_patches - 3 * mean**4
    return index, _randomization_variance(m4 / m2**2, grid)


def _sum_later_neighbors(patch: NDArray[np.int64], x: Array, n_active: NDArray[np.int64], grid: Grid) -> Array:
    """[n]: for each active patch, the sum over its active neighbors that come later in the raster: four at most.

    The right neighbor is the next entry, if it is active. The three neighbors below have consecutive numbers, so one
    search finds the first that is active, and the others follow it.
    """
    width = grid.n_columns
    stride = grid.n_patches + width + 2  # no neighbor of a pair's last patch is a patch of the next pair
    key = np.repeat(np.arange(len(n_active)) * stride, n_active) + patch
    column = patch % width
    beyond = np.full(3, len(n_active) * stride)
    keys, values = np.r_[key, beyond], np.r_[x, np.zeros(3)]
    right = (keys[1 : len(key) + 1] == key + 1) & (column + 1 < width)
    sums = np.where(right, values[1 : len(key) + 1], 0.0)
    below = np.searchsorted(key, key + (width - 1))
    for shift in range(3):
        step = keys[below + shift] - key - width  # -1, 0 and 1 are the columns to the left, the same, to the right
        near = (np.abs(step) <= 1) & (column + step >= 0) & (column + step < width)
        sums += np.where(near, values[below + shift], 0.0)
    return sums


def _randomization_variance(kurtosis: Array, grid: Grid) -> Array:
    """Variance of I over all permutations of the values over the patches (Cliff and Ord 1981, equation 1.44).

    Args:
        kurtosis: [N] fourth central moment over the squared second one.
    """
    n, degree = grid.n_patches, grid.degree
    s0 = degree.sum()
    s1, s2 = 2 * s0, 4 * np.square(degree).sum()
    first = n * ((n**2 - 3 * n + 3) * s1 - n * s2 + 3 * s0**2)
    second = (n**2 - n) * s1 - 2 * n * s2 + 6 * s0**2
    squared = (first - kurtosis * second) / ((n - 1) * (n - 2) * (n - 3) * s0**2)
    variance: Array = squared - 1 / (n - 1) ** 2
    return variance
