"""Selecting images: an expression over the columns of images.parquet in, a Boolean array out.

    "split == 'train' and label in (3, 5) and not blurred and 0.5 <= score < 0.9 and `Finding Labels` is not None"

Python's own parser reads the expression, nothing is executed, and each comparison is one Arrow call on a whole column.
A comparison with a missing value is neither true nor false, as in SQL, and an image counts only where the whole
expression is true.
"""

import ast
import itertools
import json
import keyword
import re
import unicodedata
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from actcache.errors import SettingsError
from actcache.store.comparison import Array, check_boolean, compare, compare_with_list, shorten

Names = Mapping[str, str | list[Any]]
"""What the words stand for that `_replace` has put into an expression: columns in backticks, and long lists."""

TAKES = "It takes columns, numbers, texts, comparisons, in, is None, and, or, not."

LONG_LIST = 1000
"""A list of at least so many values is read by `_replace`: Python's parser takes 3 s and 1.1 GB for a million."""

_TEXT = r"""'''.*?'''|\"\"\".*?\"\"\"|'(?:\\.|[^'\\\n])*'|"(?:\\.|[^"\\\n])*\""""
_VALUE = r"""(?:-?\d++(?:\.\d*+)?(?:[eE][+-]?\d++)?|'[^'\\\n]*+'|"[^"\\\n]*+")"""
_PIECES = re.compile(
    rf"(?P<list>\bin\s*+(?P<open>[(\[])\s*+"
    rf"(?P<values>{_VALUE}(?:\s*+,\s*+{_VALUE}){{{LONG_LIST - 1},}}+)\s*+,?\s*+[)\]])"
    rf"|(?P<text>{_TEXT})|`(?P<name>(?:[^`]|``)*)`",
    re.DOTALL,
)


def select_images(images: pa.Table, where: str, *, flag: str = "--where") -> NDArray[np.bool_]:
    """[I]: true where the expression holds. `flag`: name of the option, for messages.

    Columns whose names are not words of Python are written in backticks. Columns of dates, times and decimals are
    compared with ISO texts or numbers.

    Raises:
        SettingsError: it cannot be parsed, names a column that does not exist (the message lists those that do), or
            compares what cannot be compared.
    """
    shown = shorten(where)
    try:
        tree, names = _parse(where)
        selected = check_boolean(_evaluate(tree, names, images))
    except SettingsError as error:
        raise SettingsError(f"{flag} {error}{_hint_backticks(where, images)}") from error
    except SyntaxError as error:
        advice = _hint_backticks(where, images) or " Example: \"label == 'cat'\"."
        raise SettingsError(f"{flag} {shown} cannot be read ({error.msg}).{advice}") from error
    except (RecursionError, MemoryError) as error:
        raise SettingsError(f"{flag} {shown} cannot be read (it is nested too deeply). Simplify it.") from error
    except (pa.ArrowException, TypeError, ArithmeticError, ValueError) as error:
        what = shorten((str(error).splitlines() or [type(error).__name__])[0], quoted=False)
        raise SettingsError(f"{flag} {shown} does not fit the columns ({what}). Check their types.") from error
    return np.asarray(selected.fill_null(False).to_numpy(zero_copy_only=False), dtype=bool)


def _parse(where: str) -> tuple[ast.expr, Names]:
    text, names = _replace(where)
    try:
        text.encode()  # so that a lone surrogate is named as such
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `1and 2` has a SyntaxWarning, which speaks of <unknown>:1
            return ast.parse(text.strip(), mode="eval").body, names
    except ValueError as error:  # a zero byte, or a number of more than 4,300 digits
        raise SyntaxError("it holds a character or a number that no expression can have") from error


def _replace(where: str) -> tuple[str, Names]:
    """Put plain words in the place of columns in backticks and of long lists, but not inside of texts."""
    prefix = next(f"_{'_' * n}piece" for n in itertools.count() if f"_{'_' * n}piece" not in where)
    names: dict[str, str | list[Any]] = {}

    def replace(match: re.Match[str]) -> str:
        if match["text"] is not None:
            return match[0]
        word = f"{prefix}{len(names)}"
        if match["list"] is None:
            names[word] = match["name"].replace("``", "`")
            return f" {word} "
        if match["open"] + match[0][-1] not in ("()", "[]"):
            return match[0]  # (1, 2]: Python's parser says what is wrong
        names[word] = _read_values(match["values"])
        return f"in {word} "

    return _PIECES.sub(replace, where), names


def _read_values(text: str) -> list[Any]:
    with suppress(ValueError):  # 'texts', and 007
        values: list[Any] = json.loads(f"[{text}]")  # texts in double quotes have no backslash here, so they agree
        return values
    return [value[1:-1] if value[0] in "'\"" else float(value) if set(value) & set(".eE") else int(value)
            for value in re.findall(_VALUE, text)]  # fmt: skip


def _hint_backticks(where: str, images: pa.Table) -> str:
    """A sentence on a column that stands in the expression, and whose name has to be in backticks but is not."""
    bare = _PIECES.sub(" ", where)
    for name in images.column_names:
        if name and not _is_word(name) and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", bare):
            return f" Put the column's name in backticks: `{shorten(name.replace('`', '``'), quoted=False)}`."
    return ""


def _is_word(name: str) -> bool:
    """Whether Python's parser takes a name for itself; it normalizes letters such as ﬁ."""
    return name.isidentifier() and not keyword.iskeyword(name) and unicodedata.normalize("NFKC", name) == name


def _evaluate(node: ast.expr, names: Names, images: pa.Table) -> Any:
    """An Arrow array with a value for each image, a constant, or a list of constants."""
    match node:
        case ast.BoolOp(op=joint, values=values):
            join = pc.and_kleene if isinstance(joint, ast.And) else pc.or_kleene
            whole = check_boolean(_evaluate(values[0], names, images))
            for value in values[1:]:  # one after the other: Arrow's own expressions overflow the stack at 9,000 terms
                whole = join(whole, check_boolean(_evaluate(value, names, images)))
            return whole
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return pc.invert(check_boolean(_evaluate(operand, names, images)))
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.Compare(left=left, ops=ops, comparators=right):
            sides = [left, *right]
            values = [_evaluate(side, names, images) for side in sides]
            whole = None
            for i, op in enumerate(ops):
                part = _compare(op, values[i], values[i + 1], sides[i])
                whole = part if whole is None else pc.and_kleene(whole, part)
            return whole
        case ast.Name(id=word):
            name = names.get(word, word)
            return name if isinstance(name, list) else _find_column(images, name)
        case ast.Constant(value=value) if value is None or isinstance(value, str | int | float | bool):
            return value
        case ast.Tuple(elts=elements) | ast.List(elts=elements):
            return [_evaluate(element, names, images) for element in elements]
    raise SettingsError(f"cannot contain {shorten(ast.unparse(node))}. {TAKES}")


def _find_column(images: pa.Table, name: str) -> Array:
    if images.column_names.count(name) != 1:
        columns = [shorten(column, quoted=False) for column in images.column_names[:20]]
        more = f" and {images.num_columns - 20:,} more" if images.num_columns > 20 else ""
        what = "names two columns" if name in images.column_names else "names the unknown column"
        raise SettingsError(f"{what} {shorten(name)}. Columns: {', '.join(columns)}{more}.")
    return images.column(name).combine_chunks()


def _compare(op: ast.cmpop, a: Any, b: Any, left: ast.expr) -> Array:
    if isinstance(op, ast.Is | ast.IsNot):
        if b is not None or not isinstance(a, pa.Array):
            raise SettingsError("supports `is` only with None, as in `note is not None`.")
        return a.is_null() if isinstance(op, ast.Is) else a.is_valid()
    if isinstance(op, ast.In | ast.NotIn):
        if not isinstance(b, list) or not isinstance(a, pa.Array):
            raise SettingsError("supports `in` only with a list, as in `label in (1, 2)`.")
        inside = compare_with_list(a, b)
        return inside if isinstance(op, ast.In) else pc.invert(inside)
    if not isinstance(a, pa.Array) and not isinstance(b, pa.Array):
        raise SettingsError(f"compares {shorten(ast.unparse(left))} with no column. Name a column on one side.")
    return compare(type(op), a, b)
