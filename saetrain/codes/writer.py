"""Writing codes: the settings of a code store, and its shards, each committed when it is finished.

The layout is described in store.py. The directory of a shard appears by one rename, then its commit record is written.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache import HookPoint
from actcache.artifacts import (
    Artifact,
    build_folder,
    encode_table,
    file_digest,
    make_folders,
    record_path,
    storage_errors,
    write_new,
    write_record,
)
from actcache.seen import CONTENT_HASH, pack_hashes
from actcache.store import CONTENT_FILE, IMAGES_FILE, StoreGroup
from saetrain.codes.checks import CODES, COLUMNS
from saetrain.codes.store import SEEN_FILE
from saetrain.lineage import find_seen
from saetrain.run import Run


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
        "tokens": store.layout.token_kind(run.settings["train"]["tokens"]),
        "n_images": store.n_images,
        "n_tokens": store.n_tokens,
        "grid": list(store.layout.grid),
        "n_latents": n_latents,
        "shard_sizes": [len(images) for images in store.shards()],
        "dtypes": code_dtypes(n_latents, store.n_images * store.n_tokens),
        "preprocess": store.stores[0].settings.preprocess,
    }


def prepare_codes(folder: Path, store: StoreGroup, run: Run) -> None:
    """Write what does not depend on the codes: what they copy of the images, and the zarr group.

    Beside the table lie the hashes of the images and, if it can be told, which of them the run, or the model behind the
    store, has learned from.
    """
    images, seen = store.images, find_seen(store, [run])
    if CONTENT_HASH in images.column_names:
        write_new(folder / CONTENT_FILE, pack_hashes(images[CONTENT_HASH].to_pylist()))
        images = images.drop_columns([CONTENT_HASH])
    write_new(folder / IMAGES_FILE, encode_table(images))
    if seen.known_by != "unknown":
        write_new(folder / SEEN_FILE, seen.images.tobytes())
    write_new(folder / CODES / "zarr.json", _zarr_metadata({})["zarr.json"])


def write_shard(artifact: Artifact, shard: int, arrays: Mapping[str, NDArray[Any]], n_underflowed: int = 0) -> None:
    """Write the group of a shard, which appears whole and flushed, and its commit record.

    n_underflowed: codes that are 0 in float16, which the arrays leave out.

    Raises:
        StorageError: nothing is recorded; the same command resumes.
    """
    if record_path(artifact.path, shard).exists():  # another worker was faster
        return
    dtypes = artifact.settings["dtypes"]
    plain = {name: np.ascontiguousarray(arrays[name], dtype=dtypes[name]) for name in COLUMNS}
    final = artifact.path / CODES / str(shard)
    with storage_errors(artifact.path):
        make_folders(final.parent, within=artifact.path)
        with build_folder(final, replace=True) as folder:  # a writer that died before its record may have left one
            for name, data in _zarr_metadata(plain).items():
                write_new(folder / name, data)
            for name, values in plain.items():
                write_new(folder / name / "c" / "0", values.data)
    files = {
        os.path.relpath(file, artifact.path): file_digest(file) for file in sorted(final.rglob("*")) if file.is_file()
    }
    counts = {"n_entries": int(arrays["latent"].size), "n_underflowed": n_underflowed}
    write_record(artifact.path, shard, {"files": files, **counts})


def _zarr_metadata(arrays: Mapping[str, NDArray[Any]]) -> dict[str, bytes]:
    """Name -> contents of the zarr.json of a group and of its arrays, each of one uncompressed chunk."""
    import zarr

    files: dict[str, zarr.core.buffer.Buffer] = {}
    group = zarr.create_group(files, zarr_format=3)
    for name, data in arrays.items():
        group.create_array(
            name,
            shape=data.shape,
            dtype=data.dtype,
            chunks=(max(data.size, 1),),
            compressors=None,
            config={"write_empty_chunks": True},
        )
    return {name: data.to_bytes() for name, data in files.items()}
