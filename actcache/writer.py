"""The write side of the store: blocks of activations in, committed shards out.

In: blocks as numpy arrays, already in chunk order. Out: zarr v3 shards, one commit record a shard, the seal.
Promises: a shard appears whole and flushed or not at all; its record is written last; memory holds one block.
Importing this needs neither torch nor a model, so the commit protocol is tested with plain arrays.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from actcache.artifact import (
    Artifact,
    begin_artifact,
    missing_shards,
    open_artifact,
    read_records,
    seal_artifact,
    write_record,
)
from actcache.codecs import check_dtype, chunk_encoder, zarr_compressor
from actcache.files import (
    crc32c,
    fsync_directory,
    read_json,
    write_json,
)
from actcache.hook_point import HookPoint
from actcache.images import ImagePlan
from actcache.layout import StoreLayout
from actcache.store import ARRAYS, GROUP, IMAGES_FILE, ChannelStatistics, layout_of, shard_path


def begin_store(
    path: str | Path,
    *,
    plan: ImagePlan,
    images_path: Path,
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any],
    overwrite: bool = False,
) -> Artifact:
    """Create the store's directory (plan, zarr metadata, no data), or find the one made with the same settings.

    Args:
        settings: the fields that name the bytes, see docs/format.md; they describe the layout too.
    """

    def prepare(folder: Path) -> None:
        pq.write_table(plan.table, folder / IMAGES_FILE)
        _write_zarr_metadata(folder / ARRAYS, settings)

    return begin_artifact(
        path,
        "acts",
        settings=settings,
        parents={"images": (plan.rows_id, images_path)},
        provenance=provenance,
        prepare=prepare,
        overwrite=overwrite,
    )


def seal_store(path: Path) -> None:
    """Seal the store if every shard has its record; otherwise do nothing. Whoever sees all records may call it."""
    artifact = open_artifact(path, "acts")
    layout = layout_of(artifact.settings)
    if artifact.complete or missing_shards(path, layout.n_shards):
        return
    failed: dict[str, str] = {}
    statistics: dict[str, dict[str, ChannelStatistics]] = {}
    for record in read_records(path):
        failed.update(record["failed"])
        for hook, kinds in record["statistics"].items():
            total = statistics.setdefault(hook, {})
            for kind, value in kinds.items():
                part = ChannelStatistics.from_json(value)
                total[kind] = total[kind] + part if kind in total else part
    metadata = path / ARRAYS / "zarr.json"
    group = read_json(metadata)
    group["attributes"][GROUP] |= {"store_id": artifact.id, "complete": True}
    write_json(metadata, group)
    seal_artifact(
        path,
        failed=failed,
        statistics={h: {k: v.to_json() for k, v in kinds.items()} for h, kinds in statistics.items()},
    )


class ShardWriter:
    """Writes one shard of every hook point, block by block, and commits it.

    with ShardWriter(artifact, shard) as writer:
        for block in range(layout.n_blocks(shard)):
            writer.write(hook_point, block, patches, cls)
        writer.commit(failed)

    Leaving the `with` without `commit` removes the temporary files.
    """

    def __init__(self, artifact: Artifact, shard: int) -> None:
        self.path = artifact.path
        self.shard = shard
        self.layout = layout_of(artifact.settings)
        self.dtype = check_dtype(artifact.settings["dtype"])
        self.codec = artifact.settings["codec"]
        self.hook_points = [HookPoint.parse(text) for text in artifact.settings["hook_points"]]
        self._files = {
            (hook, array): _ShardFile(shard_path(self.path, hook, array, shard), self.layout, array, shard, self.codec)
            for hook in self.hook_points
            for array in self.layout.arrays()
        }
        self._statistics: dict[str, dict[str, ChannelStatistics]] = {}

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.abandon()

    def write(
        self,
        hook_point: HookPoint,
        block: int,
        patches: NDArray[Any],  # [rows, n, columns, D], n = images in the block
        cls: NDArray[Any],  # [n, D]
        *,
        valid: NDArray[np.bool_],  # [n]; false: the image could not be read, its values are zeros
        extra: NDArray[Any] | None = None,  # [n, n_extra, D]
    ) -> None:
        """Write one block of one hook point and add it to the shard's statistics."""
        for array, values in (
            ("patches", patches),
            ("cls", cls[None]),
            ("extra", None if extra is None else extra[None]),
        ):
            if values is not None:
                file = self._files[hook_point, array]
                for row in range(self.layout.n_rows(array)):
                    file.write_chunk(block, row, np.ascontiguousarray(values[row], dtype=self.dtype))
        kinds = self._statistics.setdefault(str(hook_point), {})
        for kind, rows in (("patch", patches[:, valid].reshape(-1, patches.shape[-1])), ("cls", cls[valid])):
            part = ChannelStatistics.of(rows)
            kinds[kind] = kinds[kind] + part if kind in kinds else part

    def commit(self, failed: Mapping[int, str]) -> None:
        """Flush, name and record the shard. `failed`: image -> reason, for images whose rows are zeros."""
        files = {os.path.relpath(file.path, self.path): file.commit() for file in self._files.values()}
        images = self.layout.shard_range(self.shard)
        write_record(
            self.path,
            self.shard,
            {
                "images": [images.start, images.stop],
                "failed": {str(image): reason for image, reason in sorted(failed.items())},
                "statistics": {
                    hook: {kind: value.to_json() for kind, value in kinds.items()}
                    for hook, kinds in self._statistics.items()
                },
                "files": files,
            },
        )


class _ShardFile:
    """One zarr v3 shard under a temporary name: raw chunks at their final offsets, compressed ones as they come."""

    def __init__(self, path: Path, layout: StoreLayout, array: str, shard: int, codec: str) -> None:
        self.path, self.layout, self.array, self.shard = path, layout, array, shard
        self.encoder = chunk_encoder(codec, layout.itemsize)
        self.chunk_shape = layout.chunk_shape(array)
        n_chunks = layout.blocks_per_shard * layout.n_rows(array)
        self.index = np.full((n_chunks, 2), 2**64 - 1, dtype="<u8")
        self.pieces: dict[int, tuple[int, int]] = {}  # offset -> (length, crc32c)
        self.end = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self.fd: int | None = os.open(self.temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def write_chunk(self, block: int, row: int, values: NDArray[Any]) -> None:
        assert self.fd is not None
        if values.shape[0] < self.chunk_shape[0]:  # a short last block
            padded = np.zeros(self.chunk_shape, dtype=values.dtype)
            padded[: values.shape[0]] = values
            values = padded
        if self.encoder is None:
            offset = self.layout.chunk_offset(self.array, self.shard, block, row)
            data = values.reshape(-1).view(np.uint8)
        else:
            offset = self.end
            data = np.frombuffer(self.encoder.encode(values), dtype=np.uint8)
        _pwrite_all(self.fd, data, offset)
        self.end = max(self.end, offset + data.nbytes)
        self.index[block * self.layout.n_rows(self.array) + row] = (offset, data.nbytes)
        self.pieces[offset] = (data.nbytes, crc32c(data))

    def commit(self) -> dict[str, Any]:
        """Write the index, fsync, rename. Returns the file's digest."""
        assert self.fd is not None
        index = self.index.tobytes()
        index += crc32c(index).to_bytes(4, "little")
        _pwrite_all(self.fd, np.frombuffer(index, dtype=np.uint8), self.end)
        os.fsync(self.fd)
        os.close(self.fd)
        self.fd = None
        os.replace(self.temporary, self.path)
        fsync_directory(self.path.parent)
        pieces = [list(self.pieces[offset]) for offset in sorted(self.pieces)]
        return {"bytes": self.end + len(index), "pieces": [*pieces, [len(index), crc32c(index)]]}

    def abandon(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
        self.temporary.unlink(missing_ok=True)  # also where the rename failed


def _pwrite_all(fd: int, data: NDArray[np.uint8], offset: int) -> None:
    view, done = memoryview(cast(Any, data)), 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def _write_zarr_metadata(path: Path, settings: Mapping[str, Any]) -> None:
    import zarr

    layout = layout_of(settings)
    dtype = check_dtype(settings["dtype"])
    group = zarr.create_group(path, attributes={GROUP: {**settings, "complete": False}}, zarr_format=3)
    shapes = {
        "patches": ((layout.n_images, layout.n_patches, layout.d_model), ("image", "patch", "channel")),
        "extra": ((layout.n_images, layout.n_extra, layout.d_model), ("image", "extra", "channel")),
        "cls": ((layout.n_images, layout.d_model), ("image", "channel")),
    }
    for hook in settings["hook_points"]:
        folder = group.create_group(hook)
        for array in layout.arrays():
            shape, names = shapes[array]
            folder.create_array(
                array,
                shape=shape,
                dtype=dtype,
                chunks=layout.chunk_shape(array),
                shards=(layout.shard_images, *shape[1:]),
                compressors=zarr_compressor(settings["codec"], layout.itemsize),
                fill_value=0,
                dimension_names=names,
                attributes={"grid": list(layout.grid), "patch_size": settings["patch_size"]}
                if array == "patches"
                else {},
            )
