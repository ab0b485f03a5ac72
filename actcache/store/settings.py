"""What a store's settings say: its layout, its hook points, the files of its shards, its zarr arrays.

No file is touched. Settings come from artifact.json and may say anything: what they claim is checked here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actcache.errors import CorruptError
from actcache.hook_point import HookPoint
from actcache.store.codecs import check_codec, check_dtype, zarr_compressor
from actcache.store.layout import StoreLayout
from actcache.store.shard_files import shard_path


def layout_of(settings: Mapping[str, Any]) -> StoreLayout:
    """The layout that a store's settings describe. Raises CorruptError when they describe none."""
    try:
        rows, columns = settings["grid"]
        layout = StoreLayout(
            n_images=settings["n_images"],
            grid=(rows, columns),
            d_model=settings["d_model"],
            n_extra=settings["n_extra"],
            chunk_images=settings["chunk_images"],
            shard_images=settings["shard_images"],
            itemsize=check_dtype(settings["dtype"]).itemsize,
        )
        check_codec(settings["codec"])
        layout.check()
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"These settings describe no store: {error}. See docs/reference/format.md.") from error
    return layout


def expected_files(settings: Mapping[str, Any], shard: int) -> dict[str, int]:
    """Names of a shard's files, relative to the store, and their sizes when stored raw."""
    layout = layout_of(settings)
    return {
        str(shard_path(Path(), hook, array, shard)): layout.shard_bytes(array, shard)
        for hook in hook_points_of(settings)
        for array in layout.arrays()
    }


def hook_points_of(settings: Mapping[str, Any]) -> tuple[HookPoint, ...]:
    """Raises CorruptError when the settings name none."""
    try:
        hooks = tuple(HookPoint.parse(text) for text in settings["hook_points"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"These settings name no hook points: {error}. See docs/reference/format.md.") from error
    if not hooks or len(set(hooks)) < len(hooks):
        raise CorruptError(f"These settings name the hook points {settings['hook_points']}. Expected some, each once.")
    return hooks


def zarr_arguments(settings: Mapping[str, Any], array: str) -> dict[str, Any]:
    """What zarr's create_array is told of one array: all that decides how its bytes are read."""
    layout = layout_of(settings)
    shape = layout.array_shape(array)
    return {
        "shape": shape,
        "dtype": check_dtype(settings["dtype"]),
        "chunks": layout.chunk_shape(array),
        "shards": (layout.shard_images, *shape[1:]),
        "compressors": zarr_compressor(settings["codec"], layout.itemsize),
        "fill_value": 0,
    }
