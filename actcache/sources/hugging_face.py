"""A Hugging Face dataset that was written by `save_to_disk`.

In: the directory of a Dataset, or of a DatasetDict with its splits. Out: a plan whose uris are `<split>/<row>`, in the
dataset's own order. Image columns are recognized by their feature type and never decoded; the encoded bytes stay
memory-mapped. Only Arrow files are read, no scripts and no network.
"""

import importlib.util
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from actcache.errors import ImageSourceError
from actcache.sources.arrow_types import list_names
from actcache.sources.columns import check_given
from actcache.sources.labels import LabeledColumns
from actcache.sources.plan import announce
from actcache.sources.splits import Split, SplitSource, list_splits, row_of


@dataclass(frozen=True, init=False)
class HuggingFaceDataset(SplitSource):
    """Images of a saved dataset.

    The image is `path_column`, or else the only column of type Image or, among several, the one called `image`; an
    Image column `mask` holds pixel masks. The label is the column `label` of the dataset or of this source, or else the
    only ClassLabel, or else one of the usual names. Columns of plain values are kept, with class numbers as names;
    lists, structs and binary values are not. The column `split` names the split of a row (`dataset_split`, if the
    dataset has a column `split` of its own). Where the library is not installed, every call raises ImageSourceError.
    """

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
