"""read_attributes(): what is true or false of the choosing and the judged images, from the image table and pixel masks.

    column:value   each class of label_name, and each value of a column of 2 to 20 texts
    column         a column of true and false, or of 1 and 0
    concept        each concept of the masks, which an image has where one of its pixels carries it

Only attributes are kept that some images have and others lack, among the choosing and among the judged images.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from actcache import SettingsError
from analysis.benchmark.measured import Skipped
from analysis.benchmark.patch_labels import N_CHOOSING, LabeledPatches
from analysis.benchmark.subject import Judged
from analysis.classifier import sample_images
from analysis.probing import read_target

CLASSES = "label_name"
MANY = 20
"""A column of more different texts than this does not sort images into categories."""
NO_ATTRIBUTES = frozenset({"source_index", "uri", "label", "bytes", "mask", "split", "store", "content_hash"})
"""Columns of every image table that say nothing of what an image shows."""
UNKNOWN = -1


@dataclass(frozen=True)
class Marked:
    """Images and their attributes. values: [n, A] int8: 1 has it, 0 has it not, -1 unknown."""

    images: NDArray[np.int64]
    values: NDArray[np.int8]


@dataclass(frozen=True)
class Attributes:
    """A attributes of the choosing images, 10,000 at most, and of the judged ones."""

    names: tuple[str, ...]
    choosing: Marked
    judged: Marked

    def find(self, text: str) -> int | None:
        """The number of an attribute, by its name or, where no other has the same, by its value alone."""
        if text in self.names:
            return self.names.index(text)
        found = [i for i, name in enumerate(self.names) if name.partition(":")[2] == text]
        return found[0] if len(found) == 1 else None


def read_attributes(judged: Judged, labels: LabeledPatches | Skipped, name: str) -> Attributes | Skipped:
    """The attributes, or why there are none.

    Args:
        labels: what the masks say, if there are any.
        name: the measure that is skipped without attributes.
    """
    halves = sample_images(judged.choosing, N_CHOOSING, judged.seed), judged.images
    columns: dict[str, tuple[NDArray[np.int8], ...]] = {}
    for each, values in _read_columns(judged.store.images):
        columns.setdefault(each, tuple(values[half] for half in halves))
    if isinstance(labels, LabeledPatches):
        for concept, each in enumerate(labels.judged.names):
            columns.setdefault(
                each,
                tuple(
                    _find_present(half, labeled.images, labeled.touched_images(concept))
                    for half, labeled in zip(halves, (labels.choosing, labels.judged), strict=True)
                ),
            )
    kept = {
        each: parts for each, parts in columns.items() if all((part == 1).any() and (part == 0).any() for part in parts)
    }
    if not kept:
        return Skipped(
            name, f"{judged.store.path.name} has no labels, categories, masks or columns of true and false that differ "
            "both among the images to choose on and among those to judge; extract a table with such columns"
        )  # fmt: skip
    marked = [Marked(half, np.stack([parts[i] for parts in kept.values()], axis=1)) for i, half in enumerate(halves)]
    return Attributes(tuple(kept), marked[0], marked[1])


def _read_columns(images: pa.Table) -> Iterator[tuple[str, NDArray[np.int8]]]:
    """(name, [I]) of every attribute of the image table."""
    for column in images.column_names:
        kind = images.schema.field(column).type
        if column in NO_ATTRIBUTES or images.column_names.count(column) > 1:
            continue
        if pa.types.is_integer(kind):
            different = set(pc.unique(images[column]).to_pylist()) - {None}
            if different != {0, 1}:
                continue
        elif pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or _is_text(kind)):
            continue
        try:
            target = read_target(images, column, "class")
        except SettingsError:  # no image has a value
            continue
        assert target.names is not None
        missing, names = target.values < 0, target.names
        if not _is_text(kind):
            true = [number for number, each in enumerate(names) if each in ("true", "1")]
            yield column, np.where(missing, UNKNOWN, np.isin(target.values, true)).astype(np.int8)
        elif column == CLASSES or 2 <= len(names) <= MANY:
            for number, value in enumerate(names):
                yield f"{column}:{value}", np.where(missing, UNKNOWN, target.values == number).astype(np.int8)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _find_present(images: NDArray[np.int64], masked: NDArray[np.int64], present: NDArray[np.int64]) -> NDArray[np.int8]:
    """[n]: of some images, whether they are among those that have a concept; unknown without a mask."""
    return np.where(np.isin(images, masked), np.isin(images, present), UNKNOWN).astype(np.int8)
