"""Images inside of Parquet files, as Hugging Face's hub has them.

In: a Parquet file with a column of encoded images (bytes, or a struct of bytes and path), or a folder of such files,
e.g. a snapshot with `data/train-00000-of-00002.parquet`. Out: a plan whose uris are `<split>/<row>`, the same as those
of the dataset saved to disk. Only one row group of images is in memory for each file that is listed or image read.
"""

import os
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actcache.errors import ImageSourceError
from actcache.sources.arrow_types import holds_images, is_text, list_names
from actcache.sources.columns import Features, choose_image, read_features
from actcache.sources.labels import LabeledColumns
from actcache.sources.listing import check_text, list_files
from actcache.sources.plan import announce
from actcache.sources.splits import Split, SplitSource, list_splits, row_of
from actcache.sources.table_file import READER_ERRORS, check_regular, not_a_table

CACHE_BYTES = 256 << 20
"""Row groups of images that are kept for further reads. Small datasets fit whole; in large ones, whose images are read
in random order, each image costs reading its row group."""

FILE_COLUMNS = ("path", "file", "filename", "uri")
"""Columns of paths that count before a column of images, if their files are there."""

SPLITS = "train|training|test|testing|validation|valid|val|dev|all"


@dataclass(frozen=True)
class ImageParquet(SplitSource):
    """Images inside of a Parquet file or of a folder of such files.

    The image column is the only one of images, or, among several, one of the usual names or `path_column`; an image
    column `mask` holds pixel masks. Labels are as in `ImageTable`; class names are those that Hugging Face writes into
    the file. Columns of plain values are kept. The column `split` is taken from the names of files or folders.
    """

    _groups: "_RowGroups" = field(default_factory=lambda: _RowGroups(), repr=False, compare=False)

    def __init__(self, path: str | Path, *, path_column: str | None = None, label: str | None = None) -> None:
        super().__init__(path, path_column=path_column, label=label)
        object.__setattr__(self, "_groups", _RowGroups())

    def _cell(self, uri: str, what: str) -> bytes | None:
        key, number = row_of(uri)
        for file in self._files:
            if file.key == key and file.first <= number < file.first + file.n_rows:
                column = file.image if what == "image" else file.mask
                return None if column is None else self._groups.read(file, column, number - file.first)
        raise ImageSourceError(f"{uri} is not in {self.path.name}.")

    @cached_property
    def _listing(self) -> LabeledColumns:
        """The columns of the plan. Notes are shown once, and not to those who only read images."""
        parts: dict[str, list[_File]] = {}
        for file in self._files:
            parts.setdefault(file.key, []).append(file)
        splits = [self._join(key, files) for key, files in sorted(parts.items())]
        listed = list_splits(splits, self.path.name, self.label)
        first = self._files[0]
        usual = _usual_image(first.schema, self.path.name, first.features)
        chosen = {**({} if first.image == usual else {"path": first.image}), **listed.chosen}
        announce(listed.notes)
        return LabeledColumns(listed.columns, listed.notes, chosen)

    def _join(self, key: str, files: "list[_File]") -> Split:
        tables, sizes, masks = [], [], []
        for file in files:
            try:
                names = [name for name in file.schema.names if name not in (file.image, file.mask)]
                table = pq.ParquetFile(file.path).read(columns=names)
                table.validate(full=True)
                tables.append(table.select([name for name in names if not re.fullmatch(r"__index_level_\d+__", name)]))
                sizes.append(file.sizes(file.image))
                masks.append(None if file.mask is None else pc.greater_equal(file.sizes(file.mask), 0))
            except READER_ERRORS as error:
                raise not_a_table(file.path, error) from error
        if len({table.schema.remove_metadata() for table in tables}) > 1 and len({mask is None for mask in masks}) > 1:
            raise ImageSourceError(f"{self.path.name} has files whose columns differ. Give one of the files.")
        try:
            columns = pa.concat_tables(tables, promote_options="default")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            reason = str(error).splitlines()[0]
            raise ImageSourceError(
                f"{self.path.name} has files whose columns differ: {reason}. Give one of them."
            ) from error
        has_mask = None if masks[0] is None else pa.concat_arrays(masks)
        return Split(key, files[0].split, columns, pa.concat_arrays(sizes), has_mask, files[0].features.class_names)

    @cached_property
    def _files(self) -> "list[_File]":
        if not self.path.is_dir():
            places = [self.path]
        else:
            names = list_files(self.path, (".parquet",)).names
            check_text(names)
            places = [self.path / name for name in names]
        files: list[_File] = []
        folders = {place.parent for place in places}
        for place in places:
            split, folder = _name_split(place, self.path)
            key = f"{folder}/{split}" if folder and len(folders) > 1 else split
            first = sum(file.n_rows for file in files if file.key == key)
            files.append(_open_file(place, self.path_column, key, split, first))
        return files


def find_images(path: Path, path_column: str | None = None) -> bool:
    """Whether a Parquet file holds the images themselves. False for a file that cannot be read."""
    try:
        check_regular(path)
        schema = pq.ParquetFile(path).schema_arrow
    except READER_ERRORS:
        return False
    if path_column is not None:
        return path_column in schema.names and holds_images(schema.field(path_column).type)
    return choose_image(schema, None, path.name, read_features(schema)) is not None and not _names_files(path, schema)


def _names_files(path: Path, schema: pa.Schema) -> bool:
    """Whether a column of paths names files that are there, so that the column of images is only a preview of them."""
    name = next((name for name in FILE_COLUMNS if name in schema.names and is_text(schema.field(name).type)), None)
    if name is None:
        return False
    try:
        batch = next(pq.ParquetFile(path).iter_batches(batch_size=1, columns=[name]), None)
        first = batch.column(0)[0].as_py() if batch else None
    except READER_ERRORS:
        return False
    return bool(first) and os.path.isfile(path.parent / str(first).replace("\0", ""))


def _usual_image(schema: pa.Schema, source: str, features: Features) -> str | None:
    try:
        return choose_image(schema, None, source, features)
    except ImageSourceError:
        return None


class _File(NamedTuple):
    """A Parquet file: rows `first` to `first` + n_rows - 1 of a split."""

    path: Path
    key: str
    split: str
    first: int
    n_rows: int
    image: str
    mask: str | None
    schema: pa.Schema
    features: Features
    metadata: Any

    def read_group(self, group: int, column: str) -> pa.ChunkedArray:
        """The bytes of one column in a row group."""
        check_regular(self.path)
        file = pq.ParquetFile(self.path, metadata=self.metadata)
        table = file.read_row_group(group, columns=[column], use_threads=False)
        values = table.column(table.column_names.index(column))
        if pa.types.is_struct(values.type):
            values = pc.struct_field(values, "bytes")
        return values.cast(pa.binary()) if pa.types.is_binary_view(values.type) else values

    def sizes(self, column: str) -> pa.Array:
        """Bytes of each row, -1 for none."""
        parts = [pc.binary_length(self.read_group(group, column)) for group in range(self.metadata.num_row_groups)]
        whole = [chunk.cast(pa.int64()).fill_null(-1) for part in parts for chunk in part.chunks]
        return pa.concat_arrays([pa.array([], pa.int64()), *whole])


def _open_file(path: Path, path_column: str | None, key: str, split: str, first: int) -> _File:
    try:
        check_regular(path)
        file = pq.ParquetFile(path)
        schema, metadata = file.schema_arrow, file.metadata
    except READER_ERRORS as error:
        raise not_a_table(path, error) from error
    features = read_features(schema)
    image = choose_image(schema, path_column, path.name, features)
    if image is None:
        raise ImageSourceError(
            f"{path.name} holds no images, but the columns {list_names(schema.names)}. Give a table of paths as a file."
        )
    mask = "mask" if image != "mask" and "mask" in schema.names and holds_images(schema.field("mask").type) else None
    return _File(path, key, split, first, metadata.num_rows, image, mask, schema, features, metadata)


def _name_split(place: Path, root: Path) -> tuple[str, str]:
    """(split, folder) of a file: `data/train-00000-of-00002.parquet`, `default/train/0000.parquet`, `test.parquet`."""
    folders = list(place.parent.relative_to(root).parts) if place != root else []
    numbered = re.fullmatch(r"(.+?)-\d{5,}-of-\d{5,}(-[0-9a-f]+)?", place.stem)
    if numbered:
        split = numbered[1]
    elif place.stem.isdecimal() and folders:
        split = folders.pop()
    else:
        known = re.match(rf"({SPLITS})(?![a-zA-Z])", place.stem)
        split = known[1] if known else "all"
    return split, "/".join(folders)


class _RowGroups:
    """Row groups of images, the most recently used ones."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[Path, str, int], pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, file: _File, column: str, row: int) -> bytes | None:
        """The bytes of a row of a file; None if there are none. Raises ImageSourceError."""
        group = 0
        while row >= file.metadata.row_group(group).num_rows:
            row -= file.metadata.row_group(group).num_rows
            group += 1
        key = (file.path, column, group)
        with self._lock:
            values = self._kept.get(key)
            if values is not None:
                self._kept.move_to_end(key)
        if values is None:
            try:
                values = file.read_group(group, column)
            except READER_ERRORS as error:
                raise not_a_table(file.path, error) from error
            with self._lock:
                self._kept[key] = values
                while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > CACHE_BYTES:
                    self._kept.popitem(last=False)
        data: bytes | None = values[row].as_py()
        return data
