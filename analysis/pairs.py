"""Pairs: a latent and an image it fires on, with what the statistics need to know of both. numpy only.

Codes sorted by latent, then row, make a pair one contiguous run, so pairs cost a few passes of `reduceat`, over blocks
of entries that stay in the processor's cache.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saetrain import CodeStore, LatentCodes, ShardCodes

SCORES = ("mean", "max")

BLOCK_ENTRIES = 1 << 16


class Pairs(NamedTuple):
    """Latents and images they fire on, sorted by latent, then image."""

    latent: NDArray[np.integer[Any]]  # [N] int32, as all counts here
    image: NDArray[np.integer[Any]]  # [N] stored position
    total: NDArray[np.float64]  # [N] sum over the image's tokens; exact
    peak: NDArray[np.float32]  # [N] maximum over the image's tokens
    peak_patch: NDArray[
        np.integer[Any]
    ]  # [N] token of the largest patch value, the first of equals; -1: only CLS fires
    n_above: NDArray[np.integer[Any]]  # [N] tokens above tau
    n_fired: NDArray[np.integer[Any]]  # [N] tokens it fires on
    patch: NDArray[np.float32]  # [N] maximum over the image's patches; 0 when only CLS fires
    cls: NDArray[np.float32]  # [N] activation of CLS
    cls_fires: NDArray[np.bool_]  # [N]


def find_pairs(entries: ShardCodes | LatentCodes, n_tokens: int, *, tau: float = 0.0) -> Pairs:
    """Pairs of one shard. tau: PatchSAE's threshold of a_{i,j}[s] = 1(h > tau)."""
    blocks = [_find_in_block(block, n_tokens, tau) for block in cut_blocks(entries)]
    if not blocks:
        i4, f4 = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32)
        return Pairs(i4, i4, np.empty(0), f4, i4, i4, i4, f4, f4, np.empty(0, dtype=np.bool_))
    return Pairs._make(np.concatenate(column) for column in zip(*blocks, strict=True))


class Block(NamedTuple):
    """Entries of consecutive latents."""

    first: int  # latent
    indptr: NDArray[np.int64]  # [latents + 1], from 0
    row: NDArray[np.unsignedinteger]
    value: NDArray[np.float16]


def cut_blocks(entries: ShardCodes | LatentCodes, size: int = BLOCK_ENTRIES) -> Iterator[Block]:
    """All entries, some whole latents at a time: about `size` of them, or one latent that has more."""
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
    starts = np.empty(len(image), dtype=np.bool_)
    np.not_equal(image[1:], image[:-1], out=starts[1:])
    starts[block.indptr[:-1][np.diff(block.indptr) > 0]] = True
    start = np.flatnonzero(starts)
    value = block.value.astype(np.float64)
    # one number that orders patches by value (bits of a positive float16 are ordered as it is), then by token
    word: Any = np.uint32 if n_tokens <= 1 << 16 else np.uint64
    shift = 16 if n_tokens <= 1 << 16 else 32
    key = (block.value.view(np.uint16).astype(word) << word(shift)) | (word(1 << shift) - token.astype(word))
    cls_fires = token[start] == 0  # CLS is the first token of an image
    key[start[cls_fires]] = 0
    best: NDArray[Any] = np.maximum.reduceat(key, start)
    patch = (best >> word(shift)).astype(np.uint16).view(np.float16).astype(np.float32)
    cls = np.where(cls_fires, value[start], 0.0).astype(np.float32)
    latent = np.diff(np.searchsorted(start, block.indptr))
    return Pairs(
        latent=np.repeat(np.arange(block.first, block.first + len(latent), dtype=np.int32), latent),
        image=image[start].astype(np.int32),
        total=np.add.reduceat(value, start),
        peak=np.maximum(patch, cls),
        peak_patch=np.where(best > 0, (1 << shift) - (best & word((1 << shift) - 1)).astype(np.int64), -1).astype(
            np.int32
        ),
        n_above=np.add.reduceat((value > np.float32(tau)).astype(np.int32), start),
        n_fired=np.diff(np.append(start, len(value))).astype(np.int32),
        patch=patch,
        cls=cls,
        cls_fires=cls_fires,
    )


def split_rows(row: NDArray[Any], n_tokens: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """(image, token) of rows, in their unsigned type: numpy divides these by a constant without dividing."""
    image = row // row.dtype.type(n_tokens)
    return image, row - image * row.dtype.type(n_tokens)


def image_scores(pairs: Pairs, codes: CodeStore, score: str) -> NDArray[np.float64]:
    """Score of each pair: the mean over all encoded tokens of the image (PatchSAE 2.1), or the maximum."""
    if score == "max":
        return pairs.peak.astype(np.float64)
    return pairs.total / tokens_per_image(codes)


def tokens_per_image(codes: CodeStore) -> int:
    """Tokens of an image that were encoded."""
    return {"all": codes.n_tokens, "patch": codes.n_tokens - 1, "cls": 1}[codes.tokens]
