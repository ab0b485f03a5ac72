"""Columns of somebody else's table become the columns label and label_name, and those that are kept as they are.

In: typed columns. Out: int32 classes with -1 for none, their names, and the user's own columns.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from actcache.sources.columns import choose_label, name_classes
from actcache.sources.listing import check_columns, encode_labels


class LabeledColumns(NamedTuple):
    """Attributes:
    columns: label, label_name, then the user's own.
    notes: what the user should know of the choice.
    chosen: {"label": column} if it is not the column that would be chosen without being told.
    """

    columns: dict[str, Any]
    notes: tuple[str, ...]
    chosen: Mapping[str, str]


def label_columns(
    columns: Mapping[str, Any], n_rows: int, source: str, *, label: str | None = None,
    class_names: Mapping[str, list[str]] | None = None, texts: Mapping[str, Any] | None = None,
    reserved: Collection[str] = (),
) -> LabeledColumns:  # fmt: skip
    """Find the labels among the columns.

    Args:
        label: the column that the user names; None to choose by name.
        class_names: names of the classes of columns of numbers.
        texts: columns as they are written in the file, where `columns` are numbers made of text.
        reserved: further names that the user's columns cannot have.

    Raises:
        ImageSourceError: the column does not exist or does not hold labels, or a column has a reserved name.
    """
    class_names, texts = class_names or {}, texts or {}
    check_columns([*columns, *reserved], source, known=("label", "label_name", *reserved))
    usual = choose_label(columns, None, source, declared=list(class_names))
    choice = usual if label is None else choose_label(columns, label, source)
    values: Any = pa.nulls(n_rows, pa.string()) if choice.name is None else columns[choice.name]
    names = columns.get("label_name") if choice.name == "label" else None
    if choice.name in class_names:
        names = name_classes(values, class_names[choice.name], choice.name, source)
    elif choice.name in texts:
        values = number_labels(texts[choice.name])
    index, label_name = encode_labels(values, names, source)
    own = {
        name: name_classes(column, class_names[name], name, source) if name in class_names else column
        for name, column in columns.items()
        if name not in ("label", "label_name")
    }
    notes = choice.notes
    lost = [name for name in ("label", "label_name") if name in columns and name != choice.name and names is None]
    if lost:
        notes += (f"{source}: its column {lost[0]!r} is left out, because {choice.name!r} gives the labels.",)
    chosen = {"label": choice.name} if choice.name is not None and choice.name != usual.name else {}
    return LabeledColumns({"label": index, "label_name": label_name} | own, notes, chosen)


def number_labels(texts: Any) -> Any:
    """Labels of a text file as numbers if each of them is written as one, and as text otherwise: 001 is a name."""
    given = pc.if_else(pc.equal(texts, ""), None, texts)
    if (
        given.null_count == len(given)
        or not pc.all(pc.match_substring_regex(given, r"^(0|-1|[1-9][0-9]{0,8})$")).as_py()
    ):
        return texts
    return given.cast(pa.int32())
