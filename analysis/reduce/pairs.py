"""Pairs: a latent and an image on which it fires, with what the statistics need to know about both. numpy only.

In codes that are sorted by latent and then by row, a pair is one contiguous run. Its sums are differences of running
sums, computed over blocks of entries that stay in the processor's cache. Values are summed as whole numbers of 2^-24,
the smallest float16.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from saetrain import CodeStore, LatentCodes, ShardCodes

BLOCK_ENTRIES = 1 << 16

UNIT = 2.0**-24
"""The smallest float16; every other float16 is a multiple of it."""


class Pairs(NamedTuple):
    """Latents and the images on which they fire, sorted by latent, then image."""

    latent: NDArray[np.integer[Any]]  # [N] int32, as are all counts here
    image: NDArray[np.integer[Any]]  # [N] stored position
    total: NDArray[np.float64]  # [N] sum over the image's tokens; exact
    peak: NDArray[np.float32]  # [N] maximum over the image's tokens
    peak_patch: NDArray[np.integer[Any]]  # [N] token of the largest patch value (the first if tied); -1: only CLS fires
    n_above: NDArray[np.integer[Any]]  # [N] tokens above tau
    n_fired: NDArray[np.integer[Any]]  # [N] tokens on which it fires
    patch: NDArray[np.float32]  # [N] maximum over the image's patches; 0 when only CLS fires
    cls: NDArray[np.float32]  # [N] activation of CLS
    cls_fires: NDArray[np.bool_]  # [N]


C = TypeVar("C", bound=tuple[Any, ...])


def join_columns(parts: Sequence[C]) -> C:
    """Join tables end to end, each a tuple of columns or a named tuple of columns."""
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return cast(C, getattr(type(parts[0]), "_make", tuple)(columns))


def find_pairs(entries: ShardCodes | LatentCodes, n_tokens: int, *, tau: float = 0.0) -> Pairs:
    """Find the pairs of one shard. tau: PatchSAE's threshold in a_{i,j}[s] = 1(h > tau)."""
    blocks = [_find_in_block(block, n_tokens, tau) for block in cut_blocks(entries)]
    if not blocks:
        i4, f4 = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32)
        return Pairs(i4, i4, np.empty(0), f4, i4, i4, i4, f4, f4, np.empty(0, dtype=np.bool_))
    return blocks[0] if len(blocks) == 1 else join_columns(blocks)


class Block(NamedTuple):
    """Entries of consecutive latents."""

    first: int  # latent
    indptr: NDArray[np.int64]  # [latents + 1], from 0
    row: NDArray[np.unsignedinteger]
    value: NDArray[np.float16]


def cut_blocks(entries: ShardCodes | LatentCodes, size: int = BLOCK_ENTRIES) -> Iterator[Block]:
    """Yield all entries in blocks of whole latents, with about `size` entries each; one latent may have more."""
    indptr = entries.latent_indptr
    cuts = np.searchsorted(indptr, np.arange(0, indptr[-1], size))
    edges = np.unique([*cuts, len(indptr) - 1])
    for first, last in pairwise(edges.tolist()):
        start, stop = int(indptr[first]), int(indptr[last])
        if start < stop:
            yield Block(
                first, indptr[first : last + 1] - start, entries.row[start:stop], entries.latent_value[start:stop]
            )


def _find_in_block(block: Block, n_tokens: int, tau: float) -> Pairs:
    image, token = split_rows(block.row, n_tokens)
    start = _find_starts(block, image)
    stop = np.append(start[1:], len(image))
    bits = block.value.view(np.uint16)
    # one number that orders patches by value, then by token: the bits of positive float16 are ordered as their values
    word: Any = np.uint32 if n_tokens <= 1 << 16 else np.uint64
    shift = 16 if n_tokens <= 1 << 16 else 32
    key = (bits.astype(word) << word(shift)) | (word(1 << shift) - token.astype(word))
    cls_fires = token[start] == 0  # CLS is the first token of an image
    key[start[cls_fires]] = 0
    best: NDArray[Any] = np.maximum.reduceat(key, start)
    patch = (best >> word(shift)).astype(np.uint16).view(np.float16).astype(np.float32)
    cls = np.where(cls_fires, block.value[start], np.float16(0)).astype(np.float32)
    n_pairs = np.diff(np.searchsorted(start, block.indptr))
    return Pairs(
        latent=np.repeat(np.arange(block.first, block.first + len(n_pairs), dtype=np.int32), n_pairs),
        image=image[start].astype(np.int32),
        total=_sum_runs(_to_units(block.value), stop) * UNIT,
        peak=np.maximum(patch, cls),
        peak_patch=np.where(best > 0, (1 << shift) - (best & word((1 << shift) - 1)).astype(np.int64), -1).astype(
            np.int32
        ),
        n_above=_sum_runs(bits > last_bits(tau), stop, np.int32),
        n_fired=(stop - start).astype(np.int32),
        patch=patch,
        cls=cls,
        cls_fires=cls_fires,
    )


def _find_starts(block: Block, image: NDArray[Any]) -> NDArray[np.int64]:
    """The entries at which the pairs of a block begin."""
    new = np.empty(len(image), dtype=np.bool_)
    np.not_equal(image[1:], image[:-1], out=new[1:])
    new[block.indptr[:-1][np.diff(block.indptr) > 0]] = True
    return np.flatnonzero(new)


def _to_units(value: NDArray[np.float16]) -> NDArray[np.int64]:
    """Values as whole numbers of 2^-24; they are below 2^40."""
    return (value.astype(np.float64) / UNIT).astype(np.int64)


def _sum_runs(values: NDArray[Any], stop: NDArray[np.int64], dtype: Any = np.int64) -> NDArray[Any]:
    """Exact sums of consecutive runs, each ending before `stop`, in a third of the time of `np.add.reduceat`."""
    sums: NDArray[Any] = np.cumsum(values, dtype=dtype)[stop - 1]
    sums[1:] -= sums[:-1].copy()
    return sums


def last_bits(tau: float) -> int:
    """Bits of the largest float16 that is not above a threshold (as float32); -1 if every active value is above."""
    if tau < 0:
        return -1
    with np.errstate(over="ignore"):
        near = np.float16(np.float32(abs(tau)))  # minus zero must give the bits of zero, too
    return int(near.view(np.uint16)) - int(near > np.float32(tau))


def sum_images(entries: LatentCodes, n_tokens: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.int64]]:
    """(latent, image, total): three columns of `find_pairs`, with the total in units of 2^-24."""
    parts: list[tuple[NDArray[Any], NDArray[Any], NDArray[np.int64]]] = []
    for block in cut_blocks(entries):
        image, _ = split_rows(block.row, n_tokens)
        start = _find_starts(block, image)
        n_pairs = np.diff(np.searchsorted(start, block.indptr))
        latent = np.repeat(np.arange(block.first, block.first + len(n_pairs), dtype=np.int32), n_pairs)
        total = _sum_runs(_to_units(block.value), np.append(start[1:], len(image)))
        parts.append((latent, image[start], total))
    if not parts:
        return np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int64)
    return join_columns(parts)


@dataclass(frozen=True)
class Piece:
    """Entries of consecutive latents in one shard, as a statistic sees them. The first latent has number 0.

    Attributes:
        shard: the number of the shard.
        latents: which of all latents these are.
        entries: their entries.
        tau: the threshold that `Pairs.n_above` counts against.
    """

    codes: CodeStore
    shard: int
    latents: range
    entries: LatentCodes
    tau: float = 0.0

    @cached_property
    def pairs(self) -> Pairs:
        return find_pairs(self.entries, self.codes.n_tokens, tau=self.tau)


def split_rows(row: NDArray[Any], n_tokens: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """(image, token) of rows, in their unsigned type, because numpy divides these by a constant without dividing."""
    image = row // row.dtype.type(n_tokens)
    return image, row - image * row.dtype.type(n_tokens)


def image_scores(pairs: Pairs, codes: CodeStore, score: str) -> NDArray[np.float64]:
    """The score of each pair: the mean over all encoded tokens of the image (PatchSAE 2.1), or the maximum."""
    if score == "max":
        return pairs.peak.astype(np.float64)
    return pairs.total / tokens_per_image(codes)


def tokens_per_image(codes: CodeStore) -> int:
    """The number of tokens of an image that were encoded."""
    return {"all": codes.n_tokens, "patch": codes.n_tokens - 1, "cls": 1}[codes.tokens]
