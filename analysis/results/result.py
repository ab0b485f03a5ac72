"""Records: frozen dataclasses that are written as JSON, and checked field by field when they are read.

JSON has no NaN, so None stands for a number that does not exist. A field whose default is None is left out of the JSON
while it is None; a field that has a default may be absent from a file. A trailing underscore is not part of the name.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, ClassVar, NamedTuple, Self, Union, get_args, get_origin, get_type_hints

from actcache import CorruptError
from actcache.seen import SeenImages

Row = Mapping[str, str | int | float | None]
"""A row of a table that people read: column name -> value."""


@dataclass(frozen=True)
class ResultParent:
    id: str
    path: str  # name of the folder


class Head(NamedTuple):
    """What a result was made from. `id` is the hash of kind, schema, settings and the parents' ids."""

    kind: str
    schema: int
    id: str
    settings: Mapping[str, object]
    parents: Mapping[str, ResultParent]


@dataclass(frozen=True)
class Result:
    """A result: its head, what was done with images that had been learned from, and what a subclass measures.

    Attributes:
        seen: one for each run, and one for a choice of latents; None in results made before it was recorded.
    """

    KIND: ClassVar[str]

    kind: str
    schema: int
    id: str
    settings: Mapping[str, object]
    parents: Mapping[str, ResultParent]
    seen: tuple[SeenImages, ...] | None = field(default=None, kw_only=True)

    def to_json(self) -> dict[str, object]:
        return {name: to_plain(getattr(self, field.name)) for name, field in _written(self)}

    @classmethod
    def from_json(cls, content: object, file: str) -> Self:
        """Raises CorruptError, naming the file and the field, where a field is missing or has another type."""
        try:
            record: Self = from_plain(cls, content, "")
        except _MalformedError as error:
            raise CorruptError(
                f"{file} has a missing or malformed field: {error}. "
                "Run the command that made it again, with --overwrite."
            ) from error
        return record

    def tables(self) -> list[list[Row]]:
        """The tables that the command line prints."""
        return []

    def lines(self) -> list[str]:
        """The lines that the command line prints below the tables."""
        return []

    def notes(self) -> list[str]:
        """What the command line says about images that were learned from, below all else."""
        return [line for seen in self.seen or () for line in seen.lines()]


def _written(record: Any) -> list[tuple[str, Field[Any]]]:
    """(name in JSON, field) of the fields that are written."""
    return [
        (field.name.rstrip("_"), field)
        for field in fields(record)
        if not (field.default is None and getattr(record, field.name) is None)
    ]


def to_plain(value: object) -> object:
    """A record, or a value of one, as JSON knows it."""
    if is_dataclass(value):
        return {name: to_plain(getattr(value, field.name)) for name, field in _written(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class _MalformedError(Exception):
    pass


@cache
def _hints(record: type) -> dict[str, Any]:
    return get_type_hints(record)


def from_plain(hint: Any, value: object, place: str) -> Any:
    """The value of a type that JSON holds at a place such as `curve[3].accuracy`."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is object:
        return value
    if origin in (Union, UnionType):
        for option in args:
            try:
                return from_plain(option, value, place)
            except _MalformedError:
                continue
    elif origin is tuple and isinstance(value, list):
        if args[-1] is not Ellipsis and len(args) == len(value):
            return tuple(from_plain(a, v, f"{place}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
        if args[-1] is Ellipsis and all(type(entry) is args[0] for entry in value):  # long lists of numbers
            return tuple(value)
        if args[-1] is Ellipsis:
            return tuple(from_plain(args[0], entry, f"{place}[{i}]") for i, entry in enumerate(value))
    elif origin is Mapping and isinstance(value, dict):
        return {key: from_plain(args[1], entry, f"{place}.{key}".strip(".")) for key, entry in value.items()}
    elif is_dataclass(hint) and isinstance(value, dict):
        assert isinstance(hint, type)
        return _from_fields(hint, value, place)
    elif (hint is float and type(value) in (int, float)) or (
        hint in (int, str, bool, NoneType) and type(value) is hint
    ):
        return value
    wanted = hint.__name__ if isinstance(hint, type) else str(hint)
    raise _MalformedError(f"{place or 'the whole'} should be {wanted}, got {str(value)[:40]!r}")


def _from_fields(record: type, value: Mapping[str, object], place: str) -> Any:
    given = {}
    for each in fields(record):
        name = each.name.rstrip("_")
        where = f"{place}.{name}".strip(".")
        if name in value:
            given[each.name] = from_plain(_hints(record)[each.name], value[name], where)
        elif each.default is MISSING and each.default_factory is MISSING:
            raise _MalformedError(f"{where} is missing")
    return record(**given)
