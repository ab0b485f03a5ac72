"""Kernels of the loader: which rows a window contains, and their copy into a batch.

A row is copied as words of 8 bytes, whatever its values are, so that the result is that of `torch.index_select`. The
bookkeeping is done here too, because between two batches it is in no cache: the same in numpy took about 0.2 of the
1.7 seconds of processor time of a million rows (2 cores AMD EPYC, AVX2).
"""

import numpy as np
from numpy.typing import NDArray

from actcache.compiler import compiled


@compiled
def list_rows(
    images: NDArray[np.int64], inside: NDArray[np.int64], edge: NDArray[np.int64], per_image: NDArray[np.int64],
    first_token: NDArray[np.int64], skip: NDArray[np.int64], stop: NDArray[np.int64], offset: NDArray[np.int64],
    out: NDArray[np.int64],
) -> None:  # fmt: skip
    """List the rows of units as (place, image, token).

    Args:
        images: [I] stored positions.
        inside: [I] the place of each of these images in its block.
        edge: [U] index in `images` of the first image of a unit.
        per_image: [U] tokens of an image in a unit.
        first_token: [U] number of the first of these tokens.
        skip, stop: [U] the rows of each unit that are listed.
        offset: [U] the place of the first row of a unit.
        out: [sum of stop - skip, 3].
    """
    at = 0
    for unit in range(len(edge)):
        n = per_image[unit]
        for row in range(skip[unit], stop[unit]):
            column = row % n
            image = edge[unit] + row // n
            out[at, 0] = offset[unit] + inside[image] * n + column
            out[at, 1] = images[image]
            out[at, 2] = first_token[unit] + column
            at += 1


@compiled
def order_rows(rows: NDArray[np.int64], order: NDArray[np.int64], out: NDArray[np.int64]) -> None:
    """Put row order[i] of `rows` [n, 3] at place i of `out` [n, 3]. numpy calls memmove for each row of 24 bytes."""
    for i in range(len(order)):
        row = order[i]
        out[i, 0] = rows[row, 0]
        out[i, 1] = rows[row, 1]
        out[i, 2] = rows[row, 2]


@compiled
def draw_rows(
    source: NDArray[np.uint64], drawn: NDArray[np.int64], first: int, n: int, target: NDArray[np.uint64],
    numbers: NDArray[np.int64], at: int,
) -> None:  # fmt: skip
    """Draw the rows first..first + n in their order, and put them at at..at + n of a batch.

    Two rows are copied side by side, so that the processor waits for both at once: 1.85 against 1.44 million rows of
    1,536 bytes/s with one core, 3.3 against 2.7 with two (2 cores AMD EPYC, AVX2).

    Args:
        source: [N, W].
        drawn: [M, 3] rows as (place in `source`, image, token).
        target: [B, W].
        numbers: [2, B] the image and the token of each row of the batch.
    """
    n_words = source.shape[1]
    half = n // 2
    for i in range(n):
        numbers[0, at + i] = drawn[first + i, 1]
        numbers[1, at + i] = drawn[first + i, 2]
    for i in range(half):
        near, near_target = source[drawn[first + i, 0]], target[at + i]
        far, far_target = source[drawn[first + half + i, 0]], target[at + half + i]
        for j in range(n_words):
            near_target[j] = near[j]
            far_target[j] = far[j]
    if n % 2:
        last, last_target = source[drawn[first + n - 1, 0]], target[at + n - 1]
        for j in range(n_words):
            last_target[j] = last[j]
