"""Writing codes: the settings of a code store, and its shards, each committed when it is finished.

The layout is described in store.py. The directory of a shard appears by one rename, then its commit record is written.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from numpy.typing import NDArray

from actcache import HookPoint
from actcache.artifacts import Artifact, file_digest, fsync_directory, fsync_tree, temporary_path, write_record
from actcache.store import IMAGES_FILE, StoreGroup
from saetrain.codes.store import CODES, COLUMNS


def code_dtypes(n_latents: int, n_rows: int) -> dict[str, str]:
    """The dtype of each array; latents and rows take the smallest unsigned type that holds them."""
    return {
        "indptr": "<i8",
        "latent": "<u2" if n_latents <= 1 << 16 else "<u4",
        "value": "<f2",
        "latent_indptr": "<i8",
        "row": "<u4" if n_rows <= 1 << 32 else "<u8",
        "latent_value": "<f2",
    }


def codes_settings(run: Artifact, store: StoreGroup, hook_point: HookPoint) -> dict[str, object]:
    n_latents = int(run.settings["sae"]["n_latents"])
    return {
        "rows_id": store.rows_id,
        "hook_point": str(hook_point),
        "tokens": run.settings["train"]["tokens"],
        "n_images": store.n_images,
        "n_tokens": store.n_tokens,
        "grid": list(store.layout.grid),
        "n_latents": n_latents,
        "shard_sizes": [len(images) for images in store.shards()],
        "dtypes": code_dtypes(n_latents, store.n_images * store.n_tokens),
        "preprocess": store.stores[0].settings.preprocess,
    }


def prepare_codes(folder: Path, store: StoreGroup) -> None:
    """Write what does not depend on the codes: the copied image table and the zarr group."""
    import zarr

    pq.write_table(store.images, folder / IMAGES_FILE)
    zarr.create_group(folder / CODES, zarr_format=3)


def write_shard(artifact: Artifact, shard: int, arrays: Mapping[str, NDArray[Any]], n_underflowed: int = 0) -> None:
    """Write the group of a shard under a temporary name, flush it, rename it, and write its commit record.

    n_underflowed: codes that are 0 in float16, which the arrays leave out.
    """
    import zarr

    root = artifact.path / CODES
    temporary = temporary_path(root / str(shard))
    group = zarr.create_group(temporary, zarr_format=3)
    for name in COLUMNS:
        data = arrays[name].astype(artifact.settings["dtypes"][name], copy=False)
        array = group.create_array(
            name,
            shape=data.shape,
            dtype=data.dtype,
            chunks=(max(data.size, 1),),
            compressors=None,
            config={"write_empty_chunks": True},
        )
        if data.size:
            array[:] = data
        else:  # zarr writes no chunk for an empty array
            (temporary / name / "c").mkdir()
            (temporary / name / "c" / "0").touch()
    fsync_tree(temporary)
    final = root / str(shard)
    if final.exists():  # left by a writer that died before the commit record
        shutil.rmtree(final)
    os.replace(temporary, final)
    fsync_directory(root)
    files = {
        os.path.relpath(file, artifact.path): file_digest(file) for file in sorted(final.rglob("*")) if file.is_file()
    }
    counts = {"n_entries": int(arrays["latent"].size), "n_underflowed": n_underflowed}
    write_record(artifact.path, shard, {"files": files, **counts})
