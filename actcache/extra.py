"""Prompt tokens of an adapted model's store: what later blocks need, and nobody else reads.

In: a store, images. Out: the array `extra` of a hook point, [I, n_extra, D].
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.group import StoreGroup
from actcache.hook_point import HookPoint
from actcache.store import ActivationStore


def read_extra(
    store: ActivationStore | StoreGroup,
    layer: int | HookPoint | None = None,
    *,
    images: slice | Sequence[int] | NDArray[np.integer] = slice(None),
) -> NDArray[Any]:
    """The prompt tokens behind the patches, [I, n_extra, D] in the store's dtype; of a plain model [I, 0, D].

    Args:
        images: stored positions, in any order.

    Raises:
        CorruptError: a shard is missing or short.
    """
    chosen = np.arange(store.n_images)[images]
    out = np.empty((len(chosen), store.layout.n_extra, store.layout.d_model), dtype=store.dtype)
    if not store.layout.n_extra:
        return out
    members = store.stores if isinstance(store, StoreGroup) else (store,)
    first = 0
    for member in members:
        size = member.layout.chunk_images
        chunk = np.empty((size, member.layout.n_extra, member.layout.d_model), dtype=member.dtype)
        mine = np.flatnonzero((chosen >= first) & (chosen < first + member.n_images))
        blocks, rows = np.divmod(chosen[mine] - first, size)
        for block in np.unique(blocks).tolist():
            member.read_chunk(layer, block, 0, chunk, array="extra")
            out[mine[blocks == block]] = chunk[rows[blocks == block]]
        first += member.n_images
    return out
