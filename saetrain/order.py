"""Which rows come when: pure functions of (seed, epoch, window). No files, no torch.

An epoch visits every training row once. Blocks of images are permuted, as many as fit the pool form a window, and the
rows of a window are permuted; batches are cut from that stream and the partial last one is dropped. When all rows fit
the pool, this is one full permutation.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

HELD_OUT_SHARE = 0.05


def split_images(n_images: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training, held-out) images of stores with so many images each, numbered over all: each gives its last 5 %."""
    starts = np.cumsum([0, *n_images[:-1]])

    def gather(part: Callable[[int], range]) -> NDArray[np.int64]:
        return np.concatenate([s + np.array(part(n), dtype=np.int64) for s, n in zip(starts, n_images, strict=True)])

    return gather(train_images), gather(held_out_images)


def train_images(n_images: int) -> range:
    """All stored images but the last 5 % (at least one): the stored order is random already."""
    return range(n_images - n_held_out(n_images))


def held_out_images(n_images: int) -> range:
    """The last 5 % of the stored order; nothing is trained on them."""
    return range(n_images - n_held_out(n_images), n_images)


def n_held_out(n_images: int) -> int:
    return min(n_images - 1, max(1, round(HELD_OUT_SHARE * n_images)))


def plan_windows(
    blocks: Sequence[NDArray[np.int64]],
    *,
    tokens_per_image: int,
    block_images: int,
    pool_tokens: int,
    seed: int,
    epoch: int,
) -> list[NDArray[np.int64]]:
    """Images of each window of an epoch; every image is in exactly one.

    Args:
        blocks: images to visit, in parts that are read together.
        block_images: images of a whole block (a store's chunk_images).
    """
    order = _generator(seed, epoch).permutation(len(blocks))
    per_window = max(1, pool_tokens // (tokens_per_image * block_images))
    if sum(map(len, blocks)) * tokens_per_image <= pool_tokens:  # also where the last block is short
        per_window = len(blocks)
    return [
        np.concatenate([blocks[b] for b in order[first : first + per_window]])
        for first in range(0, len(order), per_window)
    ]


def window_order(n_rows: int, *, seed: int, epoch: int, window: int) -> NDArray[np.int64]:
    """Permutation of a window's rows."""
    return _generator(seed, epoch, 1 + window).permutation(n_rows)


def _generator(*words: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))
