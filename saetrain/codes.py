"""CodeStore: sparse codes on disk, cut on the image axis exactly as the activations were.

    artifact.json  images.parquet  commits/  manifest.json
    codes.zarr/<shard>/indptr [rows + 1], latent [nnz], value [nnz]              by row
                       latent_indptr [F + 1], row [nnz], latent_value [nnz]      the same entries by latent

row = image * n_tokens + token, over the whole store. Needs no torch.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from actcache import (
    IMAGES_FILE,
    Artifact,
    CorruptError,
    HookPoint,
    SettingsError,
    StoreGroup,
    file_digest,
    fsync_directory,
    fsync_tree,
    open_artifact,
    read_manifest,
    require_complete,
    temporary_path,
    write_record,
)

CODES = "codes.zarr"
COLUMNS = ("indptr", "latent", "value", "latent_indptr", "row", "latent_value")


@dataclass(frozen=True)
class ShardCodes:
    """Codes of one shard, in both orders. `first_row` is the global row of `indptr[0]`."""

    first_row: int
    indptr: NDArray[np.int64]  # [rows + 1]
    latent: NDArray[np.unsignedinteger]  # [nnz], ascending within a row
    value: NDArray[np.float16]  # [nnz]
    latent_indptr: NDArray[np.int64]  # [F + 1]
    row: NDArray[np.unsignedinteger]  # [nnz], global, ascending within a latent
    latent_value: NDArray[np.float16]  # [nnz]


class CodeStore:
    """Complete codes, open for reading.

    codes = CodeStore.open("val.codes"); codes.read_shard(0).latent
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.path = artifact.path
        s = artifact.settings
        self.n_images, self.n_tokens, self.n_latents = (
            int(s["n_images"]),
            int(s["n_tokens"]),
            int(s["n_latents"]),
        )
        self.shard_sizes = np.array(s["shard_sizes"], dtype=np.int64)
        self.grid: tuple[int, int] = (int(s["grid"][0]), int(s["grid"][1]))
        self.hook_point = HookPoint.parse(s["hook_point"])
        self.tokens = str(s["tokens"])
        self.preprocess: dict[str, Any] = s["preprocess"]
        require_complete(artifact, self.n_shards, "encode")

    @classmethod
    def open(cls, path: str | Path) -> "CodeStore":
        """Open complete codes. Raises ArtifactNotFoundError, SchemaError, IncompleteError, CorruptError."""
        return cls(open_artifact(path, "codes"))

    def __repr__(self) -> str:
        return (
            f"CodeStore({self.path.name}: {self.n_images:,} images x {self.n_tokens} tokens, "
            f"{self.n_latents:,} latents, {self.n_entries:,} entries)"
        )

    @property
    def codes_id(self) -> str:
        return self.artifact.id

    @property
    def n_shards(self) -> int:
        return len(self.shard_sizes)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What the seal says: entries, quality of the run, failed images."""
        return read_manifest(self.artifact)

    @property
    def n_entries(self) -> int:
        return int(self.summary["n_entries"])

    @cached_property
    def images(self) -> pa.Table:
        """images.parquet of the store, copied."""
        try:
            return pq.read_table(self.path / IMAGES_FILE)
        except (OSError, pa.ArrowException) as error:
            raise CorruptError(f"{self.path / IMAGES_FILE} cannot be read ({error}). Encode it again.") from error

    @cached_property
    def valid(self) -> NDArray[np.bool_]:
        """[I]: true where the image was read and encoded."""
        mask = np.ones(self.n_images, dtype=bool)
        mask[[int(image) for image in self.summary["failed"]]] = False
        return mask

    def shard_range(self, shard: int) -> range:
        """Images of a shard."""
        first = int(self.shard_sizes[:shard].sum())
        return range(first, first + int(self.shard_sizes[shard]))

    def find_shard(self, image: int) -> int:
        """The shard that holds an image."""
        return int(np.searchsorted(np.cumsum(self.shard_sizes), image, side="right"))

    def read_shard(self, shard: int) -> ShardCodes:
        """All arrays of a shard. Raises CorruptError when one is missing or their lengths disagree."""
        columns = {name: self._read(shard, name) for name in COLUMNS}
        images = self.shard_range(shard)
        sizes = {name: values.size for name, values in columns.items()}
        pointers = {"indptr": len(images) * self.n_tokens + 1, "latent_indptr": self.n_latents + 1}
        entries = dict.fromkeys(("latent", "value", "row", "latent_value"), sizes["value"])
        if sizes != {**pointers, **entries} or {int(columns[name][-1]) for name in pointers} != {sizes["value"]}:
            raise self._inconsistent(shard)
        return ShardCodes(first_row=images.start * self.n_tokens, **columns)

    def read_latent(self, latent: int) -> tuple[NDArray[np.int64], NDArray[np.float16]]:
        """(rows, values) of one latent over all shards, reading only its own entries.

        Raises SettingsError for a latent out of range, CorruptError for an array that is missing or too short.
        """
        if not 0 <= latent < self.n_latents:
            raise SettingsError(f"A latent must lie in 0..{self.n_latents - 1}, got {latent}.")
        rows, values = [], []
        for shard in range(self.n_shards):
            start, stop = self._read(shard, "latent_indptr", slice(latent, latent + 2))
            rows.append(self._read(shard, "row", slice(start, stop)).astype(np.int64))
            values.append(self._read(shard, "latent_value", slice(start, stop)))
        return np.concatenate(rows), np.concatenate(values)

    def _read(self, shard: int, column: str, part: slice = slice(None)) -> NDArray[Any]:
        """One raw array, by memory map: a slice touches its own pages only."""
        folder = self.path / CODES / str(shard) / column
        try:
            dtype = self.artifact.settings["dtypes"][column]
            if part == slice(None):
                return np.fromfile(folder / "c" / "0", dtype=dtype)
            values = _mapped(folder, dtype)[part]
        except (OSError, ValueError) as error:
            raise CorruptError(
                f"Shard {shard} of {self.path} lacks {column} ({error}). Run `verify {self.path}`, then encode again."
            ) from error
        if values.size != part.stop - part.start:  # numpy cuts a slice that goes past the end
            raise self._inconsistent(shard)
        return values

    def _inconsistent(self, shard: int) -> CorruptError:
        return CorruptError(
            f"Shard {shard} of {self.path} is inconsistent. Run `verify {self.path}`, then encode again."
        )


def _mapped(folder: Path, dtype: str) -> NDArray[Any]:
    file = folder / "c" / "0"
    if os.path.getsize(file) == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(file, dtype=dtype, mode="r")


def code_dtypes(n_latents: int, n_rows: int) -> dict[str, str]:
    """Smallest unsigned types that hold a latent and a row."""
    return {
        "indptr": "<i8",
        "latent": "<u2" if n_latents <= 1 << 16 else "<u4",
        "value": "<f2",
        "latent_indptr": "<i8",
        "row": "<u4" if n_rows <= 1 << 32 else "<u8",
        "latent_value": "<f2",
    }


def codes_settings(run: Artifact, store: StoreGroup, hook_point: HookPoint) -> dict[str, Any]:
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
        "preprocess": store.stores[0].artifact.settings["preprocess"],
    }


def prepare_codes(folder: Path, store: StoreGroup) -> None:
    """What never changes: the copied image table and the zarr group."""
    import zarr

    pq.write_table(store.images, folder / IMAGES_FILE)
    zarr.create_group(folder / CODES, zarr_format=3)


def write_shard(artifact: Artifact, shard: int, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write a shard's group under a temporary name, flush it, rename it, record it."""
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
        else:  # zarr writes no chunk of an empty array
            (temporary / name / "c").mkdir()
            (temporary / name / "c" / "0").touch()
    fsync_tree(temporary)
    final = root / str(shard)
    if final.exists():  # written, but its record was not
        shutil.rmtree(final)
    os.replace(temporary, final)
    fsync_directory(root)
    files = {
        os.path.relpath(file, artifact.path): file_digest(file) for file in sorted(final.rglob("*")) if file.is_file()
    }
    write_record(artifact.path, shard, {"files": files, "n_entries": int(arrays["latent"].size)})
