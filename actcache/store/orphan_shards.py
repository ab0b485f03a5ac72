"""Shards without a commit record: left by another writer, or by one that died. They are described as they are.

Their low bits may differ from what would be computed now, and so may the set of images that could not be read.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from actcache.artifacts import FileDigest, crc32c
from actcache.errors import StorageError
from actcache.hook_point import HookPoint
from actcache.store.channel_statistics import ChannelStatistics
from actcache.store.layout import INDEX_ABSENT, StoreLayout
from actcache.store.shard_files import ARRAYS


def digest_shard(path: Path, layout: StoreLayout, array: str, shard: int, codec: str) -> FileDigest:
    """Digest of a shard on disk, with one piece per chunk, as its writer would have recorded it.

    Raises:
        StorageError: it cannot be read, or its index does not match its contents.
    """
    size, n_index = path.stat().st_size, layout.index_bytes(array)
    if path.is_symlink() or not path.is_file() or size <= n_index:
        raise _not_whole(path)
    data = np.memmap(path, dtype=np.uint8, mode="r")
    index = data[-n_index:]
    entries = index[:-4].view("<u8").reshape(-1, 2)
    if codec == "raw" and (entries != layout.raw_index(array, shard)).any():
        raise _not_whole(path)
    entries = entries[entries[:, 0] != INDEX_ABSENT]
    entries = entries[np.argsort(entries[:, 0])]
    edges = [*entries[:, 0].tolist(), size - n_index]
    sound = edges[0] == 0 and all(
        stop - start == n for (start, stop), n in zip(pairwise(edges), entries[:, 1], strict=True)
    )
    if (
        not sound
        or len(entries) != layout.n_blocks(shard) * layout.n_rows(array)
        or crc32c(index[:-4]) != int.from_bytes(index[-4:].tobytes(), "little")
    ):
        raise _not_whole(path)
    pieces = [[stop - start, crc32c(data[start:stop])] for start, stop in pairwise(edges)]
    return {"bytes": size, "pieces": [*pieces, [n_index, crc32c(index)]]}


def _not_whole(path: Path) -> StorageError:
    return StorageError(f"{path} has no commit record and is not complete. Remove it and run the command again.")


def scan_shard(
    store: Path, layout: StoreLayout, hook_points: Sequence[HookPoint], shard: int
) -> tuple[dict[str, dict[str, ChannelStatistics]], list[int]]:
    """Statistics of a shard on disk, read through zarr, and the images that are all zeros, i.e. that failed."""
    import zarr

    images = layout.shard_range(shard)
    group: Any = zarr.open_group(store / ARRAYS, mode="r")
    zeros = np.ones(len(images), dtype=bool)
    arrays = {"patch": "patches", **({"cls": "cls"} if layout.has_cls else {})}
    for hook in hook_points:
        values = group[f"{hook}/{arrays.get('cls', 'patches')}"][images.start : images.stop]
        zeros &= ~values.reshape(len(images), -1).any(1)
    statistics = {
        str(hook): {
            kind: ChannelStatistics.of(
                group[f"{hook}/{array}"][images.start : images.stop][~zeros].reshape(-1, layout.d_model)
            )
            for kind, array in arrays.items()
        }
        for hook in hook_points
    }
    return statistics, (images.start + np.flatnonzero(zeros)).tolist()
