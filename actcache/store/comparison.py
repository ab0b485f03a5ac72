"""Comparing a column with a constant, a list of constants or another column, in Arrow.

In: an Arrow array of any type, and Python values as they are written in an expression. Out: a Boolean array that is
null where the column is. A constant takes the type of the column: a text becomes a date, a number a decimal.
"""

import ast
import datetime
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from actcache.errors import SettingsError

Array: TypeAlias = Any
"""A pyarrow array; pyarrow has no types that mypy could check."""

Constant: TypeAlias = str | int | float | bool | None

SHOWN_LETTERS = 100

_FUNCTIONS: dict[type[ast.cmpop], tuple[Callable[..., Array], type[ast.cmpop]]] = {
    ast.Eq: (pc.equal, ast.Eq),
    ast.NotEq: (pc.not_equal, ast.NotEq),
    ast.Lt: (pc.less, ast.Gt),
    ast.LtE: (pc.less_equal, ast.GtE),
    ast.Gt: (pc.greater, ast.Lt),
    ast.GtE: (pc.greater_equal, ast.LtE),
}
"""The function of a sign, and the sign that means the same after its sides are exchanged."""


def shorten(text: str, *, quoted: bool = True) -> str:
    """A text from the user or from data as a message shows it: on one line, and cut in its middle."""
    half = SHOWN_LETTERS // 2
    cut = text if len(text) <= SHOWN_LETTERS else f"{text[:half]}...{text[-half:]}"
    return repr(cut) if quoted or not cut.isprintable() else cut


def check_boolean(value: Any) -> Array:
    """The value if it is an array of true and false. Raises SettingsError."""
    if isinstance(value, pa.Array) and (pa.types.is_boolean(value.type) or pa.types.is_null(value.type)):
        return value.cast(pa.bool_())
    what = value.type if isinstance(value, pa.Array) else _show(value)
    raise SettingsError(f"gives {what}, expected true or false. Compare a column with a value.")


def compare(sign: type[ast.cmpop], a: Any, b: Any) -> Array:
    """Compare two sides, of which at least one is a column."""
    if not isinstance(a, pa.Array):
        return compare(_FUNCTIONS[sign][1], b, a)
    function = _FUNCTIONS[sign][0]
    a = _plain(a)
    if isinstance(b, pa.Array):
        return function(a, _plain(b))
    if isinstance(b, list) or b is None:
        advice = "Write `is None`." if b is None else "Write `in` for a list."
        raise SettingsError(f"compares a column with {'None' if b is None else 'a list'}. {advice}")
    if pa.types.is_null(a.type):
        return pa.nulls(len(a), pa.bool_())
    if pa.types.is_uint64(a.type) and _is_number(b) and not (isinstance(b, int) and 0 <= b < 1 << 64):
        a = a.cast(pa.decimal128(20))  # Arrow has no type that holds these and negative numbers, or fractions
    return function(a, _scalar(b, a.type))


def compare_with_list(column: Array, constants: Sequence[Constant]) -> Array:
    """Whether each value is among the constants: null for a missing value, unless None is a constant."""
    column = _plain(column)
    wanted = [constant for constant in constants if constant is not None]
    if pa.types.is_null(column.type):
        inside = pa.nulls(len(column), pa.bool_())
    else:
        inside = pc.if_else(column.is_valid(), pc.is_in(column, value_set=_values(wanted, column.type)), None)
    return inside.fill_null(True) if len(wanted) < len(constants) else inside


def _plain(column: Array) -> Array:
    """The column in a type that Arrow's functions take. Raises SettingsError for lists, structs and bytes."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    if pa.types.is_string_view(kind) or pa.types.is_large_string(kind):
        return column.cast(pa.large_string())
    if pa.types.is_float16(kind):
        return column.cast(pa.float32())
    if pa.types.is_date64(kind):
        return column.cast(pa.date32())
    if pa.types.is_nested(kind) or not (pa.types.is_primitive(kind) or pa.types.is_decimal(kind) or _is_text(kind)
                                        or pa.types.is_null(kind)):  # fmt: skip
        raise SettingsError(f"compares a column of {shorten(str(kind), quoted=False)}. Only `is None` works there.")
    return column


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _scalar(value: Constant, kind: pa.DataType) -> pa.Scalar:
    """The constant as an Arrow scalar that is compared with a column of type `kind`."""
    if pa.types.is_boolean(kind) and isinstance(value, bool):
        return pa.scalar(value)
    if _is_text(kind) and isinstance(value, str):
        return pa.scalar(value, kind)
    if pa.types.is_floating(kind) and _is_number(value):
        return pa.scalar(float(value), kind)  # type: ignore[arg-type]
    if pa.types.is_integer(kind) and _is_number(value):
        return pa.scalar(value, kind if pa.types.is_uint64(kind) and isinstance(value, int) else None)
    if pa.types.is_decimal(kind) and (_is_number(value) or isinstance(value, str)):
        return pa.scalar(_decimal(value))
    if pa.types.is_temporal(kind):
        return _moment(value, kind)
    raise SettingsError(f"does not fit the columns: {kind} is compared with {_show(value)}. {_expected(kind)}")


def _expected(kind: pa.DataType) -> str:
    if pa.types.is_boolean(kind):
        return "Expected True or False."
    return "Expected a text in quotes." if _is_text(kind) else "Expected a number."


def _show(value: Any) -> str:
    return "a list" if isinstance(value, list | pa.Array) else shorten(repr(value), quoted=False)


def _decimal(value: Any) -> Decimal:
    """A number as it was written: 0.1 is a tenth, not the closest binary fraction."""
    try:
        number = Decimal(value if isinstance(value, str) else repr(value))
    except InvalidOperation:
        number = Decimal("nan")
    if not number.is_finite() or number.adjusted() > 37 or -int(number.as_tuple().exponent) > 37:
        raise SettingsError(f"does not fit the columns: a decimal is compared with {_show(value)}. Expected a number.")
    return number


def _moment(value: Any, kind: pa.DataType) -> pa.Scalar:
    """An ISO text as a date, a timestamp in the column's zone, or a time of the day."""
    example = "09:30:00" if pa.types.is_time(kind) else "2024-01-31" if pa.types.is_date(kind) else "2024-01-31 09:30"
    advice = f"Expected an ISO text such as '{example}'."
    if not isinstance(value, str) or pa.types.is_duration(kind) or pa.types.is_interval(kind):
        raise SettingsError(f"does not fit the columns: {kind} is compared with {_show(value)}. {advice}")
    try:
        if pa.types.is_time(kind):
            return pa.scalar(datetime.time.fromisoformat(value), pa.time64("us"))
        if pa.types.is_date(kind) and len(value) <= 10:
            return pa.scalar(datetime.date.fromisoformat(value))
        moment = datetime.datetime.fromisoformat(value)
    except ValueError as error:
        raise SettingsError(f"does not fit the columns: {kind} is compared with {_show(value)}. {advice}") from error
    zone = kind.tz if pa.types.is_timestamp(kind) else None
    if zone is None:
        if moment.tzinfo is not None:
            raise SettingsError(f"does not fit the columns: {kind} has no zone, but {_show(value)} does. {advice}")
        return pa.scalar(moment, pa.timestamp("us"))
    if moment.tzinfo is None:
        local = pa.array([moment], pa.timestamp("us"))
        return pc.assume_timezone(local, zone, ambiguous="earliest", nonexistent="earliest")[0].cast(
            pa.timestamp("us", zone)
        )
    return pa.scalar(moment.astimezone(datetime.UTC), pa.timestamp("us", zone))


def _values(constants: Sequence[Any], kind: pa.DataType) -> Array:
    """The constants as an array of type `kind`, without those that no value of this type can equal."""
    kinds = set(map(type, constants))
    if pa.types.is_integer(kind) and kinds <= {int, float}:
        bits = kind.bit_width - (0 if pa.types.is_unsigned_integer(kind) else 1)
        low, high = (0 if pa.types.is_unsigned_integer(kind) else -(1 << bits)), (1 << bits) - 1
        whole = constants if kinds <= {int} else [int(c) for c in constants if type(c) is int or c.is_integer()]
        if whole and (min(whole) < low or max(whole) > high):
            whole = [constant for constant in whole if low <= constant <= high]
        return pa.array(whole, kind)
    if (_is_text(kind) and kinds <= {str}) or (pa.types.is_boolean(kind) and kinds <= {bool}):
        return pa.array(constants, kind)
    if pa.types.is_floating(kind) and kinds <= {int, float}:
        return pa.array(list(map(float, constants)), kind)
    scalars = [_scalar(constant, kind) for constant in constants]  # the others are few, and messages name the wrong one
    parts = []
    for scalar in scalars:
        try:
            parts.append(scalar.cast(kind).as_py())
        except pa.ArrowInvalid:  # 1.505 is no value of decimal(10, 2)
            continue
    return pa.array(parts, kind)
