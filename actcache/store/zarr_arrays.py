"""Reading arrays through zarr: compressed ones, and those on an object store. For raw local shards see shard_files.py.

Promise: an array whose metadata differ from the store's settings raises an error before any of it is read.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.artifacts import is_remote
from actcache.errors import CorruptError
from actcache.hook_point import HookPoint
from actcache.store.codecs import zarr_compressor
from actcache.store.settings import StoreSettings
from actcache.store.shard_files import ARRAYS, ShardFiles, shard_path


class ZarrArrays:
    """The arrays of a store, each opened when it is first needed."""

    def __init__(self, path: Path, settings: StoreSettings, files: ShardFiles) -> None:
        self._path, self._settings, self._files = path, settings, files
        self._opened: dict[tuple[HookPoint, str], Any] = {}

    def read(self, hook: HookPoint, array: str, shard: int, first: int, out: NDArray[Any], row: int = 0) -> None:
        """Fill `out` [I, T, D], beginning at image `first` of a shard and at patch row `row`."""
        layout = self._settings.layout
        start, columns = shard * layout.shard_images + first, row * layout.grid[1]
        part = (slice(start, start + len(out)), slice(columns, columns + out.shape[1]))
        try:
            values = np.asarray(self._open(hook, array)[part[:1] if array == "cls" else part])
        except Exception as error:  # zarr, its codecs and file systems raise many kinds of errors
            if isinstance(error, CorruptError):
                raise
            path = shard_path(self._path, hook, array, shard)
            raise self._files.corrupt(path, shard, f"cannot be decoded ({error})") from error
        out[:] = values[:, None] if array == "cls" else values

    def _open(self, hook: HookPoint, array: str) -> Any:
        """Open an array and compare its metadata with the settings."""
        if (hook, array) not in self._opened:
            import zarr

            source: Any = self._path
            if is_remote(source):
                options = dict(source.storage_options)
                source = zarr.storage.FsspecStore.from_url(str(source), storage_options=options, read_only=True)
            name = f"{ARRAYS}/{hook}/{array}/zarr.json"
            if not is_remote(self._path):
                self._files.check_inside(self._path / name)
            opened = zarr.open_array(source, path=f"{ARRAYS}/{hook}/{array}", mode="r")
            planned = zarr.create_array({}, **array_arguments(self._settings, array))
            for field in ("shape", "data_type", "chunk_grid", "chunk_key_encoding", "codecs", "fill_value"):
                ours, theirs = getattr(planned.metadata, field), getattr(opened.metadata, field, None)
                if ours != theirs:
                    raise CorruptError(
                        f"{name} of {self._path} has {field} {theirs}, expected {ours}. "
                        f"Run `verify {self._path} --repair`."
                    )
            self._opened[hook, array] = opened
        return self._opened[hook, array]


def array_arguments(settings: StoreSettings, array: str) -> dict[str, Any]:
    """Arguments of zarr's create_array for one array: all that decides how its bytes are read."""
    layout = settings.layout
    shape = layout.array_shape(array)
    return {
        "shape": shape,
        "dtype": settings.stored_dtype,
        "chunks": layout.chunk_shape(array),
        "shards": (layout.shard_images, *shape[1:]),
        "compressors": zarr_compressor(settings.codec, layout.itemsize),
        "fill_value": 0,
    }
