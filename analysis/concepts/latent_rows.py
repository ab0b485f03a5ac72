"""LatentRows: the rows of one latent out of a Parquet file that is sorted by latent, without reading all others.

The footer says between which latents the rows of each row group lie. Only the groups of the wanted latent are read, and
the newest are kept. A file of an older version that is not sorted is read whole and sorted.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

LATENT = "latent"
N_KEPT = 32
"""Row groups that are kept: of 65,536 rows with five numbers each, 42 MB."""


class _Rows(NamedTuple):
    """Rows, and the latents that they are of, ascending."""

    table: pa.Table
    latent: NDArray[np.int64]

    def of(self, latent: int) -> pa.Table:
        first, last = np.searchsorted(self.latent, [latent, latent + 1]).tolist()
        return self.table.slice(first, last - first)


class LatentRows:
    """The rows of a file by latent. Several threads may ask.

    Args:
        open_file: opens the file anew. check: raises where a table that was read is not what readers rely on.

    Raises what pyarrow raises for a damaged file, and what `check` does; so does `rows_of`.
    """

    def __init__(self, open_file: Callable[[], IO[bytes]], check: Callable[[pa.Table], None]) -> None:
        self._open_file, self._check = open_file, check
        with open_file() as file:
            opened = pq.ParquetFile(file, pre_buffer=False)
            self._metadata, self._empty = opened.metadata, opened.schema_arrow.empty_table()
        check(self._empty)
        self._kept: OrderedDict[int, _Rows] = OrderedDict()
        self._lock = threading.Lock()
        self._groups, edges = _find_groups(self._metadata)
        self._first, self._last = edges[:, 0], edges[:, 1]
        in_order = len(self._groups) == len(edges) and not (self._first[1:] < self._last[:-1]).any()
        self._sorted = None if in_order else self._sort_all()

    def rows_of(self, latent: int) -> pa.Table:
        """The rows of one latent, in the order of the file."""
        with self._lock:
            if self._sorted is None:
                start, stop = np.searchsorted(self._last, latent), np.searchsorted(self._first, latent, side="right")
                parts = [self._read(group) for group in self._groups[start:stop]]
                if None not in parts:
                    found = [part.of(latent) for part in parts if part is not None]
                    return pa.concat_tables(found or [self._empty]).unify_dictionaries()
                self._sorted = self._sort_all()
        return self._sorted.of(latent)

    def _read(self, group: int) -> _Rows | None:
        """A row group; None if its rows are not sorted by latent."""
        if group in self._kept:
            self._kept.move_to_end(group)
            return self._kept[group]
        with self._open_file() as file:
            opened = pq.ParquetFile(file, metadata=self._metadata, pre_buffer=False)
            table = opened.read_row_group(group, use_threads=False)
        self._check(table)
        latent = table[LATENT].to_numpy()
        if (latent[1:] < latent[:-1]).any():
            return None
        self._kept[group] = _Rows(table, latent)
        while len(self._kept) > N_KEPT:
            self._kept.popitem(last=False)
        return self._kept[group]

    def _sort_all(self) -> _Rows:
        with self._open_file() as file:
            table = pq.ParquetFile(file, metadata=self._metadata, pre_buffer=False).read(use_threads=False)
        self._check(table)
        latent = table[LATENT].to_numpy()
        order = np.argsort(latent, kind="stable")
        return _Rows(table.take(order), latent[order])


def _find_groups(metadata: pq.FileMetaData) -> tuple[list[int], NDArray[np.int64]]:
    """(the row groups that hold rows, [n, 2] the first and last latents of those whose footer says so)."""
    groups, edges = [], []
    column = metadata.schema.names.index(LATENT)
    for group in range(metadata.num_row_groups):
        described = metadata.row_group(group)
        if not described.num_rows:
            continue
        groups.append(group)
        statistics = described.column(column).statistics
        if statistics is not None and statistics.has_min_max:
            edges.append((statistics.min, statistics.max))
    return groups, np.array(edges, dtype=np.int64).reshape(-1, 2)
