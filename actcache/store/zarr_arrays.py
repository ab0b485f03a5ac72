"""A store's arrays through zarr: compressed ones, and those on an object store. Raw local shards: shards.py.

Promise: an array whose metadata are not what the store's settings say is an error, before anything is read of it.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.artifacts import is_remote
from actcache.errors import CorruptError
from actcache.hook_point import HookPoint
from actcache.store.settings import StoreSettings
from actcache.store.shard_files import ARRAYS, ShardFiles, shard_path


class ZarrArrays:
    """Opened as they are asked for."""

    def __init__(self, path: Path, settings: StoreSettings, files: ShardFiles) -> None:
        self._path, self._settings, self._files = path, settings, files
        self._opened: dict[tuple[HookPoint, str], Any] = {}

    def read(self, hook: HookPoint, array: str, shard: int, first: int, out: NDArray[Any], row: int = 0) -> None:
        """Images from `first` of a shard on, tokens from patch row `row` on, as many as `out` [I, T, D] has."""
        layout = self._settings.layout
        start, columns = shard * layout.shard_images + first, row * layout.grid[1]
        part = (slice(start, start + len(out)), slice(columns, columns + out.shape[1]))
        try:
            values = np.asarray(self._open(hook, array)[part[:1] if array == "cls" else part])
        except Exception as error:  # zarr, its codecs and file systems raise what they like
            if isinstance(error, CorruptError):
                raise
            path = shard_path(self._path, hook, array, shard)
            raise self._files.corrupt(path, shard, f"cannot be decoded ({error})") from error
        out[:] = values[:, None] if array == "cls" else values

    def _open(self, hook: HookPoint, array: str) -> Any:
        """The array through zarr, its metadata compared with ours."""
        if (hook, array) not in self._opened:
            import zarr

            source: Any = self._path
            if is_remote(source):
                options = dict(source.storage_options)
                source = zarr.storage.FsspecStore.from_url(str(source), storage_options=options, read_only=True)
            name = f"{ARRAYS}/{hook}/{array}/zarr.json"
            if not is_remote(self._path):
                self._files.check_inside(self._path / name)
            found = zarr.open_array(source, path=f"{ARRAYS}/{hook}/{array}", mode="r")
            planned = zarr.create_array({}, **self._settings.zarr_arguments(array))
            for field in ("shape", "data_type", "chunk_grid", "chunk_key_encoding", "codecs", "fill_value"):
                ours, theirs = getattr(planned.metadata, field), getattr(found.metadata, field, None)
                if ours != theirs:
                    raise CorruptError(
                        f"{name} of {self._path} says {field} {theirs}, expected {ours}. "
                        f"Run `verify {self._path} --repair`."
                    )
            self._opened[hook, array] = found
        return self._opened[hook, array]
