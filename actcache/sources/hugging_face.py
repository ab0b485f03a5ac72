"""A Hugging Face dataset that was written by `save_to_disk`.

In: the directory of a Dataset, or of a DatasetDict with its splits. Out: a plan whose uris are `<split>/<row>`, in the
dataset's own order. Image columns are recognized by their feature type and never decoded; the encoded bytes stay
memory-mapped. Only Arrow files are read, no scripts and no network.
"""

import importlib.util
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from actcache.errors import ImageSourceError
from actcache.sources.images import decode_mask
from actcache.sources.listing import check_columns, encode_labels
from actcache.sources.plan import ImagePlan, plan_images


@dataclass(frozen=True)
class HuggingFaceDataset:
    """Images of a saved dataset.

    The image is the only column of type Image, or, among several, the one called `image`; an Image column `mask` holds
    pixel masks. The label is the column `label`, or else the only ClassLabel. Columns of plain values are kept, with
    class numbers as names; lists, structs and binary values are not. The column `split` names the split of a row.
    """

    path: Path

    def __init__(self, path: str | Path) -> None:
        object.__setattr__(self, "path", Path(path))

    def plan(self, *, limit: int | None = None, seed: int = 0, exclude: Collection[str] = ()) -> ImagePlan:
        """List the images in a seeded order. Arguments as `plan_images`.

        Raises:
            ImageSourceError: the library is not installed, there is no dataset, no image column or several, or a
                column has a reserved name.
            SettingsError: `limit` is below 1 or `seed` below 0.
        """
        parts = [_list_split(split, part, self._width) for split, part in self._splits.items()]
        try:
            listing = pa.concat_tables(parts, promote_options="default")
        except pa.ArrowInvalid as error:
            raise ImageSourceError(f"{self.path.name} has splits whose columns differ: {error}.") from error
        if not listing.num_rows:
            raise ImageSourceError(f"{self.path.name} has no rows. Expected one row per image.")
        given = listing["label_name"] if "label_name" in listing.column_names else None
        label, label_name = encode_labels(listing["label"], given, self.path.name)
        rest = [name for name in listing.column_names if name not in ("label", "label_name")]
        listing = listing.select(rest).append_column("label", label).append_column("label_name", label_name)
        return plan_images(listing, limit=limit, seed=seed, exclude=exclude)

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

    def _cell(self, uri: str, what: str) -> bytes | None:
        split, _, row = uri.rpartition("/")
        part = self._splits.get(split)
        if part is None or not row.isdigit() or int(row) >= part.rows.num_rows:
            raise ImageSourceError(f"{uri} is not in {self.path.name}.")
        column = part.image if what == "image" else part.mask
        if column is None:
            return None
        data: bytes | None = (part.rows[column][int(row)].as_py() or {}).get("bytes")
        return data

    @property
    def _width(self) -> int:
        """Number of digits of a row number, so that rows sorted as text stay in order."""
        return max(6, *(len(str(part.rows.num_rows - 1)) for part in self._splits.values()))

    @cached_property
    def _splits(self) -> "dict[str, _Split]":
        if importlib.util.find_spec("datasets") is None:
            raise ImageSourceError(
                f"{self.path.name} is a Hugging Face dataset, but the library that reads it is not installed. "
                "Run: pip install 'patchsae[datasets]'"
            )
        import datasets

        try:
            loaded = datasets.load_from_disk(str(self.path))
        except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ImageSourceError(f"{self.path} cannot be read as a dataset: {reason}. Save it again.") from error
        splits = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "all"): loaded}
        return {str(name): _open_split(splits[name], self.path.name) for name in sorted(splits, key=str)}


@dataclass(frozen=True)
class _Split:
    """One split: its rows and the meaning of its columns."""

    rows: pa.Table
    image: str
    mask: str | None
    label: str | None
    kept: tuple[str, ...]
    class_names: dict[str, list[str]]


def _open_split(dataset: Any, source: str) -> _Split:
    import datasets

    features = dataset.features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    mask = "mask" if "mask" in images and len(images) > 1 else None
    candidates = [name for name in images if name != mask]
    if "image" in candidates:
        candidates = ["image"]
    if len(candidates) != 1:
        given = (
            f"several: {', '.join(candidates)}" if candidates else f"none among {', '.join(features) or 'no columns'}"
        )
        raise ImageSourceError(f"{source} must have one image column, or one called 'image'. It has {given}.")
    classes = {name: feature.names for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)}
    label = "label" if "label" in features else next(iter(classes)) if len(classes) == 1 else None
    used = {candidates[0], mask, label, "label_name" if label == "label" else None}
    kept = [
        name
        for name, feature in features.items()
        if name not in used
        and (name in classes or (isinstance(feature, datasets.Value) and "binary" not in feature.dtype))
    ]
    check_columns([*kept, "split"], source)
    return _Split(dataset.with_format("arrow")[:], candidates[0], mask, label, tuple(kept), classes)


def _list_split(split: str, part: _Split, width: int) -> pa.Table:
    """Rows of one split. Labels stay as they are; text becomes numbers when all splits are joined."""
    rows = part.rows
    n = rows.num_rows
    numbers = pc.utf8_lpad(pa.array(np.arange(n)).cast(pa.string()), width=width, padding="0")
    columns = {
        "uri": pc.binary_join_element_wise(split, numbers, "/"),
        "label": pa.nulls(n) if part.label is None else rows[part.label],
        "bytes": pc.binary_length(pc.struct_field(rows[part.image], "bytes")).cast(pa.int64()).fill_null(-1),
        "split": pa.array([split]).take(pa.array(np.zeros(n, np.int64))),
    }
    if part.label in part.class_names:
        columns["label_name"] = _names(rows[part.label], part.class_names[part.label])
    elif part.label is not None and "label_name" in rows.column_names:
        columns["label_name"] = rows["label_name"]
    if part.mask is not None:
        there = pc.is_valid(pc.struct_field(rows[part.mask], "bytes"))
        columns["mask"] = pc.if_else(there, columns["uri"], "")
    for name in part.kept:
        columns[name] = _names(rows[name], part.class_names[name]) if name in part.class_names else rows[name]
    return pa.table(columns)


def _names(numbers: Any, names: list[str]) -> Any:
    """Class numbers as names; -1, which test splits contain, and null become ""."""
    known = pc.if_else(pc.greater_equal(numbers, 0), numbers, pa.scalar(None, numbers.type))
    return pc.take(pa.array(names, pa.string()), known).fill_null("")
