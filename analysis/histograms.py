"""Statistics of single entries: how strong (a histogram, hence quantiles) and where in the image (a position map).

numpy only. In: a shard's entries by latent. Out: integer counts over latents, equal for every cut into shards.

A bin is a float16's exponent and the first three bits of its mantissa: eight bins an octave from 2^-10 up, and one for
all below. So a bin's width is at most an eighth of the values in it, and a quantile, taken at the middle of its bin, is
at most 1/16 (6.25 %) from the true one, or 2^-11 where it lies below 2^-10.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.pairs import Pairs, cut_blocks, split_rows
from analysis.reduction import Statistic
from saetrain import CodeStore

_SHIFT = 7  # bits of the mantissa that are left out
_LOWEST = (15 - 10) << (10 - _SHIFT)  # 2^-10
N_BINS = (31 << (10 - _SHIFT)) - _LOWEST + 1

QUANTILES = (0.1, 0.5, 0.9, 0.99)


class EntryCounts(NamedTuple):
    """Counts of one or many shards, as small as they go: 49,152 latents take 10-30 MB each."""

    first_bin: int
    strength: NDArray[np.unsignedinteger]  # [F, bins from first_bin to the last that is not empty]
    position: NDArray[np.unsignedinteger]  # [F, T]: images on which the latent fires at a token; CLS is token 0


class Histogram(NamedTuple):
    """Of the values a latent takes where it fires."""

    counts: NDArray[np.unsignedinteger]  # [F, B]
    edges: NDArray[np.float32]  # [B + 1]; a value v is in bin b where edges[b] <= v < edges[b + 1]


def entry_counts_statistic() -> Statistic:
    return Statistic(chunk=_count, combine=_add, finalize=_identity)


def _identity(value: EntryCounts) -> EntryCounts:
    return value


def _count(codes: CodeStore, number: int, pairs: Pairs) -> EntryCounts:
    entries = codes.read_by_latent(number)
    n_images = len(codes.shard_range(number))
    if not len(entries.row):
        return EntryCounts(0, np.zeros((codes.n_latents, 0), np.uint32), _no_positions(codes, n_images))
    first, last = (_bins(extreme(entries.latent_value.view(np.uint16)))[()] for extreme in (np.min, np.max))
    n_bins = int(last) - int(first) + 1
    strength = np.zeros((codes.n_latents, n_bins), np.uint32)
    position = _no_positions(codes, n_images)
    for block in cut_blocks(entries):
        n_latents = len(block.indptr) - 1
        latent = np.repeat(np.arange(n_latents), np.diff(block.indptr))
        _, token = split_rows(block.row, codes.n_tokens)
        part = slice(block.first, block.first + n_latents)
        for out, place in ((strength, _bins(block.value.view(np.uint16)) - first), (position, token)):
            counts = np.bincount(latent * out.shape[1] + place.astype(np.int64), minlength=n_latents * out.shape[1])
            out[part] = counts.reshape(n_latents, -1)
    return EntryCounts(int(first), strength, position)


def _bins(bits: Any) -> NDArray[np.int16]:
    """Bin of a float16 by its bits; the numbers fit into 8 bits."""
    bins = (np.asarray(bits) >> np.uint16(_SHIFT)).astype(np.int16) - np.int16(_LOWEST - 1)
    found: NDArray[np.int16] = np.maximum(bins, np.int16(0))
    return found


def _no_positions(codes: CodeStore, n_images: int) -> NDArray[np.unsignedinteger]:
    return np.zeros((codes.n_latents, codes.n_tokens), np.uint16 if n_images < 1 << 16 else np.uint32)


def _add(parts: Sequence[EntryCounts]) -> EntryCounts:
    full = [part for part in parts if part.strength.shape[1]]
    first = min((part.first_bin for part in full), default=0)
    last = max((part.first_bin + part.strength.shape[1] for part in full), default=0)
    most = sum(int(part.strength.max(initial=0)) for part in parts)
    strength = np.zeros((len(parts[0].strength), last - first), np.uint32 if most < 1 << 32 else np.uint64)
    for part in full:
        start = part.first_bin - first
        strength[:, start : start + part.strength.shape[1]] += part.strength
    most = sum(int(part.position.max(initial=0)) for part in parts)
    position: NDArray[Any] = parts[0].position.astype(np.uint16 if most < 1 << 16 else np.uint32)
    for part in parts[1:]:
        position += part.position
    return EntryCounts(first, strength, position)


def to_histogram(counts: EntryCounts) -> Histogram:
    bins = np.arange(counts.first_bin, counts.first_bin + counts.strength.shape[1] + 1)
    bits = (np.minimum(bins + _LOWEST - 1, (31 << (10 - _SHIFT))) << _SHIFT).astype(np.uint16)
    edges = bits.view(np.float16).astype(np.float32)
    return Histogram(counts.strength, np.where(bins == 0, np.float32(0), edges))


def quantiles(histogram: Histogram, shares: Sequence[float]) -> NDArray[np.float64]:
    """[F, len(shares)]: the middle of the bin that holds the value below or at which a share of them lies.

    At most 1/16 from the true quantile (of the inverted distribution function), or 2^-11 below 2^-10; NaN for a latent
    that never fires.
    """
    running = np.cumsum(histogram.counts, axis=1, dtype=np.int64)
    n_latents = len(running)
    found = np.full((n_latents, len(shares)), np.nan)
    if not running.shape[1]:
        return found
    edges = histogram.edges.astype(np.float64)
    middle = np.where(np.isinf(edges[1:]), 65504.0, (edges[:-1] + edges[1:]) / 2)
    alive = running[:, -1] > 0
    for column, share in enumerate(shares):
        wanted = np.maximum(np.ceil(share * running[:, -1]), 1)
        found[alive, column] = middle[(running < wanted[:, None]).sum(axis=1)[alive]]
    return found
