"""Pairs: a latent and an image it fires on, with what the statistics need to know of both. numpy only.

Codes sorted by latent, then row, make a pair one contiguous run, so pairs cost one pass of `reduceat`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from saetrain import CodeStore, LatentCodes, ShardCodes

SCORES = ("mean", "max")


class Pairs(NamedTuple):
    """Latents and images they fire on, sorted by latent, then image."""

    latent: NDArray[np.int64]  # [N]
    image: NDArray[np.int64]  # [N] stored position
    total: NDArray[np.float64]  # [N] sum over the image's tokens
    peak: NDArray[np.float32]  # [N] maximum over the image's tokens
    peak_patch: NDArray[np.int64]  # [N] token of the largest patch activation; -1 when only CLS fires
    n_above: NDArray[np.int64]  # [N] tokens above tau
    n_fired: NDArray[np.int64]  # [N] tokens it fires on


def find_pairs(shard: ShardCodes | LatentCodes, n_tokens: int, *, tau: float = 0.0) -> Pairs:
    """Pairs of one shard. tau: PatchSAE's threshold of a_{i,j}[s] = 1(h > tau)."""
    latent = np.repeat(np.arange(len(shard.latent_indptr) - 1), np.diff(shard.latent_indptr))
    image, token = np.divmod(shard.row.astype(np.int64), n_tokens)
    value = shard.latent_value.astype(np.float32)
    if not len(latent):
        empty = np.empty(0, dtype=np.int64)
        return Pairs(empty, empty, np.empty(0), np.empty(0, dtype=np.float32), empty, empty, empty)
    changed = (np.diff(latent) != 0) | (np.diff(image) != 0)
    start = np.concatenate([[0], np.flatnonzero(changed) + 1])
    group = np.concatenate([[0], np.cumsum(changed)])
    patch_value = np.where(token > 0, value, -1.0)
    patch_peak = np.maximum.reduceat(patch_value, start)
    is_peak = (patch_value == patch_peak[group]) & (token > 0)
    first = np.flatnonzero(is_peak)[::-1]  # reversed, so that the first token of equal ones is written last
    peak_patch = np.full(len(start), -1)
    peak_patch[group[first]] = token[first]
    return Pairs(
        latent=latent[start],
        image=image[start],
        total=np.add.reduceat(value.astype(np.float64), start),
        peak=np.maximum.reduceat(value, start),
        peak_patch=peak_patch,
        n_above=np.add.reduceat((value > tau).astype(np.int64), start),
        n_fired=np.diff(np.append(start, len(latent))),
    )


def image_scores(pairs: Pairs, codes: CodeStore, score: str) -> NDArray[np.float64]:
    """Score of each pair: the mean over all encoded tokens of the image (PatchSAE 2.1), or the maximum."""
    if score == "max":
        return pairs.peak.astype(np.float64)
    return pairs.total / tokens_per_image(codes)


def tokens_per_image(codes: CodeStore) -> int:
    """Tokens of an image that were encoded."""
    return {"all": codes.n_tokens, "patch": codes.n_tokens - 1, "cls": 1}[codes.tokens]
