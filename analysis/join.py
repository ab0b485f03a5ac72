"""Codes, cut as the activations were cut, as dask tasks: one a shard.

Tasks carry a path and a shard number, never an array; each opens the codes itself. So the graph is small, a task can be
retried, and the same code runs on threads or on any dask cluster that sees the files.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
from dask.delayed import Delayed

from actcache import Artifact, check_parent, open_artifact
from saetrain import CodeStore


def map_shards(codes: CodeStore, function: Callable[[CodeStore, int], Any]) -> list[Delayed]:
    """One lazy `function(codes, shard)` a shard, in shard order."""
    task = dask.delayed(_open_and_apply, pure=False)
    return [task(str(codes.path.absolute()), shard, function) for shard in range(codes.n_shards)]


def _open_and_apply(path: str, shard: int, function: Callable[[CodeStore, int], Any]) -> Any:
    return function(CodeStore.open(path), shard)


def find_images(codes: CodeStore, *, images: str | Path | None = None, store: str | Path | None = None) -> Path | None:
    """Where the codes' images lie (a folder, a table, a tar), or None when it cannot be found.

    Args:
        images: the path, where the caller knows it.
        store: the activation store the codes were made from, where it moved.

    Raises:
        ParentMismatchError: `store` is not that store.
    """
    if images is not None:
        return Path(images)
    artifact: Artifact = codes.artifact
    if store is not None:
        artifact = open_artifact(store, "acts", complete=True)
        check_parent(codes.artifact, "store", artifact)
    folder = artifact.parent_path("images")
    return folder if folder.exists() else None
