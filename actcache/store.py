"""The read side of the store: (images, tokens, hook point) in, activations out.

Promises: an incomplete store is refused; a missing or short shard is an error that names it, never zeros; raw chunks
are read by `preadv` straight into the array that is returned; opening reads two small JSON files and images.parquet.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from actcache.artifact import (
    Artifact,
    open_artifact,
    read_manifest,
    read_record,
    require_complete,
)
from actcache.codecs import check_dtype
from actcache.errors import CorruptError, SettingsError
from actcache.files import (
    crc32c,
)
from actcache.hook_point import HookPoint
from actcache.layout import StoreLayout
from actcache.verification import check_file, is_digest

ARRAYS = "activations.zarr"
IMAGES_FILE = "images.parquet"
GROUP = "actcache"
"""Name of the zarr group's attribute that holds the store's settings."""

Tokens = Literal["all", "patch", "cls"]
TOKENS: tuple[Tokens, ...] = ("all", "patch", "cls")


@dataclass(frozen=True)
class ChannelStatistics:
    """Count, per-channel sum and sum of squares (float64), and absolute maximum of stored activations."""

    count: int
    sum: NDArray[np.float64]  # [D]
    sum_squares: NDArray[np.float64]  # [D]
    absmax: float

    @classmethod
    def of(cls, rows: NDArray[Any]) -> "ChannelStatistics":
        """Statistics of `rows` [B, D], accumulated in float64 a few thousand rows at a time."""
        total, squares = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
        for first in range(0, len(rows), 4096):
            part = rows[first : first + 4096].astype(np.float64)
            total += part.sum(0)
            squares += np.einsum("bd,bd->d", part, part)
        return cls(len(rows), total, squares, float(np.abs(rows).max(initial=0)))

    def __add__(self, other: "ChannelStatistics") -> "ChannelStatistics":
        return ChannelStatistics(
            self.count + other.count,
            self.sum + other.sum,
            self.sum_squares + other.sum_squares,
            max(self.absmax, other.absmax),
        )

    @property
    def mean(self) -> NDArray[np.float64]:
        return self.sum / max(self.count, 1)

    @property
    def variance(self) -> NDArray[np.float64]:
        return np.maximum(self.sum_squares / max(self.count, 1) - self.mean**2, 0)

    def to_json(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "sum": self.sum.tolist(),
            "sum_squares": self.sum_squares.tolist(),
            "absmax": self.absmax,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ChannelStatistics":
        return cls(value["count"], np.array(value["sum"]), np.array(value["sum_squares"]), value["absmax"])


def shard_path(store: Path, hook_point: HookPoint, array: str, shard: int) -> Path:
    """zarr v3's default chunk key: c/<shard>/0/0 (patches, extra) or c/<shard>/0 (cls)."""
    tail = ("0",) if array == "cls" else ("0", "0")
    return store / ARRAYS / str(hook_point) / array / "c" / str(shard) / Path(*tail)


def layout_of(settings: Mapping[str, Any]) -> StoreLayout:
    """The layout that a store's settings describe."""
    rows, columns = settings["grid"]
    return StoreLayout(
        n_images=settings["n_images"],
        grid=(rows, columns),
        d_model=settings["d_model"],
        n_extra=settings["n_extra"],
        chunk_images=settings["chunk_images"],
        shard_images=settings["shard_images"],
        itemsize=check_dtype(settings["dtype"]).itemsize,
    )


class ActivationStore:
    """A complete store, open for reading.

    store = ActivationStore.open("val.acts")
    x = store.read(10, images=slice(0, 8), tokens="patch")    # float16 [8, 196, 768]
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.path = artifact.path
        self.layout = layout_of(artifact.settings)
        self.dtype = check_dtype(artifact.settings["dtype"])
        self.hook_points = tuple(HookPoint.parse(text) for text in artifact.settings["hook_points"])
        require_complete(artifact, self.layout.n_shards, "extract")
        self._manifest = read_manifest(artifact)

    @classmethod
    def open(cls, path: str | Path) -> "ActivationStore":
        """Open a complete store. Raises ArtifactNotFoundError, SchemaError, IncompleteError, CorruptError."""
        return cls(open_artifact(path, "acts"))

    def __repr__(self) -> str:
        return (
            f"ActivationStore({self.path.name}: {self.n_images:,} images x {self.n_tokens} tokens x "
            f"{self.layout.d_model}, {', '.join(map(str, self.hook_points))})"
        )

    @property
    def store_id(self) -> str:
        return self.artifact.id

    @property
    def model_id(self) -> str:
        return str(self.artifact.settings["model_id"])

    @property
    def n_images(self) -> int:
        return self.layout.n_images

    @property
    def n_tokens(self) -> int:
        return self.layout.n_tokens

    @cached_property
    def images(self) -> pa.Table:
        """images.parquet: one row a stored image, in stored order."""
        try:
            return pq.read_table(self.path / IMAGES_FILE)
        except (OSError, pa.ArrowException) as error:
            raise CorruptError(
                f"{self.path / IMAGES_FILE} cannot be read ({error}). Extract the store again."
            ) from error

    @cached_property
    def failed(self) -> dict[int, str]:
        """Images whose rows are zeros because they could not be read: image -> reason."""
        return {int(image): reason for image, reason in self._manifest["failed"].items()}

    @cached_property
    def valid(self) -> NDArray[np.bool_]:
        """[I]: true where the image was read."""
        mask = np.ones(self.n_images, dtype=bool)
        mask[list(self.failed)] = False
        return mask

    def hook_point(self, layer: int | HookPoint | None) -> HookPoint:
        """The stored hook point of a layer; None takes the only one. Raises SettingsError with what is stored."""
        stored = ", ".join(map(str, self.hook_points))
        if layer is None:
            if len(self.hook_points) > 1:
                raise SettingsError(f"{self.path} holds several hook points ({stored}). Choose one with --layer.")
            return self.hook_points[0]
        hook = layer if isinstance(layer, HookPoint) else HookPoint(layer)
        if hook not in self.hook_points:
            raise SettingsError(
                f"{hook} is not in {self.path}. Stored: {stored}. Extract it into a store of its own with --layer."
            )
        return hook

    def statistics(self, layer: int | HookPoint | None, tokens: Tokens = "all") -> ChannelStatistics:
        """Statistics of the stored values of one hook point, merged from the commit records."""
        kinds = self._manifest["statistics"][str(self.hook_point(layer))]
        parts = [ChannelStatistics.from_json(kinds[k]) for k in ("cls", "patch") if tokens in ("all", k)]
        return parts[0] + parts[1] if len(parts) == 2 else parts[0]

    def n_read_tokens(self, tokens: Tokens) -> int:
        """Tokens an image gives under `tokens`. Raises SettingsError for another word."""
        if tokens not in TOKENS:
            raise SettingsError(f"tokens must be one of {', '.join(TOKENS)}, got {tokens!r}.")
        return {"all": self.n_tokens, "patch": self.layout.n_patches, "cls": 1}[tokens]

    def read(
        self,
        layer: int | HookPoint | None = None,
        *,
        images: slice | Sequence[int] | NDArray[np.integer] = slice(None),
        tokens: Tokens = "all",
        out: NDArray[Any] | None = None,
        check: bool = False,
    ) -> NDArray[Any]:
        """Read activations.

        Args:
            images: stored positions, in any order.
            out: a C-contiguous array [I, T, D] of the store's dtype to read into; allocated when None.
            check: compare every chunk touched with its recorded checksum (reads whole chunks).

        Returns:
            [I, T, D] in the store's dtype; T as `tokens` says. Rows of failed images are zeros (see `valid`).

        Raises:
            SettingsError: an image index or hook point that is not stored.
            CorruptError: a shard is missing, short, or (with `check`) differs from what was written.
        """
        hook = self.hook_point(layer)
        n_tokens = self.n_read_tokens(tokens)
        positions = self._positions(images)
        if positions.size and (positions.min() < 0 or positions.max() >= self.n_images):
            raise SettingsError(
                f"Image indices must lie in 0..{self.n_images - 1}, got {positions.min()}..{positions.max()}."
            )
        shape = (len(positions), n_tokens, self.layout.d_model)
        if out is None:
            out = np.empty(shape, dtype=self.dtype)
        elif out.shape != shape or out.dtype != self.dtype or not out.flags.c_contiguous:
            raise SettingsError(f"out must be a C-contiguous {self.dtype} array of shape {shape}.")
        first_patch = 1 if tokens == "all" else 0
        for start, stop in _runs(positions, self.layout.chunk_images):
            run = range(int(positions[start]), int(positions[start]) + stop - start)
            part = out[start:stop]
            if tokens != "patch":
                self._read_run(hook, "cls", run, part[:, :1], check)
            if tokens != "cls":
                self._read_run(hook, "patches", run, part[:, first_patch:], check)
        return out

    def _positions(self, images: slice | Sequence[int] | NDArray[np.integer]) -> NDArray[np.integer]:
        if isinstance(images, slice):
            return np.arange(self.n_images)[images]
        positions = np.asarray(images)
        if positions.ndim != 1 or (positions.size and positions.dtype.kind not in "iu"):
            raise SettingsError(
                f"images must be a slice or a list of whole numbers, got {positions.dtype} of shape {positions.shape}. "
                "A mask is given as np.flatnonzero(mask)."
            )
        return positions

    def _read_run(self, hook: HookPoint, array: str, run: range, out: NDArray[Any], check: bool) -> None:
        """Read consecutive images of one block into `out` [n, T, D] (a view; each row of tokens contiguous)."""
        if self.artifact.settings["codec"] != "raw":
            self._read_encoded(hook, array, run, out, check)
            return
        layout = self.layout
        shard, offset = divmod(run.start, layout.shard_images)
        block, first = divmod(offset, layout.chunk_images)
        path = shard_path(self.path, hook, array, shard)
        image_bytes = layout.chunk_bytes(array) // layout.chunk_images
        columns = out.shape[1] // layout.n_rows(array)
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise self._corrupt(path, shard, f"cannot be opened ({error.strerror})") from error
        try:
            if os.fstat(fd).st_size != layout.shard_bytes(array, shard):
                raise self._corrupt(path, shard, "has the wrong size")
            if check:
                self._check_chunks(fd, path, array, shard, block)
            for row in range(layout.n_rows(array)):
                start = layout.chunk_offset(array, shard, block, row) + first * image_bytes
                buffers: Any = [out[i, row * columns : (row + 1) * columns] for i in range(len(run))]
                if os.preadv(fd, buffers, start) != len(run) * image_bytes:
                    raise self._corrupt(path, shard, "ended early")
        finally:
            os.close(fd)

    def _read_encoded(self, hook: HookPoint, array: str, run: range, out: NDArray[Any], check: bool) -> None:
        import zarr

        shard = run.start // self.layout.shard_images
        path = shard_path(self.path, hook, array, shard)
        if not path.exists() or not path.stat().st_size:  # zarr would answer zeros
            raise self._corrupt(path, shard, "is missing or empty")
        if check and (problem := check_file(path, self._recorded(path, shard))):
            raise self._corrupt(path, shard, problem)
        folder = self.path / ARRAYS / str(hook) / array
        try:
            values = np.asarray(zarr.open_array(folder, mode="r")[run.start : run.stop])
        except Exception as error:  # zarr and its codecs raise what they like
            raise self._corrupt(path, shard, f"cannot be decoded ({error})") from error
        out[:] = values[:, None] if array == "cls" else values

    def _recorded(self, path: Path, shard: int) -> dict[str, Any]:
        """Digest of a shard file, from its commit record."""
        recorded = read_record(self.path, shard)["files"].get(os.path.relpath(path, self.path))
        if not is_digest(recorded):
            raise self._corrupt(path, shard, "has a garbled commit record")
        return dict(recorded)

    def _check_chunks(self, fd: int, path: Path, array: str, shard: int, block: int) -> None:
        pieces = self._recorded(path, shard)["pieces"]
        chunk: Any = np.empty(self.layout.chunk_bytes(array), dtype=np.uint8)
        for row in range(self.layout.n_rows(array)):
            os.preadv(fd, [chunk], self.layout.chunk_offset(array, shard, block, row))
            if crc32c(chunk) != pieces[row * self.layout.n_blocks(shard) + block][1]:
                raise self._corrupt(path, shard, f"differs from what was written (block {block}, patch row {row})")

    def _corrupt(self, path: Path, shard: int, what: str) -> CorruptError:
        return CorruptError(
            f"Shard {shard} of {self.path}, file {os.path.relpath(path, self.path)}, {what}. "
            f"Run `verify {self.path}` to see all damage, then extract again with --overwrite."
        )


def _runs(positions: NDArray[np.integer], chunk_images: int) -> list[tuple[int, int]]:
    """Cut positions into runs of consecutive images inside one block: [(start, stop)] into `positions`."""
    if not len(positions):
        return []
    breaks = (np.diff(positions) != 1) | (positions[1:] % chunk_images == 0)
    edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(positions)]
    return list(pairwise(edges))
