"""Statistics of single entries: how strong they are (a histogram and its quantiles), and where (a position map).

In: a piece's entries by latent. Out: integer counts over latents, the same however codes are cut into shards. numpy
only.

A bin is a float16's exponent and the first three bits of its mantissa: eight bins per octave from 2^-10 up, and one bin
for everything below. A bin is thus at most an eighth as wide as the values in it, and a quantile, taken at the middle
of its bin, is at most 1/16 (6.25 %) from the true one, or 2^-11 for a quantile below 2^-10.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.reduce import Piece, Statistic, cut_blocks, split_rows
from saetrain import LatentCodes

_SHIFT = 7  # bits of the mantissa that are dropped
_LOWEST = (15 - 10) << (10 - _SHIFT)  # 2^-10
N_BINS = (31 << (10 - _SHIFT)) - _LOWEST + 1

QUANTILES = (0.1, 0.5, 0.9, 0.99)


class EntryCounts(NamedTuple):
    """Counts of the entries of each latent."""

    first_bin: int
    strength: NDArray[np.unsignedinteger]  # [F, bins from first_bin to the last that is used]
    position: NDArray[np.unsignedinteger]  # [F, T] images on which a latent fires at a token; CLS is token 0


class Histogram(NamedTuple):
    """The distribution of the values that each latent takes where it fires."""

    counts: NDArray[np.unsignedinteger]  # [F, B]
    edges: NDArray[np.float32]  # [B + 1]; a value v is in bin b where edges[b] <= v < edges[b + 1]


def entry_counts_statistic() -> Statistic:
    return Statistic(chunk=_hold, combine=_merge, finalize=_trim)


class _Part(NamedTuple):
    """A partial result: the counts of many pieces, and entries that are still to be counted together."""

    n_latents: int
    n_tokens: int
    entries: tuple[LatentCodes, ...]
    counts: tuple[NDArray[np.unsignedinteger], ...] = ()  # [F, N_BINS], [F, T]


def _hold(piece: Piece) -> _Part:
    return _Part(len(piece.latents), piece.codes.n_tokens, (piece.entries,))


def _merge(parts: Sequence[_Part]) -> _Part:
    entries = sum((part.entries for part in parts), ())
    joined = parts[0]._replace(entries=entries, counts=_add([part.counts for part in parts if part.counts]))
    if sum(len(part.row) for part in entries) < joined.n_latents * (joined.n_tokens + N_BINS):
        return joined
    return joined._replace(entries=(), counts=_count(joined))


def _count(part: _Part) -> tuple[NDArray[np.unsignedinteger], ...]:
    """Count all entries. This happens at the latest when all pieces have been seen."""
    cells: tuple[list[NDArray[np.int64]], ...] = ([], [])
    widths = (N_BINS, part.n_tokens)
    for block in (block for entries in part.entries for block in cut_blocks(entries)):
        n_latents = len(block.indptr) - 1
        latent = np.repeat(np.arange(block.first, block.first + n_latents), np.diff(block.indptr))
        _, token = split_rows(block.row, part.n_tokens)
        for column, width, place in zip(cells, widths, (_bins(block.value.view(np.uint16)), token), strict=True):
            column.append(latent * width + place.astype(np.int64))
    counts = []
    for column, width in zip(cells, widths, strict=True):
        n_cells = part.n_latents * width
        joined = np.concatenate(column) if column else np.empty(0, np.int64)
        counts.append(np.bincount(joined, minlength=n_cells).astype(np.uint32).reshape(part.n_latents, width))
    return _add([part.counts, tuple(counts)] if part.counts else [tuple(counts)])


def _add(parts: Sequence[tuple[NDArray[np.unsignedinteger], ...]]) -> tuple[NDArray[np.unsignedinteger], ...]:
    def total(arrays: Sequence[NDArray[np.unsignedinteger]]) -> NDArray[np.unsignedinteger]:
        most = sum(int(array.max(initial=0)) for array in arrays)
        out: NDArray[Any] = arrays[0].astype(np.uint32 if most < 1 << 32 else np.uint64)
        for array in arrays[1:]:
            out += array
        return out

    return tuple(total(arrays) for arrays in zip(*parts, strict=True))


def _trim(part: _Part) -> EntryCounts:
    strength, position = _count(part)
    return EntryCounts(*trim_bins(strength), position)


def trim_bins(strength: NDArray[np.unsignedinteger]) -> tuple[int, NDArray[np.unsignedinteger]]:
    """(the first bin that is used, the counts [F, bins from there to the last that is used]), of [F, N_BINS]."""
    used = np.flatnonzero(strength.any(axis=0))
    first, last = (int(used[0]), int(used[-1])) if len(used) else (0, -1)
    return first, strength[:, first : last + 1].copy()


def join_latents(parts: Sequence[EntryCounts]) -> EntryCounts:
    """Join the counts of consecutive ranges of latents."""
    full = [part for part in parts if part.strength.shape[1]]
    first = min((part.first_bin for part in full), default=0)
    last = max((part.first_bin + part.strength.shape[1] for part in full), default=0)
    dtype = np.result_type(*(part.strength.dtype for part in parts))
    strength = np.zeros((sum(len(part.strength) for part in parts), last - first), dtype)
    row = 0
    for part in parts:
        start, n_latents = part.first_bin - first, len(part.strength)
        if part.strength.shape[1]:
            strength[row : row + n_latents, start : start + part.strength.shape[1]] = part.strength
        row += n_latents
    return EntryCounts(first, strength, np.concatenate([part.position for part in parts]))


def _bins(bits: Any) -> NDArray[np.int16]:
    """The bin of a float16, from its bits; bin numbers fit into 8 bits."""
    bins = (np.asarray(bits) >> np.uint16(_SHIFT)).astype(np.int16) - np.int16(_LOWEST - 1)
    return np.asarray(np.maximum(bins, np.int16(0)))


def to_histogram(counts: EntryCounts) -> Histogram:
    bins = np.arange(counts.first_bin, counts.first_bin + counts.strength.shape[1] + 1)
    bits = (np.minimum(bins + _LOWEST - 1, (31 << (10 - _SHIFT))) << _SHIFT).astype(np.uint16)
    edges = bits.view(np.float16).astype(np.float32)
    return Histogram(counts.strength, np.where(bins == 0, np.float32(0), edges))


def quantiles(histogram: Histogram, shares: Sequence[float]) -> NDArray[np.float64]:
    """[F, len(shares)]: the middle of the bin that holds the quantile of each share.

    It is at most 1/16 from the true quantile (of the inverted distribution function), or 2^-11 below 2^-10, and NaN for
    a latent that never fires.
    """
    running = np.cumsum(histogram.counts, axis=1, dtype=np.int64)
    n_latents = len(running)
    values = np.full((n_latents, len(shares)), np.nan)
    if not running.shape[1]:
        return values
    edges = histogram.edges.astype(np.float64)
    middle = np.where(np.isinf(edges[1:]), 65504.0, (edges[:-1] + edges[1:]) / 2)
    alive = running[:, -1] > 0
    for column, share in enumerate(shares):
        n_below = np.maximum(np.ceil(share * running[:, -1]), 1)
        values[alive, column] = middle[(running < n_below[:, None]).sum(axis=1)[alive]]
    return values
