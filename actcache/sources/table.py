"""A table of image paths: CSV, TSV, JSON lines or Parquet.

In: one row per image, with a column of paths and any other columns. Out: a plan sorted by path, so that the order of
the rows does not matter. Paths are relative to the table's folder. Absolute paths are shortened to the part below that
folder, or below the deepest folder they share, so that no identity contains the user's folders.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from actcache.errors import ImageSourceError
from actcache.sources.arrow_types import show_name
from actcache.sources.columns import choose_path
from actcache.sources.files import read_file
from actcache.sources.images import decode_mask
from actcache.sources.labels import label_columns
from actcache.sources.listing import MaskFolder, UriIndex, check_columns, measure_files
from actcache.sources.plan import ImagePlan, announce, plan_images
from actcache.sources.table_file import number_text, read_raw_table
from actcache.text import is_utf8

N_TRIED = 100
"""Images by which a table without any image is recognized."""


@dataclass(frozen=True)
class ImageTable:
    """Images named by a table.

    Columns: one of paths (`path_column`, or one of the usual names), relative to the table's folder or absolute;
    optional labels (`label`, or one of the usual names: text, or integers with an optional `label_name`), optional
    `mask` (path of a PNG pixel mask). All other columns are kept. `masks` is the folder to which mask paths are
    relative or, without that column, a folder of masks that mirrors the images. docs/reference/tables.md lists names.
    """

    path: Path
    masks: Path | None = None
    path_column: str | None = None
    label: str | None = None

    def __init__(
        self,
        path: str | Path,
        *,
        masks: str | Path | None = None,
        path_column: str | None = None,
        label: str | None = None,
    ) -> None:
        object.__setattr__(self, "path", Path(path))
        object.__setattr__(self, "masks", None if masks is None else Path(masks))
        object.__setattr__(self, "path_column", path_column)
        object.__setattr__(self, "label", label)

    def plan(self, *, limit: int | None = None, seed: int = 0, exclude: Collection[str] = ()) -> ImagePlan:
        """List the images in a seeded order. Arguments as `plan_images`.

        Raises:
            ImageSourceError: there is no table, or it is empty, has no paths, a path twice, a missing file, a column
                with a reserved name, or a label that is not a class.
            SettingsError: `limit` is below 1 or `seed` below 0.
        """
        listing, file, mask_file, notes, columns, _ = self._rows
        self._announced  # noqa: B018 (once, and not to those who only read images)
        sizes = measure_files(file.to_pylist(), listing["uri"], self.path.name)
        if "mask" in listing.column_names:
            given = pc.not_equal(listing["mask"], "")
            measure_files(mask_file.filter(given).to_pylist(), listing["mask"].filter(given), self.path.name)
        elif self.masks is not None:
            listing = listing.append_column("mask", MaskFolder(self.masks).match(listing["uri"]))
        listing = listing.append_column("bytes", pa.array(sizes))
        return plan_images(listing, limit=limit, seed=seed, exclude=exclude, notes=notes, columns=columns)

    def read(self, uri: str) -> bytes:
        """The file of an image. Raises ImageSourceError."""
        return read_file(self._rows.file[self._index.find(uri)].as_py(), uri)

    def read_mask(self, uri: str) -> NDArray[np.uint8] | None:
        """Pixel mask [H, W], or None if there is none. Raises ImageSourceError."""
        listing, mask_file = self._rows.listing, self._rows.mask_file
        if "mask" not in listing.column_names:
            return None if self.masks is None else MaskFolder(self.masks).read(uri)
        row = self._index.find(uri)
        name = listing["mask"][row].as_py()
        return decode_mask(read_file(mask_file[row].as_py(), name), name=name) if name else None

    def plan_names(self, *, seed: int = 0) -> ImagePlan | None:
        """The plan for a table whose images are not at hand, so that only names and columns are known and `bytes` is
        -1; None if at least one of its first images is there. Raises as `plan`.
        """
        listing, file, _, notes, columns, _ = self._rows
        if any(map(os.path.exists, file.slice(0, N_TRIED).to_pylist())):
            return None
        self._announced  # noqa: B018 (once)
        listing = listing.append_column("bytes", pa.array(np.full(len(listing), -1, np.int64)))
        return plan_images(listing, seed=seed, notes=notes, columns=columns)

    @property
    def given_rows(self) -> NDArray[np.int64]:
        """[n]: the row of the table, counted from 0, that each image of the sorted listing comes from."""
        return self._rows.row

    @cached_property
    def _index(self) -> UriIndex:
        return UriIndex(self._rows.listing["uri"], self.path.name)

    @cached_property
    def _announced(self) -> None:
        announce(self._rows.notes)

    @cached_property
    def _rows(self) -> "_Rows":
        """Read the table and find out what its columns mean."""
        table, is_text, notes = read_raw_table(self.path)
        source = self.path.name
        names = table.column_names
        check_columns(names, source, known=names)  # each has a name, and none occurs twice
        column = choose_path(table, self.path_column, source)
        if not table.num_rows:
            raise ImageSourceError(f"{source} has no rows. Expected one row per image.")
        check_columns(names, source, known=(column, "label", "label_name", "mask"))
        home = self.path.absolute().parent
        if not is_utf8(home):
            raise ImageSourceError(f"{self.path} lies in a folder whose name is not UTF-8. Rename the folder.")
        uri, file = _locate(_paths(table[column], column, source, required=True), home)
        texts = {name: table[name] for name in names if name not in (column, "mask")}
        typed = texts
        if is_text:  # names of classes are texts, other columns may be numbers
            typed = {name: cells if name == "label_name" else number_text(cells) for name, cells in texts.items()}
        labeled = label_columns(typed, table.num_rows, source, label=self.label, texts=texts if is_text else None)
        columns = {"uri": uri, "label": labeled.columns.pop("label"), "label_name": labeled.columns.pop("label_name")}
        mask_file: Any = pa.nulls(table.num_rows, pa.string())
        if "mask" in names:
            start = home if self.masks is None else self.masks.absolute()
            columns["mask"], mask_file = _locate(_paths(table["mask"], "mask", source, required=False), start)
        listing = pa.table(columns | labeled.columns)
        order = pc.sort_indices(uri)
        listing = listing.take(order).combine_chunks()
        _check_unique(listing["uri"], source)
        chosen = {**labeled.chosen, **({} if column == _usual_path(table, source) else {"path": column})}
        row = order.to_numpy().astype(np.int64)
        return _Rows(listing, file.take(order), mask_file.take(order), notes + labeled.notes, chosen, row)


def _usual_path(table: pa.Table, source: str) -> str | None:
    """The column of paths that is used if the user does not choose one."""
    try:
        return choose_path(table, None, source)
    except ImageSourceError:
        return None


class _Rows(NamedTuple):
    """Rows sorted by uri (uri, label, label_name, mask if present, the user's columns), the paths of the files, and the
    rows of the table that they come from.
    """

    listing: pa.Table
    file: pa.ChunkedArray
    mask_file: pa.ChunkedArray
    notes: tuple[str, ...]
    columns: Mapping[str, str]
    row: NDArray[np.int64]


def _paths(column: Any, name: str, source: str, *, required: bool) -> Any:
    """The column as text. Every row needs a path of an image, but not of a mask."""
    if not (pa.types.is_string(column.type) or pa.types.is_null(column.type)):
        raise ImageSourceError(f"{source} has {column.type} in column {name!r}. Expected paths.")
    text = column.cast(pa.string()).fill_null("")
    empty = pc.index(text, "").as_py()
    if required and empty >= 0:
        raise ImageSourceError(f"{source} has no path in row {empty + 1}. Every row needs one; fill it or remove it.")
    return text


def _locate(paths: Any, home: Path) -> tuple[Any, Any]:
    """(uri, file) of paths. Relative paths are in `home`; absolute ones lose `home`, or the folder they all share."""
    prefix = os.path.join(home, "")
    absolute = pc.starts_with(paths, "/")
    inside = pc.starts_with(paths, prefix)
    outside = pc.and_not(absolute, inside)
    shared = ""
    if pc.any(outside).as_py():
        bounds = pc.min_max(paths.filter(outside)).as_py()  # a prefix of the first and the last is a prefix of all
        same = takewhile(lambda pair: pair[0] == pair[1], zip(bounds["min"], bounds["max"], strict=False))
        shared = "".join(character for character, _ in same).rpartition("/")[0] + "/"
    short = pc.if_else(inside, pc.utf8_slice_codeunits(paths, len(prefix)), paths)
    uris = pc.if_else(outside, pc.utf8_slice_codeunits(paths, len(shared)), short)
    full = pc.binary_join_element_wise(prefix, paths, "")
    return uris, pc.if_else(absolute, paths, full)


def _check_unique(uris: pa.ChunkedArray, source: str) -> None:
    if not len(uris) > pc.count_distinct(uris).as_py():
        return
    twice = pc.index(pc.equal(uris.slice(1), uris.slice(0, len(uris) - 1)), True).as_py()
    raise ImageSourceError(
        f"{source} names {show_name(uris[twice].as_py())} twice. Expected one row per image; remove one of them."
    )
