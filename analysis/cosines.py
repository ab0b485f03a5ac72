"""nearest_cosines(): for each direction the most similar directions of a dictionary, block by block. numpy only.

shuffle_channels() gives the dictionary with which the largest cosines are those of chance.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK_ROWS = 256
"""Rows of the cosine matrix that are in memory at once: there is never an (N, M) array."""
_GROUPS = 64


class Nearest(NamedTuple):
    """The nearest directions, most similar first; of equal cosines the lower index comes first."""

    neighbor: NDArray[np.int32]  # [N, m]
    cosine: NDArray[np.float32]  # [N, m]


def nearest_cosines(
    rows: NDArray[np.float32], others: NDArray[np.float32], m: int, *, start: int | None = None, absolute: bool = False
) -> Nearest:
    """The m rows of `others` [M, D] with the largest cosine to each of `rows` [N, D]. All are unit vectors.

    Args:
        start: `rows` are others[start : start + N], and none is its own neighbor.
        absolute: compare |cosine|, so that opposite directions count as similar.
    """
    parts = [
        _nearest_block(rows[first : first + BLOCK_ROWS], others, m, None if start is None else start + first, absolute)
        for first in range(0, len(rows), BLOCK_ROWS)
    ]
    empty = Nearest(np.empty((0, m), dtype=np.int32), np.empty((0, m), dtype=np.float32))
    return Nearest._make(np.concatenate(column) for column in zip(empty, *parts, strict=True))


def shuffle_channels(rows: NDArray[np.float32], seed: int = 0) -> NDArray[np.float32]:
    """The channels of rows [N, D] in another order, the same for all rows: what a best partner is worth by chance.

    The lengths of the rows and the cosines among them stay, but no row has anything to do with another dictionary any
    more. The largest of thousands of cosines is large even so.
    """
    return np.ascontiguousarray(rows[:, np.random.Generator(np.random.Philox(seed)).permutation(rows.shape[1])])


def _nearest_block(
    rows: NDArray[np.float32], others: NDArray[np.float32], m: int, start: int | None, absolute: bool
) -> Nearest:
    """The m-th largest maximum of groups bounds the m-th largest cosine from below, so few more than m are sorted."""
    cosine = rows @ others.T  # [b, M]
    if absolute:
        np.abs(cosine, out=cosine)
    if start is not None:
        own = np.arange(len(rows))
        cosine[own, start + own] = -2.0
    n_others, n_groups = cosine.shape[1], max(_GROUPS, 4 * m)
    maxima = cosine
    if n_others >= 4 * n_groups:
        maxima = cosine[:, : n_others - n_others % n_groups].reshape(len(rows), -1, n_groups).max(axis=1)
    place = maxima.shape[1] - m
    floor = np.partition(maxima, place, axis=1)[:, place] if m else np.full(len(rows), 3.0)
    row, index = np.nonzero(cosine >= floor[:, None])
    value = cosine[row, index]
    order = np.lexsort((index, -value, row))
    row, index, value = row[order], index[order], value[order]
    kept = np.arange(len(row)) - np.searchsorted(row, row) < m
    return Nearest(index[kept].reshape(-1, m).astype(np.int32), value[kept].reshape(-1, m).astype(np.float32))
