"""Whether a disk has room for the shards that are still missing."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from actcache.artifacts import is_remote
from actcache.errors import StorageError
from actcache.store.settings import StoreSettings


def free_bytes(path: Path) -> int | None:
    """Free bytes on the disk of `path`, which need not exist; None on an object store."""
    if is_remote(path):
        return None
    while not path.exists():
        path = path.absolute().parent
    return shutil.disk_usage(path).free


def shard_bytes(settings: StoreSettings, shards: Iterable[int]) -> int:
    """Size of these shards when stored raw; compressed shards are smaller."""
    return sum(sum(settings.shard_files(shard).values()) for shard in shards)


def check_space(path: Path, settings: StoreSettings, shards: Iterable[int]) -> None:
    """Raise StorageError when the disk of `path` has no room for these shards."""
    free, needed = free_bytes(path), shard_bytes(settings, shards)
    if free is not None and settings.codec == "raw" and needed > free:
        raise StorageError(
            f"{path} needs {needed / 1e9:,.2f} GB more, but the disk has only {free / 1e9:,.2f} GB free. "
            "Free space, choose another disk, or store fewer layers or images."
        )
