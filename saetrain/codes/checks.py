"""Checks of the arrays of codes when they are read: checksums where they cost little, structure always.

The structure is what no reader may rely on blindly: pointers that ascend from 0 to the number of entries, rows and
latents in range, values that are finite and not negative. It costs 0.1 ns per entry, where `query --group` takes 26 and
`analyze` 90; a checksum costs 0.6 to 1.1 ns. A checksum finds every change, but reads arrays whole. It is compared by
readers that read them whole anyway, by `analyze` where the page cache holds the codes, and at every first touch of
codes so small that this takes less than 15 ms.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache import CorruptError
from actcache.artifacts import Artifact, check_once, is_digest, read_record
from saetrain.codes.settings import DTYPES, CodesSettings

CODES = "codes.zarr"
BY_ROW, BY_LATENT = ("indptr", "latent", "value"), ("latent_indptr", "row", "latent_value")
COLUMNS = (*BY_ROW, *BY_LATENT)

SMALL_BYTES, SMALL_SHARDS = 1 << 24, 32
"""Codes up to this size are checked whole at the first touch: 0.35 ms per shard, and 2 ms for all bytes together."""
_LARGEST = 0x7BFF
"""Bits of the largest finite float16. Those of NaN, of infinity and of whatever has a sign are larger."""


class ArrayChecks:
    """What has been checked of the arrays of one code store."""

    def __init__(self, artifact: Artifact, settings: CodesSettings, n_entries: int) -> None:
        self.artifact = artifact
        n_shards, dtypes = len(settings.shard_sizes), settings.numpy_dtypes
        n_pointers = settings.n_images * settings.n_tokens + n_shards * (settings.n_latents + 2)
        lengths = {name: n_pointers if name.endswith("indptr") else n_entries for name in DTYPES}
        self.n_bytes = sum(lengths[name] * dtypes[name].itemsize for name in DTYPES)
        self.small = self.n_bytes <= SMALL_BYTES and n_shards <= SMALL_SHARDS
        self._touched: set[int] = set()

    def check_once(self, shard: int) -> None:
        """Compare all arrays of a shard with their checksums when it is first read, if the codes are small."""
        if self.small and shard not in self._touched:
            self.check_arrays(shard, COLUMNS)
            self._touched.add(shard)

    def check_arrays(self, shard: int, columns: tuple[str, ...]) -> None:
        """Compare arrays of a shard with their checksums, unless this process has. Raises CorruptError."""
        files = read_record(self.artifact.path, shard)["files"]
        for column in columns:
            name = f"{CODES}/{shard}/{column}/c/0"
            digest = files.get(name)
            if not is_digest(digest):
                raise self.corrupt(shard, f"has no checksum of its array {column}")
            if problem := check_once(Path(f"{self.artifact.path}/{name}"), digest):
                there = os.path.exists(f"{self.artifact.path}/{name}")
                what = f"has an array {column} ({name}) that {problem}" if there else f"has no readable array {column}"
                raise self.corrupt(shard, what)

    def check_pointers(self, shard: int, pointers: NDArray[np.int64], n_entries: int, *, whole: bool) -> None:
        """Raise CorruptError unless pointers ascend within 0..n_entries, and reach both ends if they are `whole`."""
        first, last = int(pointers[0]), int(pointers[-1])
        sound = (first, last) == (0, n_entries) if whole else 0 <= first <= last <= n_entries
        if not sound or (pointers[1:] < pointers[:-1]).any():
            raise self.inconsistent(shard)

    def check_numbers(self, shard: int, numbers: NDArray[Any], start: int, stop: int) -> None:
        """Raise CorruptError unless all rows (or latents) lie in start..stop - 1."""
        if numbers.size and not start <= int(numbers.min()) <= int(numbers.max()) < stop:
            raise self.inconsistent(shard)

    def check_values(self, shard: int, values: NDArray[np.float16]) -> None:
        """Raise CorruptError unless values are finite and not negative."""
        if values.size and int(values.view(np.uint16).max()) > _LARGEST:
            raise self.inconsistent(shard)

    def inconsistent(self, shard: int) -> CorruptError:
        return self.corrupt(shard, "has arrays that contradict each other or hold values out of range")

    def corrupt(self, shard: int, what: str) -> CorruptError:
        return CorruptError(
            f"Shard {shard} of {self.artifact.path} {what}. Run `verify {self.artifact.path}`, then encode again."
        )
