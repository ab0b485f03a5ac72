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
from actcache.sources.arrow_types import list_names
from actcache.sources.columns import check_given
from actcache.sources.images import decode_mask
from actcache.sources.labels import LabeledColumns
from actcache.sources.plan import ImagePlan, announce, plan_images
from actcache.sources.splits import Split, list_splits, row_of


@dataclass(frozen=True)
class HuggingFaceDataset:
    """Images of a saved dataset.

    The image is `path_column`, or else the only column of type Image or, among several, the one called `image`; an
    Image column `mask` holds pixel masks. The label is the column `label` of the dataset or of this source, or else the
    only ClassLabel, or else one of the usual names. Columns of plain values are kept, with class numbers as names;
    lists, structs and binary values are not. The column `split` names the split of a row (`dataset_split`, if the
    dataset has a column `split` of its own).
    """

    path: Path
    path_column: str | None = None
    label: str | None = None

    def __init__(self, path: str | Path, *, path_column: str | None = None, label: str | None = None) -> None:
        object.__setattr__(self, "path", Path(path))
        object.__setattr__(self, "path_column", path_column)
        object.__setattr__(self, "label", label)

    def plan(self, *, limit: int | None = None, seed: int = 0, exclude: Collection[str] = ()) -> ImagePlan:
        """List the images in a seeded order. Arguments as `plan_images`.

        Raises:
            ImageSourceError: the library is not installed, there is no dataset, no image column or several, or a
                column has a reserved name.
            SettingsError: `limit` is below 1 or `seed` below 0.
        """
        columns, notes, chosen = self._listing
        return plan_images(pa.table(columns), limit=limit, seed=seed, exclude=exclude, notes=notes, columns=chosen)

    @cached_property
    def _listing(self) -> LabeledColumns:
        """The columns of the plan. Notes are shown once, and not to those who only read images."""
        listed = list_splits(
            [_list_split(name, part) for name, part in self._splits.items()], self.path.name, self.label
        )
        announce(listed.notes)
        usual = all(part.image == part.usual_image for part in self._splits.values())
        chosen = {**({} if usual else {"path": str(self.path_column)}), **listed.chosen}
        return LabeledColumns(listed.columns, listed.notes, chosen)

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
        split, row = row_of(uri)
        part = self._splits.get(split)
        if part is None or not 0 <= row < part.rows.num_rows:
            raise ImageSourceError(f"{uri} is not in {self.path.name}.")
        column = part.image if what == "image" else part.mask
        if column is None:
            return None
        data: bytes | None = (part.rows[column][row].as_py() or {}).get("bytes")
        return data

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
        except Exception as error:  # whatever the library raises for a damaged file
            raise self._damaged(error) from error
        splits = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "all"): loaded}
        opened = {}
        for name in sorted(splits, key=str):
            try:
                rows = splits[name].with_format("arrow")[:]
                rows.validate(full=True)  # texts that are not UTF-8, and offsets that lead out of the file
            except Exception as error:
                raise self._damaged(error) from error
            opened[str(name)] = _open_split(rows, splits[name].features, self.path_column, self.path.name)
        return opened

    def _damaged(self, error: Exception) -> ImageSourceError:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return ImageSourceError(f"{self.path} cannot be read as a dataset: {reason}. Save it again.")


@dataclass(frozen=True)
class _Split:
    """One split: its rows and the meaning of its columns."""

    rows: pa.Table
    image: str
    usual_image: str | None
    mask: str | None
    class_names: dict[str, list[str]]


def _open_split(rows: pa.Table, features: Any, path_column: str | None, source: str) -> _Split:
    import datasets

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    mask = "mask" if "mask" in images and len(images) > 1 and path_column != "mask" else None
    candidates = [name for name in images if name != mask]
    usual = "image" if "image" in candidates else candidates[0] if len(candidates) == 1 else None
    if path_column is not None:
        check_given(path_column, images, f"{source}, among its columns of images,", "--path-column")
    elif usual is None:
        given = f"several: {list_names(candidates)}" if candidates else f"none among {list_names(list(features))}"
        raise ImageSourceError(
            f"{source} must have one image column, or one called 'image'. It has {given}. Choose with --path-column."
        )
    classes = {name: feature.names for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)}
    return _Split(rows, path_column or str(usual), usual, mask, classes)


def _list_split(name: str, part: _Split) -> Split:
    rows = part.rows
    sizes = pc.binary_length(pc.struct_field(rows[part.image], "bytes")).cast(pa.int64()).fill_null(-1)
    has_mask = None if part.mask is None else pc.is_valid(pc.struct_field(rows[part.mask], "bytes"))
    others = [column for column in rows.column_names if column not in (part.image, part.mask)]
    return Split(name, name, rows.select(others), sizes, has_mask, part.class_names)
