"""Records: frozen dataclasses that are written as JSON, and checked by `actcache.schema` when they are read.

JSON has no NaN, so None stands for a number that does not exist. A field whose default is None is left out of the JSON
while it is None; a field that has a default may be absent from a file. A trailing underscore is not part of the name.
"""

import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, NamedTuple, Self

from actcache.schema import parse
from actcache.seen import SeenImages
from analysis.results.judge import JudgeFacts

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
        judge: the classifier whose answers were counted. None where there is none, and in results made before there
            was a choice: zero-shot, with the softmax loss.
    """

    KIND: ClassVar[str]

    kind: str
    schema: int
    id: str
    settings: Mapping[str, object]
    parents: Mapping[str, ResultParent]
    seen: tuple[SeenImages, ...] | None = field(default=None, kw_only=True)
    judge: JudgeFacts | None = field(default=None, kw_only=True)

    def to_json(self) -> dict[str, object]:
        """What is written into a file."""
        return {name: to_plain(getattr(self, each.name)) for name, each in _written(self)}

    @classmethod
    def from_json(cls, content: object, file: str) -> Self:
        """Read what `to_json` gave.

        Raises:
            CorruptError: a field is missing or has another type; the message names the file and the field.
        """
        return parse(cls, content, file, "Run the command that made it again, with --overwrite.")

    def tables(self) -> list[list[Row]]:
        """The tables that the command line prints."""
        return []

    def lines(self) -> list[str]:
        """The lines that the command line prints below the tables."""
        return []

    def notes(self) -> list[str]:
        """What the command line says about the judge and about images that were learned from, below all else."""
        judge = [] if self.judge is None else self.judge.lines()
        return [*judge, *(line for seen in self.seen or () for line in seen.lines())]

    @property
    def judged_by(self) -> JudgeFacts:
        """The judge, also of results that do not record it."""
        return self.judge or JudgeFacts("zero-shot", "softmax")


def _written(record: Any) -> list[tuple[str, Field[Any]]]:
    """(name in JSON, field) of the fields that are written."""
    return [
        (each.name.rstrip("_"), each)
        for each in fields(record)
        if not (each.default is None and getattr(record, each.name) is None)
    ]


def to_plain(value: object) -> object:
    """A record, or a value of one, as JSON knows it."""
    if is_dataclass(value):
        return {name: to_plain(getattr(value, each.name)) for name, each in _written(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
