"""CodeStore: sparse codes on disk, cut along the image axis exactly like the activations.

    artifact.json  images.parquet  commits/  manifest.json
    codes.zarr/<shard>/indptr [rows + 1], latent [nnz], value [nnz]              by row
                       latent_indptr [F + 1], row [nnz], latent_value [nnz]      the same entries by latent

row = image * n_tokens + token, over the whole store. Reading codes needs no torch.
"""

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from actcache import CorruptError, HookPoint, SettingsError
from actcache.artifacts import (
    MANIFEST_FILE,
    Artifact,
    open_artifact,
    read_settings,
    read_summary,
    require_complete,
)
from actcache.machine import available_bytes, read_into
from actcache.notebook import draw_facts
from actcache.preprocess import Preprocess, covered_shares
from actcache.store import IMAGES_FILE, check_images_footer, load_images, read_column, table_errors
from saetrain.codes.checks import BY_LATENT, BY_ROW, CODES, COLUMNS, ArrayChecks
from saetrain.codes.entries import LatentCodes, RowCodes, ShardCodes, drop_zeros, has_zeros
from saetrain.codes.settings import CodesSeal, CodesSettings, CodesSummary

SPARSE = 512
"""A range is read on its own where there are this many elements of the array for each."""
SEEN_FILE = "seen.bin"
"""One byte for each image: 1 if the run, or the model behind it, has learned from the image. Absent in older codes."""


class CodeStore:
    """Complete codes, open for reading.

    codes = CodeStore.open("val.codes"); codes.read_shard(0).latent
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact, self.path, self.codes_id = artifact, artifact.path, artifact.id
        settings = read_settings(artifact, CodesSettings)
        self.n_images, self.n_tokens, self.n_latents = settings.n_images, settings.n_tokens, settings.n_latents
        self.shard_sizes = np.array(settings.shard_sizes, dtype=np.int64)
        self.n_shards = len(self.shard_sizes)
        self.grid, self.tokens, self.dtypes = settings.grid, settings.tokens, settings.numpy_dtypes
        self.hook_point = HookPoint.parse(settings.hook_point)
        self.bytes_read = 0  # of codes.zarr, by this object
        self._zeros: dict[int, bool] = {}
        require_complete(artifact, self.n_shards)
        self._seal = read_summary(artifact, CodesSeal)
        if outside := [image for image in self._seal.failed if image >= self.n_images]:
            raise CorruptError(
                f"{self.path / MANIFEST_FILE} lists image {outside[0]} as failed, but there are {self.n_images:,} "
                f"images. {artifact.remedy}"
            )
        self._checks = ArrayChecks(artifact, settings, self.n_entries)

    @classmethod
    def open(cls, path: str | Path) -> "CodeStore":
        """Open complete codes. Raises ArtifactNotFoundError, SchemaError, IncompleteError, CorruptError."""
        return cls(open_artifact(path, "codes"))

    @property
    def preprocess(self) -> Preprocess:
        """How the model saw the images. Raises CorruptError, and SettingsError where there are none."""
        if not self.artifact.settings["preprocess"]:
            raise SettingsError(
                f"{self.path} was made from activations without images, so there are no pixels to compare with. "
                "Import the activations again and name the images: `import --images`."
            )
        return Preprocess.from_json(self.artifact.settings["preprocess"])

    @cached_property
    def covered(self) -> tuple[float, float]:
        """The share of a picture's height and of its width that lies under patches, from its upper left corner."""
        if not self.artifact.settings["preprocess"]:
            return 1.0, 1.0
        return covered_shares(self.preprocess.size, self.grid, self._seal.patch_size or (None, None))

    def __repr__(self) -> str:
        return (
            f"CodeStore({self.path.name}: {self.n_images:,} images x {self.n_tokens} tokens, "
            f"{self.n_latents:,} latents, {self.n_entries:,} entries)"
        )

    def _repr_html_(self) -> str:
        encoded = {"all": self.n_tokens, "patch": self.n_tokens - 1, "cls": 1}[self.tokens]
        n_rows = (self.n_images - len(self._seal.failed)) * encoded
        facts = {
            "images": self.n_images,
            "without codes": len(self._seal.failed),
            "tokens of an image": f"{encoded:,} of {self.n_tokens:,}",
            "latents": self.n_latents,
            "entries": f"{self.n_entries:,}, {self.n_entries / max(n_rows, 1):.1f} a token",
            "hook point": str(self.hook_point),
            "codes id": self.codes_id,
        }
        return draw_facts(f"Codes {self.path.name}", facts)

    @property
    def summary(self) -> CodesSummary:
        """What the seal says."""
        failed = {str(image): reason for image, reason in self._seal.failed.items()}
        return {"n_entries": self._seal.n_entries, "failed": failed, "n_underflowed": self._seal.n_underflowed}

    @property
    def n_entries(self) -> int:
        """Number of values above 0, of all tokens together."""
        return self._seal.n_entries

    @cached_property
    def images(self) -> pa.Table:
        """The images, copied from the store, with their hashes if it has them. Raises CorruptError."""
        table = load_images(self.artifact, self.n_images)
        if "store" in table.column_names:
            n_stores = sum(name.split()[0] == "images" for name in self.artifact.parents)
            with table_errors(self.path / IMAGES_FILE, self.artifact.remedy):
                numbers = table["store"].cast(pa.int64())
                if numbers.null_count or not 0 <= pc.min(numbers).as_py() <= pc.max(numbers).as_py() < n_stores:
                    raise ValueError(f"its column store does not number {n_stores} stores from 0")
        return table

    @cached_property
    def seen(self) -> NDArray[np.bool_] | None:
        """[I]: whether the run, or the model, has learned from the image; None where that was not recorded."""
        data = read_column(self.artifact, SEEN_FILE, self.n_images)
        return None if data is None else np.asarray(np.frombuffer(data, np.uint8) != 0)

    @cached_property
    def valid(self) -> NDArray[np.bool_]:
        """[I]: whether the image was read and encoded."""
        check_images_footer(self.artifact, self.n_images)  # before memory is allocated for what the settings claim
        valid = np.ones(self.n_images, dtype=bool)
        valid[list(self._seal.failed)] = False
        return valid

    def shard_range(self, shard: int) -> range:
        """The images of a shard."""
        first = int(self.shard_sizes[:shard].sum())
        return range(first, first + int(self.shard_sizes[shard]))

    def read_shard(self, shard: int) -> ShardCodes:
        """Read all arrays of a shard. Raises CorruptError if one is not what was written."""
        self.check_shard(shard, COLUMNS)
        columns = {name: self._read(shard, name) for name in COLUMNS}
        images = self.shard_range(shard)
        sizes = {name: values.size for name, values in columns.items()}
        pointers = {"indptr": len(images) * self.n_tokens + 1, "latent_indptr": self.n_latents + 1}
        entries = dict.fromkeys(("latent", "value", "row", "latent_value"), sizes["value"])
        if sizes != {**pointers, **entries}:
            raise self._checks.inconsistent(shard)
        for name in pointers:
            self._checks.check_pointers(shard, columns[name], sizes["value"], whole=True)
        self.check_entries(shard, columns["row"], columns["latent_value"])
        self._checks.check_numbers(shard, columns["latent"], 0, self.n_latents)
        self._checks.check_values(shard, columns["value"])
        return drop_zeros(ShardCodes(first_row=images.start * self.n_tokens, **columns))

    def read_latent(self, latent: int) -> tuple[NDArray[np.int64], NDArray[np.float16]]:
        """Read the rows and values of one latent in all shards, and nothing but its own entries.

        Raises:
            SettingsError: the latent does not exist.
            CorruptError: an array is missing or too short.
        """
        parts = [self.read_latents(shard, latent, latent + 1) for shard in range(self.n_shards)]
        rows = np.concatenate([part.row for part in parts]).astype(np.int64)
        if (rows[1:] <= rows[:-1]).any():  # entries of another latent are among them
            raise CorruptError(f"{self.path} holds rows of latent {latent} that do not ascend. {self.artifact.remedy}")
        return rows, np.concatenate([part.latent_value for part in parts])

    def read_by_latent(self, shard: int) -> LatentCodes:
        """Map all entries of a shard by latent into memory, which reads only what is used. Raises as `read_shard`."""
        self.check_shard(shard, BY_LATENT)
        indptr, row, value = (self._map(shard, name) for name in BY_LATENT)
        if indptr.size != self.n_latents + 1 or row.size != value.size:
            raise self._checks.inconsistent(shard)
        self._checks.check_pointers(shard, indptr, row.size, whole=True)
        self.check_entries(shard, row, value)
        self.bytes_read += indptr.nbytes + row.nbytes + value.nbytes
        codes = LatentCodes(indptr, row, value)
        return drop_zeros(codes) if self._has_zeros(shard) else codes

    def read_latents(self, shard: int, start: int, stop: int) -> LatentCodes:
        """Read the entries of the latents start to stop - 1 in one shard. Raises as `read_latent`."""
        indptr = self.read_pointers(shard, start, stop)
        first, last = int(indptr[0]), int(indptr[-1])
        if first == last:  # frequent with many shards; no other file is opened
            dtypes = self.dtypes
            return LatentCodes(indptr - first, np.empty(0, dtypes["row"]), np.empty(0, dtypes["latent_value"]))
        row, value = (self._read(shard, name, first, last) for name in ("row", "latent_value"))
        self.check_entries(shard, row, value)
        return drop_zeros(LatentCodes(indptr - first, row, value))

    def read_pointers(self, shard: int, start: int, stop: int) -> NDArray[np.int64]:
        """[stop - start + 1]: where the entries of the latents start to stop - 1 begin in one shard."""
        for latent in (start, stop - 1):
            if not 0 <= latent < self.n_latents:
                raise SettingsError(
                    f"A latent must lie in 0..{self.n_latents - 1}, got {latent}. Give a latent of this dictionary."
                )
        self._checks.check_once(shard)
        indptr = self._read(shard, "latent_indptr", start, stop + 1)
        stored = (
            self._count(shard, "row") if indptr[-1] > indptr[0] else int(indptr[-1])
        )  # before room is made for them
        self._checks.check_pointers(shard, indptr, stored, whole=False)
        return indptr

    def count_latents(self, shard: int) -> NDArray[np.int64]:
        """Count the entries of each latent in one shard: [F]."""
        if self._has_zeros(shard):
            return np.diff(self.read_latents(shard, 0, self.n_latents).latent_indptr)
        self._checks.check_once(shard)
        pointers = self._read(shard, "latent_indptr", 0, self.n_latents + 1)
        self._checks.check_pointers(shard, pointers, int(pointers[-1]), whole=True)
        return np.diff(pointers)

    def _has_zeros(self, shard: int) -> bool:
        """Whether a shard holds entries of value 0. `encode` writes none since it counts them; others may have."""
        if self._seal.n_underflowed is not None:
            return False
        if shard not in self._zeros:
            self._zeros[shard] = has_zeros(self._map(shard, "latent_value"))
        return self._zeros[shard]

    def read_rows(self, rows: NDArray[np.int64]) -> RowCodes:
        """Read the entries of some tokens, and nothing else.

        Args:
            rows: [n] image * n_tokens + token, ascending.

        Raises:
            CorruptError: an array is missing or inconsistent.
        """
        cuts = np.searchsorted(rows, np.cumsum(self.shard_sizes)[:-1] * self.n_tokens)
        parts = [self._read_rows(shard, part) for shard, part in enumerate(np.split(rows, cuts)) if len(part)]
        if not parts:
            return RowCodes(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float16))
        return RowCodes._make(np.concatenate(column) for column in zip(*parts, strict=True))

    def _read_rows(self, shard: int, rows: NDArray[np.int64]) -> RowCodes:
        self._checks.check_once(shard)
        images = self.shard_range(shard)
        local = rows - images.start * self.n_tokens
        gap = np.diff(local) != 1
        first, stop = local[np.r_[True, gap]], local[np.r_[gap, True]] + 1  # runs of consecutive rows
        pointers, n_pointers = self._read_ranges(shard, "indptr", first, stop + 1)
        run = np.repeat(np.arange(len(first)), stop - first + 1)
        start, end = (part[run[1:] == run[:-1]] for part in (pointers[:-1], pointers[1:]))
        count = end - start
        if n_pointers != len(images) * self.n_tokens + 1 or not (start.min() >= 0 and count.min() >= 0):
            raise self._checks.inconsistent(shard)
        last = np.cumsum(stop - first + 1) - 1
        entries = pointers[last - (stop - first)], pointers[last]
        (latent, n_latents), (value, n_values) = (self._read_ranges(shard, name, *entries) for name in BY_ROW[1:])
        if n_latents != n_values:
            raise self._checks.inconsistent(shard)
        codes = RowCodes(np.repeat(rows, count), latent.astype(np.int64), value)
        self._checks.check_numbers(shard, codes.latent, 0, self.n_latents)
        self._checks.check_values(shard, codes.value)
        self.bytes_read += pointers.nbytes + latent.nbytes + value.nbytes
        if has_zeros(codes.value):
            codes = RowCodes._make(column[codes.value != 0] for column in codes)
        return codes

    def _read_ranges(
        self, shard: int, column: str, starts: NDArray[np.int64], stops: NDArray[np.int64]
    ) -> tuple[NDArray[Any], int]:
        """(the elements starts[i] to stops[i] - 1 of one raw array, joined; how many elements the array has).

        A few ranges are read one by one: pages of a new memory map cost 24 microseconds for a token, a call costs 4.
        """
        dtype, path = self.dtypes[column], self._file(shard, column)
        try:
            size = os.path.getsize(path) // dtype.itemsize
            if not (starts.min() >= 0 and (starts <= stops).all() and stops.max() <= size):
                raise self._checks.inconsistent(shard)
            count = stops - starts
            if size < SPARSE * len(starts):
                index = np.repeat(starts - np.cumsum(count) + count, count) + np.arange(count.sum())
                return self._map(shard, column)[index], size
            file = os.open(path, os.O_RDONLY)
            try:
                places = zip((count * dtype.itemsize).tolist(), (starts * dtype.itemsize).tolist(), strict=True)
                data = b"".join([os.pread(file, n_bytes, place) for n_bytes, place in places])
            finally:
                os.close(file)
        except OSError as error:
            if isinstance(error, CorruptError):
                raise
            raise self._unreadable(shard, column, error) from error
        if len(data) != count.sum() * dtype.itemsize:
            raise self._checks.inconsistent(shard)
        return np.frombuffer(data, dtype), size

    def check_shard(self, shard: int, columns: tuple[str, ...] = BY_LATENT) -> None:
        """Compare arrays of a shard with their checksums, unless this process has done so. Raises CorruptError."""
        self._checks.check_arrays(shard, columns)

    @property
    def fits_cache(self) -> bool:
        """Whether the page cache can hold the codes, so that checking them costs no second reading of the disk."""
        return self._checks.n_bytes < available_bytes() / 2

    def check_entries(self, shard: int, row: NDArray[Any], value: NDArray[np.float16]) -> None:
        """Raise CorruptError unless the rows lie in the shard and the values can be activations."""
        images = self.shard_range(shard)
        self._checks.check_numbers(shard, row, images.start * self.n_tokens, images.stop * self.n_tokens)
        self._checks.check_values(shard, value)

    def read_into(self, shard: int, column: str, start: int, out: NDArray[Any]) -> None:
        """Fill an array with the elements of one raw array from `start` on. Raises CorruptError."""
        try:
            file = os.open(self._file(shard, column), os.O_RDONLY)
            try:
                n_bytes = read_into(file, [out.view(np.uint8).data], start * out.itemsize)
            finally:
                os.close(file)
        except OSError as error:
            raise self._unreadable(shard, column, error) from error
        if n_bytes != out.nbytes:
            raise self._checks.inconsistent(shard)
        self.bytes_read += n_bytes

    def _read(self, shard: int, column: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Read the elements start to stop - 1 of one raw array, or all of it if `stop` is None."""
        dtype = self.dtypes[column]
        try:
            if stop is None:
                part = np.fromfile(self._file(shard, column), dtype)
            else:
                file = os.open(self._file(shard, column), os.O_RDONLY)  # a memory map takes five times as long
                try:
                    if not 0 <= start <= stop <= os.fstat(file).st_size // dtype.itemsize:
                        raise self._checks.inconsistent(shard)
                    data = os.pread(file, (stop - start) * dtype.itemsize, start * dtype.itemsize)
                finally:
                    os.close(file)
                part = np.frombuffer(data, dtype)
        except (OSError, ValueError) as error:
            if isinstance(error, CorruptError):
                raise
            raise self._unreadable(shard, column, error) from error
        self.bytes_read += part.nbytes
        return part

    def _map(self, shard: int, column: str) -> NDArray[Any]:
        """Map one raw array into memory: using an element reads only its own page."""
        dtype = self.dtypes[column]
        try:
            file = self._file(shard, column)
            return np.memmap(file, dtype=dtype, mode="r") if os.path.getsize(file) else np.empty(0, dtype=dtype)
        except (OSError, ValueError) as error:
            raise self._unreadable(shard, column, error) from error

    def _count(self, shard: int, column: str) -> int:
        """The number of elements of one raw array."""
        try:
            return os.path.getsize(self._file(shard, column)) // self.dtypes[column].itemsize
        except OSError as error:
            raise self._unreadable(shard, column, error) from error

    def _file(self, shard: int, column: str) -> str:
        return f"{self.path}/{CODES}/{shard}/{column}/c/0"

    def _unreadable(self, shard: int, column: str, error: Exception) -> CorruptError:
        return self._checks.corrupt(shard, f"has no readable array {column} ({error})")
