"""Types of columns that somebody else has written: which are text, bytes or images, and casting them to plain ones.

In: Arrow columns of any type. Out: columns that Arrow's functions and Parquet take.
"""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc


def show_name(name: str) -> str:
    """A name from somebody else as a message shows it: on one line, and not of a thousand letters."""
    return name if name.isprintable() and len(name) <= 300 else repr(name[:300])


def list_names(names: Sequence[str], limit: int = 12) -> str:
    """Names of columns for a message: on one line, and not all of a thousand."""
    shown = [name if name.isprintable() and len(name) <= 60 else repr(name[:60]) for name in names[:limit]]
    return ", ".join(shown) + (f" and {len(names) - limit:,} more" if len(names) > limit else "") or "none"


def is_text(kind: pa.DataType) -> bool:
    """Whether a type is text of any layout, also through a dictionary."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def holds_images(kind: pa.DataType) -> bool:
    """Whether a type is bytes, or Hugging Face's struct of bytes and path."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and is_binary(kind.field("bytes").type)
    return is_binary(kind)


def plain_table(table: pa.Table, source: str) -> tuple[pa.Table, tuple[str, ...]]:
    """The table with columns that Arrow's functions and Parquet take, and a note on those that had to be left out.

    Views, dictionaries, large texts and extension types become the type that they stand for, also inside of lists and
    structs.
    """
    columns, lost = {}, []
    for position, name in enumerate(table.column_names):
        column = table.column(position)
        try:
            columns[position] = _plain(column)
            columns[position].slice(0, 1).take(pa.array([0][: len(column)], pa.int64()))  # some types cannot be sorted
            if pa.types.is_nested(column.type):
                columns[position].validate(full=True)  # a list view cast to a list may not be one
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid, pa.ArrowTypeError):
            lost.append(f"{name} ({column.type})"[:80])
            columns.pop(position, None)
    notes = (f"{source}: columns of types that cannot be kept are left out: {list_names(lost)}.",) if lost else ()
    return pa.table(list(columns.values()), names=[table.column_names[position] for position in columns]), notes


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = column.type
    if pa.types.is_run_end_encoded(kind):
        chunks = [pc.run_end_decode(chunk) for chunk in column.chunks]
        column = pa.chunked_array(chunks, kind.value_type)
        return _plain(column)
    plain = _plain_type(kind)
    if pa.types.is_interval(plain):
        raise pa.ArrowNotImplementedError("intervals cannot be written to Parquet")
    return column if plain == kind else column.cast(plain)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if isinstance(kind, pa.BaseExtensionType):
        return _plain_type(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if is_text(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain_type(field.type)) for field in kind])
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_plain_type(kind.value_type), kind.list_size)
    if any(test(kind) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_list_view,
                                   pa.types.is_large_list_view)):  # fmt: skip
        return pa.list_(kind.value_field.with_type(_plain_type(kind.value_type)))
    return kind
