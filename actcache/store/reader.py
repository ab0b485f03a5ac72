"""Reading a store: (images, tokens, hook point) in, activations out.

Promises: an incomplete store is refused; a missing or short shard is an error that names it, never zeros; raw chunks
of a local store are read by `preadv` straight into the returned array, by several threads; opening reads two JSON files
and the footer of images.parquet; the sizes that a store claims are checked before memory is allocated for them.
"""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actcache.artifacts import (
    Artifact,
    FileDigest,
    check_once,
    crc32c,
    is_digest,
    is_remote,
    open_artifact,
    read_record,
    require_complete,
)
from actcache.cache_lines import empty_at_line
from actcache.errors import SettingsError
from actcache.hook_point import HookPoint
from actcache.machine import available_bytes, count_processors
from actcache.notebook import draw_facts
from actcache.store.channel_statistics import ChannelStatistics
from actcache.store.image_table import load_images
from actcache.store.layout import Tokens
from actcache.store.settings import StoreSettings
from actcache.store.shard_files import ShardFiles, image_runs, shard_path
from actcache.store.summary import read_store_summary
from actcache.store.zarr_arrays import ZarrArrays

GROUP = "actcache"
"""Attribute of the zarr group that holds the store's settings."""

Images = slice | Sequence[int] | NDArray[np.integer]
"""Stored positions, in any order."""

_PARTS: dict[Tokens, list[tuple[str, slice]]] = {
    "all": [("cls", slice(0, 1)), ("patches", slice(1, None))],
    "patch": [("patches", slice(0, None))],
    "cls": [("cls", slice(0, 1))],
}
"""(array, position of its tokens in the output)."""

_THREADS = min(8, count_processors())
_THREADED_BYTES = 1 << 22
"""Smaller reads are done by the calling thread: handing work to another one costs as much as reading 1 MB."""


class ActivationStore:
    """A complete store, open for reading.

    store = ActivationStore.open("val.acts")
    x = store.read(10, images=slice(0, 8), tokens="patch")    # float16 [8, 196, 768]
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.path = artifact.path
        self.settings = StoreSettings.of(artifact)
        self.layout, self.hook_points = self.settings.layout, self.settings.hook_points
        self._names, self.dtype = ", ".join(map(str, self.hook_points)), self.settings.stored_dtype
        self.n_images, self.n_tokens = self.layout.n_images, self.layout.n_tokens
        self.store_id, self.model_id = artifact.id, self.settings.model_id
        self.rows_id = self.settings.rows_id  # of the images and their order: stores with equal ids join row by row
        require_complete(artifact, self.layout.n_shards)
        self._summary = read_store_summary(artifact, self.settings)
        self._files = ShardFiles(self.path, self.layout)
        self._zarr = ZarrArrays(self.path, self.settings, self._files)
        self._seen: set[Path] = set()
        self._checked: set[tuple[HookPoint, str, int, int]] = set()  # chunks, by block and row in the whole store
        self._checksums: dict[tuple[HookPoint, str, int], list[int]] = {}
        self._record = lru_cache(maxsize=16)(partial(read_record, self.path))
        self._direct = self.settings.codec == "raw" and not is_remote(self.path)

    @classmethod
    def open(cls, path: str | Path) -> "ActivationStore":
        """Open a complete store. Raises ArtifactNotFoundError, SchemaError, IncompleteError, CorruptError."""
        return cls(open_artifact(path, "acts"))

    def __reduce__(self) -> tuple[Any, ...]:  # file descriptors and threads cannot be pickled
        return type(self).open, (str(self.path),)

    def __repr__(self) -> str:
        return (
            f"ActivationStore({self.path.name}: {self.n_images:,} images x {self.n_read_tokens('all')} tokens x "
            f"{self.layout.d_model}, {', '.join(map(str, self.hook_points))})"
        )

    def _repr_html_(self) -> str:
        layout = self.layout
        special = [f"{n} {kind}" for kind, n in Counter(layout.prefix).items()]
        facts = {
            "images": self.n_images,
            "could not be read": len(self._summary.failed),
            "tokens of an image": ", ".join([*special, f"{layout.grid[0]} x {layout.grid[1]} patches"]),
            "channels": layout.d_model,
            "hook points": ", ".join(map(str, self.hook_points)),
            "stored as": f"{self.settings.dtype}, {self.settings.codec}",
            "store id": self.store_id,
        }
        return draw_facts(f"Activation store {self.path.name}", facts)

    @cached_property
    def images(self) -> pa.Table:
        """images.parquet: one row for each stored image, in stored order; and `content_hash`, if the store has it."""
        return load_images(self.artifact, self.n_images)

    @cached_property
    def failed(self) -> dict[int, str]:
        """Images whose rows are zeros because they could not be read: image -> reason."""
        return dict(self._summary.failed)

    @cached_property
    def valid(self) -> NDArray[np.bool_]:
        """[I]: true where the image was read."""
        mask = np.ones(self.n_images, dtype=bool)
        mask[list(self.failed)] = False
        return mask

    def hook_point(self, layer: int | HookPoint | None) -> HookPoint:
        """The stored hook point of a layer, preferably resid_post; None selects the only one.

        Raises:
            SettingsError: it is not stored, or several would fit; the message lists what is stored.
        """
        if layer is None:
            if len(self.hook_points) > 1:
                raise SettingsError(f"{self.path} holds several hook points ({self._names}). Choose one with --layer.")
            return self.hook_points[0]
        if isinstance(layer, HookPoint) or HookPoint(layer) in self.hook_points:
            hook = layer if isinstance(layer, HookPoint) else HookPoint(layer)
        else:
            others = [stored for stored in self.hook_points if stored.layer == layer]
            if len(others) > 1:
                raise SettingsError(f"{self.path} holds {', '.join(map(str, others))}. Choose one with --site.")
            hook = others[0] if others else HookPoint(layer)
        if hook not in self.hook_points:
            raise SettingsError(
                f"{hook} is not in {self.path}. Stored: {self._names}. Extract it into another store with --layer."
            )
        return hook

    def statistics(self, layer: int | HookPoint | None, tokens: Tokens = "all") -> ChannelStatistics:
        """Statistics of the stored values of one hook point, merged from the commit records."""
        kinds, kind = self._summary.statistics[str(self.hook_point(layer))], self.layout.token_kind(tokens)
        parts = [ChannelStatistics.from_json(vars(kinds[k])) for k in ("cls", "patch") if kind in ("all", k)]
        return parts[0] + parts[1] if len(parts) == 2 else parts[0]

    def n_read_tokens(self, tokens: Tokens) -> int:
        """Number of tokens per image. Raises SettingsError for an unknown `tokens`, and for `cls` without CLS."""
        return self.layout.n_read_tokens(tokens)

    def read(
        self,
        layer: int | HookPoint | None = None,
        *,
        images: Images = slice(None),
        tokens: Tokens = "all",
        out: NDArray[Any] | None = None,
        check: bool = False,
    ) -> NDArray[Any]:
        """Read activations.

        Args:
            images: stored positions, in any order.
            tokens: CLS and the patches, the patches, or CLS. Where there is no CLS, all are the patches.
            out: a C-contiguous array [I, T, D] in the store's dtype to read into; allocated when None.
            check: compare every chunk that is read for the first time with its recorded checksum (whole chunks are
                read).

        Returns:
            [I, T, D] in the store's dtype; T depends on `tokens`. Rows of failed images are zeros (see `valid`).

        Raises:
            SettingsError: an image index or hook point that is not stored, or CLS of a model that has none.
            CorruptError: a shard is missing, short, or (with `check`) differs from what was written.
        """
        parts = _PARTS[self.layout.token_kind(tokens)]
        return self._read(layer, parts, self.layout.n_read_tokens(tokens), images, out, check)

    def read_registers(
        self, layer: int | HookPoint | None = None, *, images: Images = slice(None), out: NDArray[Any] | None = None,
        check: bool = False,
    ) -> NDArray[Any]:  # fmt: skip
        """The special tokens other than CLS, [I, R, D], in the order of the prefix. Arguments and errors as `read`."""
        n = self.layout.n_registers
        return self._read(layer, [("registers", slice(0, n))] if n else [], n, images, out, check)

    def read_extra(
        self, layer: int | HookPoint | None = None, *, images: Images = slice(None), out: NDArray[Any] | None = None,
        check: bool = False,
    ) -> NDArray[Any]:  # fmt: skip
        """The prompt tokens of an adapted model, [I, n_extra, D]. Arguments and errors as `read`."""
        n = self.layout.n_extra
        return self._read(layer, [("extra", slice(0, n))] if n else [], n, images, out, check)

    def read_stream(
        self, layer: int | HookPoint | None = None, *, images: Images = slice(None), out: NDArray[Any] | None = None,
        check: bool = False,
    ) -> NDArray[Any]:  # fmt: skip
        """Everything that the next block takes, [I, T, D] in the order of the tower: CLS, registers, patches and prompt
        tokens, those that there are. Arguments and errors as `read`.
        """
        layout, parts, stop = self.layout, [], 0
        for array, n in (
            ("cls", int(layout.has_cls)), ("registers", layout.n_registers), ("patches", layout.n_patches),
            ("extra", layout.n_extra),
        ):  # fmt: skip
            if n:
                parts.append((array, slice(stop, stop + n)))
            stop += n
        return self._read(layer, parts, stop, images, out, check)

    def _read(
        self,
        layer: int | HookPoint | None,
        parts: Sequence[tuple[str, slice]],
        n_tokens: int,
        images: Images,
        out: NDArray[Any] | None,
        check: bool,
    ) -> NDArray[Any]:
        """Read arrays side by side: (array, position of its tokens in the output)."""
        hook = self.hook_point(layer)
        positions = self._positions(images)
        for shard, chosen in self._by_shard(positions):
            for array, _ in parts:  # before memory is allocated: a store may claim any size
                self._check_shard(hook, array, shard, chosen if check else None)
        shape = (len(positions), n_tokens, self.layout.d_model)
        if out is None:
            out = empty_at_line(shape, self.dtype)
        self._check_out(out, shape)
        jobs = [
            (hook, array, *divmod(int(positions[start]), self.layout.shard_images), out[start:stop, columns])
            for start, stop in image_runs(positions, self.layout.shard_images)
            for array, columns in parts
        ]
        if not self._direct:
            for job in jobs:
                self._zarr.read(*job)
        elif out.nbytes < _THREADED_BYTES:
            self._read_rows([(*job, row) for job in jobs for row in range(self.layout.n_rows(job[1]))])
        else:
            rows = [(*job, row) for job in jobs for row in range(self.layout.n_rows(job[1]))]
            with ThreadPoolExecutor(
                _THREADS
            ) as pool:  # made each time (0.1 ms): a kept pool would hang in a forked process
                for done in [pool.submit(self._read_rows, rows[i::_THREADS]) for i in range(_THREADS)]:
                    done.result()
        return out

    @property
    def checks_cheaply(self) -> bool:
        """Whether comparing what is read with its checksums costs little; on an object store it is fetched twice."""
        return not is_remote(self.path)

    @cached_property
    def past_cache(self) -> bool:
        """Whether a hook point is larger than half of the available memory. A page cache that cannot hold it gains
        nothing and costs six times the processor time (0.49 against 0.08 s per GB).
        """
        layout = self.layout
        return self.n_images * layout.n_tokens * layout.d_model * layout.itemsize > available_bytes() / 2

    def read_chunk(
        self,
        layer: int | HookPoint | None,
        block: int,
        row: int,
        out: NDArray[Any],
        *,
        array: str = "patches",
        past_cache: bool | None = None,
        check: bool = False,
    ) -> None:
        """Read one whole chunk; threads may call this. A raw local chunk takes one system call, others go through zarr.

        Args:
            block: number of the block in the whole store, image // chunk_images.
            row: patch row; 0 for the other arrays.
            out: C-contiguous [chunk_images, columns, D] (`cls`: [chunk_images, D]) in the store's dtype. A short last
                block is padded with zeros.
            past_cache: use O_DIRECT, if `out` begins at a page (`aligned_empty`); by default the property `past_cache`.
            check: compare the chunk with its recorded checksum when it is read for the first time (14 GB/s a core).

        Raises:
            SettingsError: a chunk or array that is not stored.
            CorruptError: the shard is missing or short, or (with `check`) differs from what was written.
        """
        hook, layout = self.hook_point(layer), self.layout
        if array != "patches" and array not in layout.arrays():
            raise SettingsError(f"{self.path} has no array {array}. It has {', '.join(layout.arrays())}.")
        n_blocks, n_rows = -(-self.n_images // layout.chunk_images), layout.n_rows(array)
        if not (0 <= block < n_blocks and 0 <= row < n_rows):
            raise SettingsError(f"Chunk ({block}, {row}) does not exist: {n_blocks} blocks, {n_rows} rows.")
        self._check_out(out, layout.chunk_shape(array))
        shard, block = divmod(block, layout.blocks_per_shard)
        first, view = block * layout.chunk_images, out[:, None] if array == "cls" else out
        if self._direct:
            direct = self.past_cache if past_cache is None else past_cache
            self._files.read(hook, array, shard, row, first, view, direct=direct)
            if check:
                self._check_chunk(hook, array, shard, block, row, out)
        else:
            self._check_shard(hook, array, shard, np.empty(0, np.int64) if check else None)
            stored = min(layout.chunk_images, self.n_images - (shard * layout.shard_images + first))
            self._zarr.read(hook, array, shard, first, view[:stored], row)
            view[stored:] = 0

    def _check_out(self, out: NDArray[Any], shape: tuple[int, ...]) -> None:
        if out.shape != shape or out.dtype != self.dtype or not out.flags.c_contiguous:
            raise SettingsError(f"out must be a C-contiguous {self.dtype} array of shape {shape}.")

    def _by_shard(self, positions: NDArray[np.integer]) -> list[tuple[int, NDArray[np.integer]]]:
        """Pairs of (shard, image numbers within the shard)."""
        shards, offsets = np.divmod(positions, self.layout.shard_images)
        return [(int(shard), offsets[shards == shard]) for shard in np.unique(shards)]

    def _positions(self, images: Images) -> NDArray[np.integer]:
        if isinstance(images, slice):
            chosen = range(*images.indices(self.n_images))
            return np.arange(chosen.start, chosen.stop, chosen.step)
        positions = np.asarray(images)
        if positions.ndim != 1 or (positions.size and positions.dtype.kind not in "iu"):
            raise SettingsError(
                f"images must be a slice or a list of integers, got {positions.dtype} of shape {positions.shape}. "
                "Convert a Boolean mask with np.flatnonzero(mask)."
            )
        if positions.size and (positions.min() < 0 or positions.max() >= self.n_images):
            raise SettingsError(
                f"Image indices must lie in 0..{self.n_images - 1}, got {positions.min()}..{positions.max()}."
            )
        return positions

    def _read_rows(self, rows: Sequence[tuple[HookPoint, str, int, int, NDArray[Any], int]]) -> None:
        for hook, array, shard, first, out, row in rows:
            columns = out.shape[1] // self.layout.n_rows(array)
            self._files.read(hook, array, shard, row, first, out[:, row * columns : (row + 1) * columns])

    def _check_shard(self, hook: HookPoint, array: str, shard: int, chosen: NDArray[np.integer] | None) -> None:
        """Raise CorruptError unless the shard exists and, with `chosen`, the chunks of these images are unchanged."""
        path = shard_path(self.path, hook, array, shard)
        if self._direct:
            self._files.open(hook, array, shard)
            if chosen is not None:
                self._check_chunks(hook, array, shard, np.unique(chosen // self.layout.chunk_images))
            return
        if not is_remote(self.path):
            self._files.check_index(hook, array, shard)
        elif path not in self._seen:  # zarr would return zeros
            if not path.exists() or not path.stat().st_size:
                raise self._files.corrupt(path, shard, "is missing or empty")
            self._seen.add(path)
        if chosen is not None and (problem := check_once(path, self._digest(path, shard))):
            raise self._files.corrupt(path, shard, problem)

    def _check_chunks(self, hook: HookPoint, array: str, shard: int, blocks: NDArray[np.integer]) -> None:
        n_images, first_block = self.layout.chunk_images, shard * self.layout.blocks_per_shard
        rows = range(self.layout.n_rows(array))
        chunk = empty_at_line((n_images, self.layout.chunk_bytes(array) // n_images), np.uint8)
        for block in blocks.tolist():
            for row in rows:
                if (hook, array, first_block + block, row) not in self._checked:
                    self._files.read(hook, array, shard, row, block * n_images, chunk)
                    self._check_chunk(hook, array, shard, block, row, chunk)

    def _check_chunk(self, hook: HookPoint, array: str, shard: int, block: int, row: int, chunk: NDArray[Any]) -> None:
        """Compare a raw chunk, as it was read, with its checksum unless this object has done so before."""
        key = (hook, array, shard * self.layout.blocks_per_shard + block, row)
        if key in self._checked:
            return
        path, place = shard_path(self.path, hook, array, shard), (hook, array, shard)
        if place not in self._checksums:
            pieces = self._digest(path, shard)["pieces"]
            if len(pieces) != self.layout.n_blocks(shard) * self.layout.n_rows(array) + 1:
                raise self._files.corrupt(path, shard, "has a malformed commit record")
            self._checksums[place] = [checksum for _, checksum in pieces]
        if crc32c(chunk) != self._checksums[place][row * self.layout.n_blocks(shard) + block]:
            raise self._files.corrupt(path, shard, f"differs from what was written (block {block}, patch row {row})")
        self._checked.add(key)

    def _digest(self, path: Path, shard: int) -> FileDigest:
        """Digest of a shard file from its commit record."""
        recorded = self._record(shard)["files"].get(str(path)[len(str(self.path)) + 1 :])
        if not is_digest(recorded):
            raise self._files.corrupt(path, shard, "has a malformed commit record")
        return recorded
