"""Columns of somebody else's table become the columns label and label_name, and those that are kept as they are.

In: typed columns. Out: int32 classes with -1 for none, their names, and the user's own columns.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from actcache.sources.columns import choose_label
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
    numbers: Mapping[str, Any] | None = None, texts: Mapping[str, Any] | None = None, reserved: Collection[str] = (),
) -> LabeledColumns:  # fmt: skip
    """Find the labels among the columns.

    Args:
        label: the column that the user names; None to choose by name.
        numbers: class numbers of columns of class names.
        texts: columns as they are written in the file, where some of `columns` are numbers made of text.
        reserved: names of the source itself, which the user's columns cannot have.

    Raises:
        ImageSourceError: the column does not exist or does not hold labels, or a column has a reserved name.
    """
    numbers, texts = numbers or {}, texts or {}
    check_columns([*columns, *reserved], source, known=("label", "label_name", *reserved))
    possible = {  # numbers of a text file, whatever their size, are texts where they are labels
        name: texts[name] if name in texts and pa.types.is_integer(column.type) else column
        for name, column in columns.items()
    }
    usual = choose_label(possible, None, source, declared=list(numbers))
    choice = usual if label is None else choose_label(possible, label, source)
    values: Any = pa.nulls(n_rows, pa.string()) if choice.name is None else columns[choice.name]
    names = columns.get("label_name") if choice.name == "label" else None
    if choice.name is not None and choice.name in numbers:
        values, names = numbers[choice.name], values
    elif choice.name is not None and choice.name in texts:
        values = number_labels(texts[choice.name])
    index, label_name = encode_labels(values, names, source)
    own = {name: column for name, column in columns.items() if name not in ("label", "label_name")}
    notes = choice.notes
    if choice.name != "label" and "label" in columns:
        notes += (f"{source}: its column 'label' is left out, because {choice.name!r} gives the labels.",)
    chosen = {"label": choice.name} if choice.name is not None and choice.name != usual.name else {}
    return LabeledColumns({"label": index, "label_name": label_name} | own, notes, chosen)


def number_labels(texts: Any) -> Any:
    """Labels of a text file as numbers if each of them is written as one, and as text otherwise: 001 is a name."""
    given = pc.if_else(pc.equal(texts, ""), None, texts)
    if given.null_count == len(given):
        return texts
    written = pc.all(pc.match_substring_regex(given, r"^(0|-1|[1-9][0-9]{0,8})$")).as_py()
    return given.cast(pa.int32()) if written else texts
