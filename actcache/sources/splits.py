"""Rows of a dataset that holds the images themselves, split by split: what Hugging Face and Parquet have in common.

In: for each split its columns, the sizes of its images, and which rows have a mask. Out: a listing whose uris are
`<split>/<row>`, in the dataset's own order.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from actcache.errors import ImageSourceError
from actcache.sources.arrow_types import is_binary, list_names, plain_table
from actcache.sources.columns import name_classes
from actcache.sources.images import decode_mask
from actcache.sources.labels import LabeledColumns, label_columns
from actcache.sources.plan import ImagePlan, plan_images

NUMBERS = "\0numbers of "
"""Before the name of a column of class numbers, beside the column of their names, until the labels are found."""


class Split(NamedTuple):
    """One split. Splits of equal name (parts of several folders) differ in `key`, which begins their uris.

    Attributes:
        columns: all but images and masks.
        sizes: int64 bytes of each encoded image, -1 if there is none.
        has_mask: of each row; None if there are no masks.
        class_names: names of classes by column.
    """

    key: str
    name: str
    columns: pa.Table
    sizes: Any
    has_mask: Any
    class_names: Mapping[str, list[str]]


@dataclass(frozen=True, init=False)
class SplitSource:
    """A dataset that holds the images themselves.

    A subclass defines `_listing`, the columns of the plan, and `_cell`, the encoded image or mask of a uri.
    """

    path: Path
    path_column: str | None = None
    label: str | None = None

    def __init__(self, path: str | Path, *, path_column: str | None = None, label: str | None = None) -> None:
        object.__setattr__(self, "path", Path(path))
        object.__setattr__(self, "path_column", path_column)
        object.__setattr__(self, "label", label)

    @cached_property
    def _listing(self) -> LabeledColumns:
        raise NotImplementedError

    def _cell(self, uri: str, what: str) -> bytes | None:
        """The bytes of `what`, image or mask, in the row of a uri; None if it has none. Raises ImageSourceError."""
        raise NotImplementedError

    def plan(self, *, limit: int | None = None, seed: int = 0, exclude: Collection[str] = ()) -> ImagePlan:
        """List the images in a seeded order. Arguments as `plan_images`.

        Raises:
            ImageSourceError: there is no dataset, it is damaged, its parts differ in their columns, it has no image
                column or several, or a column has a reserved name.
            SettingsError: `limit` is below 1 or `seed` below 0.
        """
        columns, notes, chosen = self._listing
        return plan_images(pa.table(columns), limit=limit, seed=seed, exclude=exclude, notes=notes, columns=chosen)

    def read(self, uri: str) -> bytes:
        """The encoded image of a row. Raises ImageSourceError."""
        data = self._cell(uri, "image")
        if data is None:
            raise ImageSourceError(
                f"{uri} cannot be read: the row contains no image. Save the dataset together with its files."
            )
        return data

    def read_mask(self, uri: str) -> NDArray[np.uint8] | None:
        """Pixel mask [H, W], or None if there is none. Raises ImageSourceError."""
        data = self._cell(uri, "mask")
        return None if data is None else decode_mask(data, name=f"mask of {uri}")


def row_width(n_rows: list[int]) -> int:
    """Number of digits of a row number, so that rows sorted as text stay in order."""
    return max(6, *(len(str(n - 1)) for n in n_rows))


def row_of(uri: str) -> tuple[str, int]:
    """(key of the split, row) of a uri; row -1 if it has none."""
    key, _, row = uri.rpartition("/")
    return key, int(row) if row.isascii() and row.isdigit() and len(row) < 19 else -1


def list_splits(splits: list[Split], source: str, label: str | None) -> LabeledColumns:
    """The listing of all splits (uri, label, label_name, bytes, mask if there are any, split, own columns).

    Raises:
        ImageSourceError: splits do not fit together, a column has a reserved name, or labels are no classes.
    """
    width = row_width([len(split.sizes) for split in splits])
    names = {name for split in splits for name in split.columns.column_names}
    own_split = "dataset_split" if "split" in names else "split"
    parts, notes, classes = [], set(), set()
    for split in splits:
        table, lost = plain_table(split.columns, source)
        notes |= set(lost)
        parts.append(_list_split(split, table, width, own_split, source))
        classes |= set(split.class_names) & names
    try:
        listing = pa.concat_tables(parts, promote_options="default")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        reason = str(error).splitlines()[0]
        raise ImageSourceError(f"{source} has splits whose columns differ: {reason}. Make them equal.") from error
    if not listing.num_rows:
        raise ImageSourceError(f"{source} has no rows. Expected one row per image.")
    fixed = [name for name in ("uri", "bytes", "mask", own_split) if name in listing.column_names]
    own = {name: listing[name] for name in listing.column_names if name not in fixed and not name.startswith(NUMBERS)}
    named = {name: listing[f"{NUMBERS}{name}"] for name in classes if f"{NUMBERS}{name}" in listing.column_names}
    labeled = label_columns(own, listing.num_rows, source, label=label, numbers=named, reserved=fixed)
    dropped = [name for name, column in labeled.columns.items() if _is_left_out(column.type)]
    if dropped:
        notes.add(f"{source}: columns of lists, structs or bytes are left out: {list_names(dropped)}.")
    if own_split != "split":
        notes.add(f"{source} has a column 'split' of its own; the splits of the dataset are in 'dataset_split'.")
    columns = {name: column for name, column in labeled.columns.items() if name not in dropped}
    ordered = {name: listing[name] for name in fixed} | columns
    return LabeledColumns(ordered, (*sorted(notes), *labeled.notes), labeled.chosen)


def _is_left_out(kind: pa.DataType) -> bool:
    return bool(pa.types.is_nested(kind) or is_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _list_split(split: Split, table: pa.Table, width: int, own_split: str, source: str) -> pa.Table:
    n = len(split.sizes)  # a table without further columns has no rows
    numbers = pc.utf8_lpad(pa.array(np.arange(n)).cast(pa.string()), width=width, padding="0")
    columns: dict[str, object] = {
        "uri": pc.binary_join_element_wise(split.key, numbers, "/"),
        "bytes": split.sizes,
    }
    if split.has_mask is not None:
        columns["mask"] = pc.if_else(split.has_mask, columns["uri"], "")
    columns[own_split] = pa.array([split.name]).take(pa.array(np.zeros(n, np.int64)))
    for name in table.column_names:
        if name in columns:
            raise ImageSourceError(f"{source} has a column {name!r}, which is a reserved name. Rename the column.")
        names = split.class_names.get(name)
        if names is None or not pa.types.is_integer(table[name].type):
            columns[name] = table[name]
        else:
            columns[name] = name_classes(table[name], names, name, source)
            columns[f"{NUMBERS}{name}"] = table[name].cast(pa.int64())
    return pa.table(columns)
