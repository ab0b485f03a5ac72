"""Statistics of some images of a store: commit records where a shard is whole, its rows where it is cut.

In: a store or several, a hook point, a kind of token, and images. Out: ChannelStatistics, as if all rows had been read.
The sums of the whole store are known; what is not wanted is taken off, or what is wanted is added up, whichever of the
two lies in fewer rows of a shard. Without a filter, that is one shard for each store.
"""

from collections.abc import Iterator
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.artifacts import read_record
from actcache.hook_point import HookPoint
from actcache.store.channel_statistics import ChannelStatistics
from actcache.store.group import StoreGroup
from actcache.store.layout import Tokens
from actcache.store.reader import ActivationStore

CONDITION = 1e8
"""Sums are added up anew where a sum of squares would shrink by more than this: 1e8 costs half of the digits."""

_BLOCKS = 4
"""Blocks of images that are read at a time: 4 x 64 images of ViT-B/16 take 77 MB."""


def statistics_of_images(
    stores: StoreGroup, layer: int | HookPoint | None, tokens: Tokens, images: NDArray[np.int64]
) -> ChannelStatistics:
    """Statistics of the stored values of some images, given as ascending positions over all stores. Images that could
    not be read do not count.

    Raises CorruptError for a shard or record that is damaged.
    """
    parts, tokens = [], stores.layout.token_kind(tokens)
    for start, member in zip(stores.starts.tolist(), stores.stores, strict=False):
        wanted = np.zeros(member.n_images, dtype=bool)
        mine = images[(images >= start) & (images < start + member.n_images)] - start
        wanted[mine] = True
        parts.append(_of_store(member, member.hook_point(layer), tokens, wanted & member.valid))
    return reduce(ChannelStatistics.__add__, parts)


def _of_store(store: ActivationStore, hook: HookPoint, tokens: Tokens, wanted: NDArray[np.bool_]) -> ChannelStatistics:
    whole = store.statistics(hook, tokens)
    left, added = whole, _nothing(store)
    for shard, kept, unwanted in _split(store, wanted):
        if not len(unwanted):
            continue
        if len(unwanted) <= len(kept):
            left = _without(left, _of_rows(store, hook, tokens, unwanted))
        else:
            left = _without(left, _of_record(store, shard, hook, tokens))
            added += _of_rows(store, hook, tokens, kept)
    total = left + added
    if (whole.sum_squares > CONDITION * total.sum_squares).any():  # rounding would show
        total = _nothing(store)
        for shard, kept, unwanted in _split(store, wanted):
            total += _of_rows(store, hook, tokens, kept) if len(unwanted) else _of_record(store, shard, hook, tokens)
    return total


def _split(
    store: ActivationStore, wanted: NDArray[np.bool_]
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """(shard, its wanted images, its other images that could be read)."""
    for shard in range(store.layout.n_shards):
        images = np.array(store.layout.shard_range(shard), dtype=np.int64)
        images = images[store.valid[images]]
        yield shard, images[wanted[images]], images[~wanted[images]]


def _nothing(store: ActivationStore) -> ChannelStatistics:
    width = store.layout.d_model
    return ChannelStatistics(0, np.zeros(width), np.zeros(width), 0.0)


def _without(total: ChannelStatistics, part: ChannelStatistics) -> ChannelStatistics:
    """What is left; its absmax is a bound."""
    return ChannelStatistics(
        total.count - part.count, total.sum - part.sum, total.sum_squares - part.sum_squares, total.absmax
    )


def _of_record(store: ActivationStore, shard: int, hook: HookPoint, tokens: Tokens) -> ChannelStatistics:
    kinds: Any = read_record(store.path, shard)["statistics"][str(hook)]
    parts = [ChannelStatistics.from_json(kinds[kind]) for kind in ("cls", "patch") if tokens in ("all", kind)]
    return reduce(ChannelStatistics.__add__, parts)


def _of_rows(store: ActivationStore, hook: HookPoint, tokens: Tokens, images: NDArray[np.int64]) -> ChannelStatistics:
    total, step = _nothing(store), _BLOCKS * store.layout.chunk_images
    for first in range(0, len(images), step):
        rows = store.read(hook, images=images[first : first + step], tokens=tokens)
        total += ChannelStatistics.of(rows.reshape(-1, rows.shape[-1]))
    return total
