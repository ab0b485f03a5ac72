"""Selecting images: an expression over the columns of images.parquet in, a Boolean array out.

    "split == 'train' and label in (3, 5) and not blurred and 0.5 <= score < 0.9 and note is not None"

Python's own parser reads the expression, which is turned into an Arrow expression; nothing is executed. A comparison
with a missing value is false.
"""

import ast
import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from actcache.errors import SettingsError

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}  # fmt: skip


def select_images(images: pa.Table, where: str, *, flag: str = "--where") -> NDArray[np.bool_]:
    """[I]: true where the expression holds. `flag`: name of the option, for messages.

    Raises:
        SettingsError: it cannot be parsed, names a column that does not exist (the message lists those that do), or
            compares what cannot be compared.
    """
    import pyarrow.dataset as ds  # loads pandas where it is installed: 0.3 s

    try:
        tree = ast.parse(where.strip(), mode="eval").body
        selected = ds.dataset(images).to_table(columns={"": _translate(tree, images.column_names)}).column("")
    except SettingsError as error:
        raise SettingsError(f"{flag} {error}") from error
    except SyntaxError as error:
        raise SettingsError(f"{flag} {where!r} cannot be read ({error.msg}). Example: \"label == 'cat'\".") from error
    except (RecursionError, MemoryError, ValueError) as error:
        raise SettingsError(f"{flag} {where!r} cannot be read ({str(error)[:100]}).") from error
    except (pa.ArrowException, TypeError, OverflowError) as error:
        what = str(error).splitlines()[0][:200]
        raise SettingsError(f"{flag} {where!r} does not fit the columns ({what}).") from error
    if not pa.types.is_boolean(selected.type):
        raise SettingsError(f"{flag} {where!r} gives {selected.type}, expected true or false. Compare it with a value.")
    return np.asarray(selected.fill_null(False).to_numpy(zero_copy_only=False), dtype=bool)


def _translate(node: ast.expr, columns: list[str]) -> Any:
    """Translate to an Arrow expression, a constant, or a tuple of constants."""
    match node:
        case ast.BoolOp(op=op, values=values):
            parts = [_translate(value, columns) for value in values]
            return reduce(operator.and_ if isinstance(op, ast.And) else operator.or_, parts)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return ~_translate(operand, columns)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.Compare(left=left, ops=ops, comparators=right):
            sides = [left, *right]
            return reduce(operator.and_, (_compare(*pair, columns) for pair in zip(sides, ops, right, strict=False)))
        case ast.Name(id=name) if name in columns:
            return pc.field(name)
        case ast.Name(id=name):
            raise SettingsError(f"names the unknown column {name!r}. Columns: {', '.join(columns)}.")
        case ast.Constant(value=value) if value is None or isinstance(value, str | int | float | bool):
            return value
        case ast.Tuple(elts=elements) | ast.List(elts=elements):
            return tuple(_translate(element, columns) for element in elements)
    raise SettingsError(
        f"cannot contain {ast.unparse(node)!r}. It takes columns, numbers, texts, comparisons, in, "
        "is None, and, or, not."
    )


def _compare(left: ast.expr, op: ast.cmpop, right: ast.expr, columns: list[str]) -> Any:
    a, b = _translate(left, columns), _translate(right, columns)
    if isinstance(op, ast.Is | ast.IsNot):
        if b is not None or not isinstance(a, pc.Expression):
            raise SettingsError("supports `is` only with None, as in `note is not None`.")
        return a.is_null() if isinstance(op, ast.Is) else a.is_valid()
    if isinstance(op, ast.In | ast.NotIn):
        if not isinstance(b, tuple) or not isinstance(a, pc.Expression):
            raise SettingsError("supports `in` only with a list, as in `label in (1, 2)`.")
        inside = a.isin(list(b))
        return inside if isinstance(op, ast.In) else ~inside & a.is_valid()
    if not isinstance(a, pc.Expression) and not isinstance(b, pc.Expression):
        raise SettingsError(f"compares {ast.unparse(left)!r} with no column. Name a column on one side.")
    return _COMPARE[type(op)](a, b)
