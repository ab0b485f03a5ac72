"""Writing a store: blocks of activations in, committed shards out.

In: blocks as numpy arrays, already in chunk order. Out: zarr v3 shards, one commit record for each shard, the seal.
Promises: a shard appears complete and flushed or not at all, and is never replaced once it has its name; its record is
written last; memory holds one chunk. Several workers may write the same shard: the first wins, and all records agree.
This module needs neither torch nor a model, so the commit protocol is tested with plain arrays.
"""

import itertools
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from actcache.artifacts import (
    Artifact,
    FileDigest,
    OutputLock,
    begin_artifact,
    check_file,
    crc32c,
    create_temporary,
    encode_table,
    is_remote,
    make_folders,
    missing_shards,
    open_artifact,
    publish,
    read_json,
    read_records,
    record_path,
    seal_artifact,
    storage_errors,
    write_atomic,
    write_json,
    write_new,
    write_record,
)
from actcache.errors import CorruptError
from actcache.hook_point import HookPoint
from actcache.seen import pack_hashes
from actcache.sources import ImagePlan
from actcache.store.channel_statistics import ChannelStatistics, merge_statistics
from actcache.store.codecs import chunk_encoder
from actcache.store.image_table import CONTENT_FILE, IMAGES_FILE, read_images
from actcache.store.layout import StoreLayout
from actcache.store.orphan_shards import digest_shard, scan_shard
from actcache.store.reader import GROUP
from actcache.store.settings import StoreSettings
from actcache.store.shard_files import ARRAYS, shard_path
from actcache.store.zarr_arrays import array_arguments


def begin_store(
    path: str | Path,
    *,
    plan: ImagePlan,
    images_path: Path,
    settings: StoreSettings,
    provenance: Mapping[str, Any],
    overwrite: bool = False,
    lock: OutputLock | None = None,
) -> Artifact:
    """Create the store's directory (plan and zarr metadata, no data), or open the one made with the same settings.

    If the plan or the metadata of an unfinished store are missing or damaged, they are written again.

    Args:
        provenance: facts that are shown but not part of the identity.
        lock: see `begin_artifact`.
    """
    artifact = begin_artifact(
        path,
        "acts",
        settings=settings.to_json(),
        parents={"images": (plan.rows_id, images_path)},
        provenance=provenance,
        prepare=lambda folder: write_fixed_files(folder, plan, settings),
        schema=settings.schema,
        overwrite=overwrite,
        lock=lock,
    )
    if not artifact.complete:
        _restore_fixed_files(artifact.path, plan, settings)
    return artifact


def write_fixed_files(folder: Path, plan: ImagePlan, settings: StoreSettings) -> None:
    """Write the plan and the zarr metadata, which exist before the first shard and never change."""
    write_new(folder / IMAGES_FILE, encode_table(plan.table))
    for name, data in _zarr_metadata(settings).items():
        write_new(folder / name, data)


def _restore_fixed_files(store: Path, plan: ImagePlan, settings: StoreSettings) -> None:
    """Rewrite damaged files before the seal. Contents are compared: versions of zarr and pyarrow differ in bytes."""
    with storage_errors(store):
        try:
            intact = read_images(store).equals(plan.table)
        except CorruptError:
            intact = False
        if not intact:
            write_atomic(store / IMAGES_FILE, encode_table(plan.table))
        for name, data in _zarr_metadata(settings).items():
            path = store / name
            try:
                intact = _without_seal(read_json(path)) == _without_seal(json.loads(data))
            except CorruptError:
                intact = False
            if not intact:
                if not is_remote(path):
                    make_folders(path.parent, within=store)
                write_atomic(path, data)


def _without_seal(metadata: Any) -> Any:
    """zarr metadata as it was before seal_store() added to it."""
    try:
        ours = metadata["attributes"][GROUP]
        kept = {name: value for name, value in ours.items() if name not in ("store_id", "complete")}
        return {**metadata, "attributes": {**metadata["attributes"], GROUP: kept}}
    except (KeyError, TypeError, AttributeError):  # metadata of an array
        return metadata


def seal_store(path: Path) -> None:
    """Seal the store if every shard has its record; otherwise do nothing. Several workers may call it."""
    artifact = open_artifact(path, "acts")
    layout = StoreSettings.of(artifact).layout
    if artifact.complete or missing_shards(path, layout.n_shards):
        return
    failed: dict[str, str] = {}
    parts, content, hashed = [], [], False
    for record in read_records(path):
        failed.update(record["failed"])
        parts.append(read_statistics(record))
        hashed |= "content" in record
        content.append(pack_hashes(record.get("content") or [""] * len(layout.shard_range(record["shard"]))))
    if hashed:  # a shard that an earlier version committed has no hashes
        write_atomic(path / CONTENT_FILE, b"".join(content))
    metadata = path / ARRAYS / "zarr.json"
    group = read_json(metadata)
    group["attributes"][GROUP] |= {"store_id": artifact.id, "complete": True}
    write_json(metadata, group)
    seal_artifact(path, failed=failed, statistics=_statistics_to_json(merge_statistics(parts)))


def read_statistics(record: Mapping[str, Any]) -> dict[str, dict[str, ChannelStatistics]]:
    """{hook point: {token kind: statistics}} of a commit record."""
    return {
        hook: {kind: ChannelStatistics.from_json(value) for kind, value in kinds.items()}
        for hook, kinds in record["statistics"].items()
    }


def _statistics_to_json(statistics: Mapping[str, Mapping[str, ChannelStatistics]]) -> dict[str, object]:
    return {
        hook: {kind: value.to_json() for kind, value in sorted(kinds.items())}
        for hook, kinds in sorted(statistics.items())
    }


class ShardWriter:
    """Writes one shard of every hook point, block by block, and commits it.

    with ShardWriter(artifact, shard) as writer:
        for block in range(layout.n_blocks(shard)):
            writer.write(hook_point, block, patches, cls)  # and the store's other arrays
        writer.commit(failed)

    Leaving the `with` block without `commit` removes the temporary files.
    """

    def __init__(self, artifact: Artifact, shard: int) -> None:
        self.path = artifact.path
        self.shard = shard
        settings = StoreSettings.of(artifact)
        self.layout, self.hook_points = settings.layout, settings.hook_points
        self.dtype, self.codec = settings.stored_dtype, settings.codec
        self._files: dict[tuple[HookPoint, str], _ShardFile] = {}
        try:
            with storage_errors(self.path):
                for hook, array in itertools.product(self.hook_points, self.layout.arrays()):
                    path = shard_path(self.path, hook, array, shard)
                    self._files[hook, array] = _ShardFile(self.path, path, self.layout, array, shard, self.codec)
        except BaseException:
            self._abandon()
            raise
        self._statistics: dict[str, dict[str, ChannelStatistics]] = {}

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._abandon()

    def _abandon(self) -> None:
        for file in self._files.values():
            file.abandon()

    def write(
        self,
        hook_point: HookPoint,
        block: int,
        patches: NDArray[Any],  # [rows, n, columns, D], n = images in the block
        cls: NDArray[Any] | None,  # [n, D], None where there is no CLS
        *,
        valid: NDArray[np.bool_]
        | None = None,  # [n]; false if the image could not be read, so that its values are zeros
        statistics: Mapping[str, ChannelStatistics] | None = None,  # of the valid images, by token kind
        registers: NDArray[Any] | None = None,  # [n, R, D]
        extra: NDArray[Any] | None = None,  # [n, n_extra, D]
    ) -> None:
        """Write one block of one hook point. `statistics` are computed here, at 0.6 GB/s, unless they are given.

        Raises:
            StorageError: the disk is full or broken.
        """
        arrays = {"patches": patches, "cls": cls, "registers": registers, "extra": extra}
        given = {array: values for array, values in arrays.items() if values is not None}
        assert given.keys() == set(self.layout.arrays()), f"got {sorted(given)} for {self.layout.arrays()}"
        if statistics is None:
            readable = np.ones(patches.shape[1], dtype=bool) if valid is None else valid
            rows = patches[:, readable].reshape(-1, patches.shape[-1])
            statistics = {"patch": ChannelStatistics.of(rows)}
            if cls is not None:
                statistics["cls"] = ChannelStatistics.of(cls[readable])
        with storage_errors(self.path):
            for array, values in given.items():
                for row, chunk in enumerate(values if array == "patches" else values[None]):
                    self._files[hook_point, array].write_chunk(
                        block, row, np.ascontiguousarray(chunk, dtype=self.dtype)
                    )
        self._statistics = merge_statistics([self._statistics, {str(hook_point): statistics}])

    def commit(self, failed: Mapping[int, str], content: Sequence[str] | None = None) -> None:
        """Flush the shard, give it its name and record it.

        Args:
            failed: image -> reason, for images whose rows are zeros.
            content: the hash of each of the shard's images, "" for one whose bytes could not be read.

        Raises:
            StorageError: nothing is recorded; the same command resumes.
        """
        if record_path(self.path, self.shard).exists():  # another worker was faster
            return
        with storage_errors(self.path):
            digests, ours = {}, True
            for (hook, array), file in self._files.items():
                digest = file.commit()
                if (
                    digest is None
                ):  # another worker was first: its bytes stay, whose low bits may differ, so describe them
                    ours = False
                    path = shard_path(self.path, hook, array, self.shard)
                    digest = digest_shard(path, self.layout, array, self.shard, self.codec)
                digests[str(file.path.relative_to(self.path))] = digest
            if not ours:
                self._statistics, zeros = scan_shard(self.path, self.layout, self.hook_points, self.shard)
                failed = {image: failed.get(image, "could not be read") for image in zeros}
            images = self.layout.shard_range(self.shard)
            write_record(
                self.path,
                self.shard,
                {
                    "images": [images.start, images.stop],
                    "failed": {str(image): reason for image, reason in sorted(failed.items())},
                    "statistics": _statistics_to_json(self._statistics),
                    **({} if content is None else {"content": list(content)}),
                    "files": digests,
                },
            )


class _ShardFile:
    """A zarr v3 shard under a temporary name: raw chunks at their final offsets, compressed ones as they arrive."""

    def __init__(self, store: Path, path: Path, layout: StoreLayout, array: str, shard: int, codec: str) -> None:
        self.path, self.layout, self.array, self.shard = path, layout, array, shard
        self.encoder = chunk_encoder(codec, layout.itemsize)
        self.chunk_shape = layout.chunk_shape(array)
        n_chunks = layout.blocks_per_shard * layout.n_rows(array)
        self.index = np.full((n_chunks, 2), 2**64 - 1, dtype="<u8")
        self.pieces: dict[int, tuple[int, int]] = {}  # offset -> (length, crc32c)
        self.end = 0
        if is_remote(path):  # written to the local disk first, then sent as a whole
            fd, name = tempfile.mkstemp(prefix="shard-", suffix=".tmp")
            self.temporary, self.fd = Path(name), cast("int | None", fd)
            return
        make_folders(path.parent, within=store)
        self.temporary, self.fd = create_temporary(path)

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

    def commit(self) -> FileDigest | None:
        """Write the index, fsync, rename. Returns the digest, or None if another worker's file has the name."""
        assert self.fd is not None
        n_chunks = self.layout.n_blocks(self.shard) * self.layout.n_rows(self.array)
        assert len(self.pieces) == n_chunks, f"{self.path}: {len(self.pieces)} of {n_chunks} chunks were written"
        index = self.index.tobytes()
        index += crc32c(index).to_bytes(4, "little")
        _pwrite_all(self.fd, np.frombuffer(index, dtype=np.uint8), self.end)
        os.fsync(self.fd)
        fd, self.fd = self.fd, None
        os.close(fd)  # some file systems report only here that they are full
        pieces = [list(self.pieces[offset]) for offset in sorted(self.pieces)]
        digest: FileDigest = {"bytes": self.end + len(index), "pieces": [*pieces, [len(index), crc32c(index)]]}
        if is_remote(self.path):
            remote: Any = self.path
            remote.fs.put_file(str(self.temporary), remote.path)
            self.temporary.unlink()
            return digest
        return digest if publish(self.temporary, self.path) or check_file(self.path, digest) is None else None

    def abandon(self) -> None:
        fd, self.fd = self.fd, None
        with suppress(OSError):  # leftovers are harmless, and the original error matters more
            if fd is not None:
                os.close(fd)
            self.temporary.unlink(missing_ok=True)  # also after a failed rename


def _pwrite_all(fd: int, data: NDArray[np.uint8], offset: int) -> None:
    view, done = memoryview(cast(Any, data)), 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def _zarr_metadata(settings: StoreSettings) -> dict[str, bytes]:
    """Name -> contents of every zarr.json. In memory, because zarr's threads go on writing after a failed write."""
    import zarr

    layout = settings.layout
    files: dict[str, zarr.core.buffer.Buffer] = {}
    group = zarr.create_group(files, attributes={GROUP: {**settings.to_json(), "complete": False}}, zarr_format=3)
    names = {
        "patches": ("image", "patch", "channel"),
        "registers": ("image", "register", "channel"),
        "extra": ("image", "extra", "channel"),
        "cls": ("image", "channel"),
    }
    for hook in settings.hook_points:
        folder = group.create_group(str(hook))
        for array in layout.arrays():
            folder.create_array(
                array,
                **array_arguments(settings, array),
                dimension_names=names[array],
                attributes={"grid": list(layout.grid), "patch_size": list(settings.patch_size)}
                if array == "patches"
                else {},
            )
    return {f"{ARRAYS}/{name}": data.to_bytes() for name, data in files.items()}
