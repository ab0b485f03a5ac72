"""Which columns of somebody else's table hold the images and the labels.

In: Arrow columns under the names that their author chose. Out: the names of the columns that are used, and notes, each
one line, that say which others could have been meant. A name is compared without case and separators: `Image Path`,
`image_path` and `imagePath` are the same.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from actcache.errors import ImageSourceError
from actcache.sources.arrow_types import holds_images, is_text, list_names

PATH_COLUMNS = (
    "path", "image", "file", "filename", "uri", "filepath", "imagepath", "imagefile", "imagefilename", "imagename",
    "img", "imgpath", "imgfile", "imgname", "relpath", "relativepath", "imageindex",
)  # fmt: skip
"""Names of columns of paths, as `normalize` gives them; the first one that a table has is used."""

IMAGE_COLUMNS = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "imagebytes", "bytes")
"""Names of columns that hold the encoded images themselves."""

LABEL_COLUMNS = (
    "label", "labels", "class", "classes", "classname", "classlabel", "category", "categoryname", "categories",
    "target", "targets", "finelabel", "finelabels", "coarselabel", "coarselabels", "labelid", "classid",
    "classidx", "classindex", "categoryid",
)  # fmt: skip
"""Names of columns of labels; the first one that a table has, and that can be a label, is used."""

MAX_CLASSES = 10_000
"""A column with more distinct values is not proposed as a label."""

SAMPLE_ROWS = 10_000
"""Number of rows in which the values of a column are counted, so that a million rows take no longer."""


class Label(NamedTuple):
    """The column that holds the labels, if there is one, and what the user should know about the choice."""

    name: str | None
    notes: tuple[str, ...] = ()


def normalize(name: str) -> str:
    """`Image Path` -> `imagepath`."""
    return re.sub(r"[\s_\-.]+", "", name).lower()


def choose_path(table: pa.Table, given: str | None, source: str) -> str:
    """The column of image paths. Raises ImageSourceError when there is none."""
    names = table.column_names
    if given is not None:
        return check_given(given, names, source, "--path-column")
    named = _in_order(names, PATH_COLUMNS)
    texts = [name for name in named if is_text(table.schema.field(name).type)]
    if not named:
        like = [(name, "paths") for name in names if _holds_paths(table[name])]
        like += [(name, "bytes") for name in names if holds_images(table.schema.field(name).type)]
        advice = "".join(
            f" Its column {name!r} holds such {what}: choose it with --path-column." for name, what in like[:1]
        )
        raise ImageSourceError(
            f"{source} has no column of image paths. Expected one of path, image, file, filename, uri; its columns are "
            f"{list_names(names)}.{advice or ' Choose one with --path-column.'}"
        )
    return (texts or named)[0]


def _holds_paths(column: pa.ChunkedArray) -> bool:
    """Whether the first values of a column end like names of image files."""
    if not is_text(column.type):
        return False
    values = column.slice(0, 20).drop_null()
    return (
        len(values) > 0 and pc.all(pc.match_substring_regex(values, r"(?i)\.(jpe?g|png|webp|gif|tiff?|bmp)$")).as_py()
    )


def choose_image(schema: pa.Schema, given: str | None, source: str, features: "Features") -> str | None:
    """The column that holds encoded images, or None if there is none. Raises ImageSourceError for several."""
    if given is not None:
        check_given(given, schema.names, source, "--path-column")
        return given if holds_images(schema.field(given).type) else None
    candidates = [name for name in schema.names if holds_images(schema.field(name).type) and name != "mask"]
    declared = [name for name in candidates if name in features.images]
    structs = [name for name in candidates if pa.types.is_struct(schema.field(name).type)]
    for several in (_in_order(candidates, IMAGE_COLUMNS), declared, structs):
        if several and (several[0] == "image" or len(several) == 1):
            return several[0]
    if not candidates or not (structs or declared or _in_order(candidates, IMAGE_COLUMNS)):
        return None
    raise ImageSourceError(
        f"{source} has several columns of images: {list_names(candidates)}. Choose one with --path-column."
    )


def choose_label(columns: Mapping[str, Any], given: str | None, source: str, declared: Sequence[str] = ()) -> Label:
    """The column of labels, by its name.

    Args:
        columns: those that could be labels, as typed columns; without those that are paths or masks.
        declared: columns that are said to hold classes; if there is only one, it is used whatever its name.

    Raises:
        ImageSourceError: the given column does not exist.
    """
    names = list(columns)
    if given is not None:
        return Label(check_given(given, names, source, "--label"))
    if "label" not in columns and "label_name" in columns:
        return Label("label_name")
    named = [name for name in _in_order(names, LABEL_COLUMNS) if name == "label" or could_label(columns[name])]
    if "label" not in columns and len(declared) == 1:
        named = [declared[0], *(name for name in named if name != declared[0])]
    if named:
        rest = [
            name for name in named[1:] if normalize(name) not in ("classid", "classidx", "classindex", "categoryid")
        ]
        chosen = (
            f"{source}: the labels are those of column {named[0]!r}; {list_names(rest)} could be labels too. "
            "Choose with --label COLUMN."
        )
        return Label(named[0], (chosen,) if rest else ())
    possible = [
        name for name in names if name in declared or (could_label(columns[name]) and _is_category(columns[name]))
    ]
    if not possible:
        return Label(None)
    return Label(
        None,
        (f"{source} has no column called label, so its images have none. Columns that could be labels: "
         f"{list_names(possible)}. Choose one with --label COLUMN.",),
    )  # fmt: skip


def check_given(given: str, names: Sequence[str], source: str, flag: str) -> str:
    """The column that a flag names. Raises ImageSourceError when there is none."""
    if given not in names:
        raise ImageSourceError(f"{source} has no column {given!r} for {flag}. Its columns are {list_names(names)}.")
    return given


def _in_order(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The columns whose names are among the wanted ones, in the order of these; an exact spelling comes first."""
    rank = {name: position for position, name in enumerate(wanted)}
    known = [name for name in names if normalize(name) in rank]
    return sorted(known, key=lambda name: (name not in rank, rank[normalize(name)]))


def could_label(column: Any) -> bool:
    """Whether the values can be classes: texts, Booleans, or whole numbers from -1 on."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if is_text(kind) or pa.types.is_boolean(kind):
        return True
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return False
    numbers = column.cast(kind).cast(pa.float64(), safe=False)
    numbers = numbers.filter(pc.is_finite(numbers))
    if not len(numbers):
        return False
    bounds = pc.min_max(numbers).as_py()
    whole = pa.types.is_integer(kind) or pc.all(pc.equal(pc.floor(numbers), numbers)).as_py()
    return bool(whole and bounds["min"] >= -1 and bounds["max"] < 1 << 31)


def _is_category(column: Any) -> bool:
    """Whether values repeat, as those of labels do."""
    part = column.slice(0, SAMPLE_ROWS)
    n = int(pc.count_distinct(part).as_py())
    return 1 < n <= MAX_CLASSES and (2 * n <= len(part) or n <= 3)


# -- what Hugging Face writes into the schema --------------------------------------------------------------------------


class Features(NamedTuple):
    """What `datasets` says about the columns of a file that it has written."""

    images: frozenset[str]
    class_names: Mapping[str, list[str]]


def read_features(schema: pa.Schema) -> Features:
    """Columns of images and names of classes from the metadata of a Parquet file, as far as they make sense."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        pairs = [(name, feature) for name, feature in features.items() if isinstance(feature, dict)]
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return Features(frozenset(), {})
    images = frozenset(name for name, feature in pairs if feature.get("_type") == "Image")
    names = {
        name: feature["names"]
        for name, feature in pairs
        if feature.get("_type") == "ClassLabel"
        and isinstance(feature.get("names"), list)
        and all(isinstance(text, str) and text.isprintable() for text in feature["names"])
    }
    return Features(images, names)


def name_classes(numbers: Any, names: Sequence[str], column: str, source: str) -> Any:
    """Class numbers as names; -1, which test splits contain, and null become "". Raises ImageSourceError."""
    numbers = numbers.cast(pa.int64())
    known = pc.if_else(pc.greater_equal(numbers, 0), numbers, pa.scalar(None, pa.int64()))
    largest = pc.max(known).as_py()
    if largest is not None and largest >= len(names):
        raise ImageSourceError(
            f"{source} has class {largest} in column {column!r}, but names for {len(names):,} classes only. "
            "Repair the names or the numbers."
        )
    return pc.take(pa.array(names, pa.string()), known).fill_null("")
