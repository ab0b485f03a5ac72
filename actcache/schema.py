"""Schemas: what a JSON file may hold, given by the annotations of frozen dataclasses and typed dictionaries.

In: a type, and a value as `json` returns it. Out: the value of that type, checked field by field: presence, type, range
and, in `__post_init__`, the relations between fields. A range stands beside its field, in the metadata keys that
`actcache.options.option` uses: at_least, at_most, above, below. It holds for every number in the field. The key
`any_text` allows text that is no Unicode, as the name of a file may be. Nothing is allocated for what a file claims.

JSON has no NaN, so None stands for a number that does not exist. A field that has a default may be absent; a field that
no type names is ignored. A trailing underscore is not part of the name.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, NotRequired, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

from actcache.errors import CorruptError, PipelineError

T = TypeVar("T")

_COMPARE: Mapping[str, tuple[Callable[[Any, Any], bool], str]] = {
    "at_least": (lambda value, bound: value >= bound, "at least"),
    "at_most": (lambda value, bound: value <= bound, "at most"),
    "above": (lambda value, bound: value > bound, "above"),
    "below": (lambda value, bound: value < bound, "below"),
}
_NO_RANGE: Mapping[str, Any] = MappingProxyType({})
_MAX_INT, _MAX_FLOAT = 2**62, sys.float_info.max
"""Larger whole numbers fit no index and no size, and a product of two smaller ones is still exact in Python."""
_MAX_DEPTH = 32
"""Nesting of what a schema does not describe; no file of ours has more than 5 levels, and a reader recurses."""
_SHOWN = 40
"""Characters of a wrong value that a message shows."""


class MalformedError(ValueError):
    """A value that is not of its type; the text names the place, what was expected and what was there."""


def parse(kind: type[T], value: object, file: object, advice: str) -> T:
    """A record from what a JSON file holds.

    Args:
        file: path of the file, for the message.
        advice: the last part of the message.

    Raises:
        CorruptError: a field is missing, or has another type or range; the message names file and field.
    """
    try:
        record: T = parse_value(kind, value)
    except MalformedError as error:
        raise CorruptError(f"{file} has a missing or malformed field: {error}. {advice}") from error
    return record


def parse_value(hint: Any, value: object, place: str = "", limits: Mapping[str, Any] = _NO_RANGE) -> Any:
    """The value of a type that JSON holds at a place such as `curve[3].accuracy`. Raises MalformedError."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is object or hint is Any:
        _check_plain(value, place, 0)
        return value
    if origin in (Union, UnionType):
        return _parse_union(args, value, place, limits)
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in args):
            return value
        raise _wrong(place, f"one of {', '.join(map(str, args))}", value)
    if origin is NotRequired:
        return parse_value(args[0], value, place, limits)
    if origin is tuple and isinstance(value, list | tuple):
        if args[-1] is not Ellipsis:
            if len(args) != len(value):
                raise _wrong(place, f"a list of {len(args)}", value)
            return tuple(parse_value(a, v, f"{place}[{i}]", limits) for i, (a, v) in enumerate(zip(args, value)))  # noqa: B905
        return _parse_list(args[0], value, place, limits)
    if origin in (list, Sequence) and isinstance(value, list | tuple):
        return list(_parse_list(args[0], value, place, limits))
    if origin in (dict, Mapping) and isinstance(value, dict):
        return {
            _key(args[0], key, place): parse_value(args[1], entry, _at(place, key), limits)
            for key, entry in value.items()
        }
    if is_typeddict(hint) and isinstance(value, dict):
        return _parse_dictionary(hint, value, place)
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return _parse_fields(hint, value, place)
    if hint is str and type(value) is str:
        return value if "any_text" in limits else _check_text(value, place)
    if (hint is float and type(value) in (int, float)) or (hint is int and type(value) is int):
        return _check_number(hint, value, place, limits)
    if hint in (bool, NoneType) and type(value) is hint:
        return value
    raise _wrong(place, _name(hint), value)


def _parse_union(args: tuple[Any, ...], value: object, place: str, limits: Mapping[str, Any]) -> Any:
    reason = None
    for option in args:
        try:
            return parse_value(option, value, place, limits)
        except MalformedError as error:  # say what is wrong inside, e.g. a range, rather than that no option fits
            reason = reason or (error if _fits(option, value) else None)
    raise reason or _wrong(place, " or ".join(map(_name, args)), value)


def _fits(hint: Any, value: object) -> bool:
    """Whether a value is of the outer kind of a type: a record, a list, a number."""
    if isinstance(value, dict):
        return is_dataclass(hint) or is_typeddict(hint) or get_origin(hint) in (dict, Mapping)
    if isinstance(value, list | tuple):
        return get_origin(hint) in (tuple, list, Sequence)
    return hint is type(value) or (hint is float and type(value) is int)


def _parse_list(hint: Any, value: Sequence[Any], place: str, limits: Mapping[str, Any]) -> tuple[Any, ...]:
    if hint in (float, int) and not limits and all(type(entry) is hint for entry in value):  # long lists of numbers
        largest = _MAX_FLOAT if hint is float else _MAX_INT
        if all(-largest <= entry <= largest for entry in value):
            return tuple(value)
    return tuple(parse_value(hint, entry, f"{place}[{i}]", limits) for i, entry in enumerate(value))


def _parse_fields(record: type, value: Mapping[str, object], place: str) -> Any:
    hints, given = _hints(record), {}
    for field in fields(record):
        name = field.name.rstrip("_")
        if name in value:
            given[field.name] = parse_value(hints[field.name], value[name], _at(place, name), field.metadata)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise MalformedError(f"{_at(place, name)} is missing")
    try:
        return record(**given)
    except MalformedError:
        raise
    except (PipelineError, ValueError, TypeError, OverflowError) as error:  # a relation between fields does not hold
        reason = str(error) if len(str(error)) <= 5 * _SHOWN else f"{str(error)[: 5 * _SHOWN]} ..."
        raise MalformedError(f"{place}: {reason}".removeprefix(": ").rstrip(".")) from error


def _parse_dictionary(kind: Any, value: dict[str, object], place: str) -> dict[str, object]:
    for name, hint in _hints(kind).items():
        if name in value:
            parse_value(hint, value[name], _at(place, name))
        elif name in kind.__required_keys__:
            raise MalformedError(f"{_at(place, name)} is missing")
    return value


@cache
def _hints(record: type) -> dict[str, object]:
    return get_type_hints(record)


def _key(hint: Any, key: str, place: str) -> Any:
    _check_text(key, place)
    if hint is not int:
        return key
    if not re.fullmatch(r"0|[1-9]\d{0,17}", key, re.ASCII):
        raise _wrong(f"a name in {place}" if place else "a name", "a whole number", key)
    return int(key)


def _check_text(value: str, place: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which no file or terminal takes
        raise _wrong(place, "text in Unicode", ascii(value)) from error
    if "\0" in value:
        raise _wrong(place, "text without a zero byte", ascii(value))
    return value


def _check_number(hint: Any, value: Any, place: str, limits: Mapping[str, Any]) -> Any:
    largest = _MAX_INT if hint is int else _MAX_FLOAT
    if not -largest <= value <= largest:
        raise _wrong(place, f"{hint.__name__} of at most {largest:.2g}", value)
    for name, (holds, words) in _COMPARE.items():
        bound = limits.get(name)
        if bound is not None and not holds(value, bound):
            raise _wrong(place, f"{hint.__name__} {words} {bound}", value)
    return value


def _check_plain(value: object, place: str, depth: int) -> None:
    """Check what no type describes: readers only show it, or pass it on."""
    if depth > _MAX_DEPTH:
        raise MalformedError(f"{place[:_SHOWN]} should be nested at most {_MAX_DEPTH} deep")
    if isinstance(value, str):
        _check_text(value, place)
    elif isinstance(value, list | tuple):
        for i, entry in enumerate(value):
            _check_plain(entry, f"{place}[{i}]", depth + 1)
    elif isinstance(value, dict):
        for key, entry in value.items():
            _check_plain(entry, _at(place, _key(str, key, place)), depth + 1)
    elif type(value) in (int, float):
        _check_number(float, value, place, _NO_RANGE)


def _at(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _wrong(place: str, wanted: str, value: object) -> MalformedError:
    try:
        shown = repr(value[:_SHOWN] if isinstance(value, str) else f"{value}"[:_SHOWN])
    except (RecursionError, ValueError):  # deep nesting, or a number of 5,000 digits
        shown = f"{type(value).__name__}"
    return MalformedError(f"{place or 'the whole'} should be {wanted}, got {shown}")


def _name(hint: Any) -> str:
    if hint is NoneType:
        return "null"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
