"""images.parquet: the table of images of a store, of codes and of a concept table, which copy it.

Promise: a table that is read has one row per image, and the columns that every reader relies on, in their types and
without nulls, whoever wrote it; a sealed one is compared with its checksum.

Tables are read without pyarrow's threads: one that still holds a buffer of ours when Python ends aborts the process
(2 of 100 short commands did).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actcache.artifacts import MANIFEST_FILE, Artifact, open_checked, open_plain, read_seal
from actcache.errors import CorruptError
from actcache.seen import CONTENT_HASH, HASH_BYTES, unpack_hashes

IMAGES_FILE, CONTENT_FILE = "images.parquet", "content.bin"

_COLUMNS: dict[str, tuple[pa.DataType, Any]] = {
    "uri": (pa.string(), None), "label": (pa.int32(), -1), "label_name": (pa.string(), ""), "bytes": (pa.int64(), -1),
}  # fmt: skip
"""Type of each required column, and what stands for a null; a uri cannot be null."""


def read_images(store: Path) -> pa.Table:
    """images.parquet of a store, complete or not. Raises CorruptError."""
    with table_errors(store / IMAGES_FILE, f"Run `verify {store} --repair`."), open_plain(store / IMAGES_FILE) as file:
        return pq.ParquetFile(file, pre_buffer=False).read(use_threads=False)


def load_images(artifact: Artifact, n_images: int | None = None) -> pa.Table:
    """images.parquet of a complete artifact, of `n_images` images if that is known; and `content_hash`, if it has the
    hashes of the images. Raises CorruptError.
    """
    path, advice = artifact.path / IMAGES_FILE, artifact.remedy
    with open_checked(artifact, IMAGES_FILE) as file, table_errors(path, advice):
        table = pq.ParquetFile(file, pre_buffer=False).read(use_threads=False)
    if n_images is not None:
        check_rows(artifact, table.num_rows, n_images)
    with table_errors(path, advice):
        for name, (kind, empty) in _COLUMNS.items():
            if name not in table.column_names:
                raise ValueError(f"it has no column {name}")
            column = table[name].cast(kind)
            if column.null_count:
                if empty is None:
                    raise ValueError(f"its column {name} has nulls")
                column = pc.fill_null(column, pa.scalar(empty, kind))
            if column is not table[name]:
                table = table.set_column(table.column_names.index(name), name, column)
    hashes = read_column(artifact, CONTENT_FILE, HASH_BYTES * table.num_rows)
    return table if hashes is None else table.append_column(CONTENT_HASH, unpack_hashes(hashes))


def read_column(artifact: Artifact, name: str, n_bytes: int) -> bytes | None:
    """A file that holds the same number of bytes for every image; None if the artifact has no such file.

    Raises CorruptError.
    """
    files = read_seal(artifact).get("files") if artifact.complete else {}
    if not isinstance(files, dict):
        raise CorruptError(f"{artifact.path / MANIFEST_FILE} lists no files. {artifact.remedy}")
    if name not in files:
        return None
    with open_checked(artifact, name) as file:
        data = bytes(file.read())
    if len(data) != n_bytes:
        raise CorruptError(f"{artifact.path / name} has {len(data):,} bytes, expected {n_bytes:,}. {artifact.remedy}")
    return data


def check_images_footer(artifact: Artifact, n_images: int) -> None:
    """Raise CorruptError unless images.parquet claims to hold `n_images` rows; only its footer is read."""
    path = artifact.path / IMAGES_FILE
    with table_errors(path, artifact.remedy), open_plain(path) as file:
        n_rows = pq.read_metadata(file).num_rows
    check_rows(artifact, n_rows, n_images)


def check_rows(artifact: Artifact, n_rows: int, n_images: int) -> None:
    if n_rows != n_images:
        raise CorruptError(
            f"{artifact.path / IMAGES_FILE} has {n_rows:,} rows, expected {n_images:,}. {artifact.remedy}"
        )


@contextmanager
def table_errors(path: Path, advice: str) -> Iterator[None]:
    """Turn what pyarrow raises for a damaged Parquet file into one line."""
    try:
        yield
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        if isinstance(error, CorruptError):
            raise
        what = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CorruptError(f"{path} cannot be read ({what}). {advice}") from error
