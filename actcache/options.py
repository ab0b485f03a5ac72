"""Fields of configurations: the help text that the command line shows for a flag, and the range of its values.

`check_options` holds a configuration to its ranges when it is made, whoever makes it: the command line, a notebook, or
a reader of an artifact. `check_number` is the same check for the arguments of a verb that are not fields. JudgingConfig
is the one option that everything that judges has in common.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, fields
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from actcache.errors import SettingsError

T = TypeVar("T")
N = TypeVar("N", int, float)

INT_MAX = 2**63 - 1
"""The largest whole number that torch, numpy and a table hold."""
FLOAT_MAX = 3.4028234663852886e38
"""The largest number that float32 holds, in which everything is computed."""
BOUNDS = ("at_least", "at_most", "above", "below")
"""The keys of a field's metadata that give its range."""


def option(
    default: T,
    help: str,
    *,
    sweep: bool = False,
    later: bool = False,
    parser: Callable[[str], T] | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> T:
    """A dataclass field with a default and a help text.

    Args:
        help: one complete phrase, as `--help` prints it.
        sweep: the flag may be given several times, and every combination of such values is run.
        later: results were made before the option existed, so its default is no part of an identity (`identity_of`).
        parser: turns the flag's text into a value, if the value has a notation of its own.
        at_least, at_most, above, below: the range of the number, or of each number of a sequence.
    """
    bounds = {"at_least": at_least, "at_most": at_most, "above": above, "below": below}
    return field(default=default, metadata={"help": help, "sweep": sweep, "later": later, "parser": parser, **bounds})


def required(help: str, *, at_least: float | None = None, at_most: float | None = None) -> Any:
    """A dataclass field without a default, with a help text and a range as `option` takes them."""
    bounds = {"at_least": at_least, "at_most": at_most}
    return field(metadata={"help": help, "sweep": False, "parser": None, **bounds})


def check_number(
    name: str,
    value: Any,
    kind: type[N],
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> N:
    """A number as an int or a float of plain Python, which JSON can hold.

    Args:
        name: of the argument; the message spells it as a flag, `batch_size` -> --batch-size.

    Raises:
        SettingsError: it is no number, it is a bool, NaN or infinite, or it lies outside its range.
    """
    number, limit = _plain(value), INT_MAX if kind is int else FLOAT_MAX
    typed = isinstance(number, Integral if kind is int else Real) and not isinstance(number, bool)
    if not typed or not -math.inf < number < math.inf:
        what = "a whole number" if kind is int else "a finite number"
    else:
        what = ""
        if number > limit and at_most is None and below is None:
            at_most = limit
        if number < -limit and at_least is None and above is None:
            at_least = -limit
        if (
            (at_least is None or number >= at_least)
            and (at_most is None or number <= at_most)
            and (above is None or number > above)
            and (below is None or number < below)
        ):
            return kind(number)
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    ranges = [f"{word} {bound}" for word, bound in bounds.items() if bound is not None]
    if what and ranges:
        what += " of " if ranges[0].startswith("at") else " "
    raise SettingsError(f"{_flag(name)} must be {what}{' and '.join(ranges)}, got {_show(value)}.")


def check_options(config: Any) -> None:
    """Turn the values of a frozen configuration into plain Python, and hold them to their types and ranges.

    Every configuration calls this in `__post_init__`. numpy's scalars become Python's; a whole number given for a float
    becomes a float; a sequence becomes a tuple; a Path given for a text becomes a text.

    Raises SettingsError with the flag of the first field that is wrong, what was expected, and what was given.
    """
    class_: type = type(config)
    for name, (flag, kind, bounds) in _rules(class_).items():
        object.__setattr__(config, name, _check_value(flag, getattr(config, name), kind, bounds))


# ---------------------------------------------------------------------------------------------------------------------
# What judges

ON_SEEN = ("leave-out", "use")


@dataclass(frozen=True)
class JudgingConfig:
    """What is done with images that an ancestor of what is judged has learned from. Raises SettingsError."""

    _: KW_ONLY
    on_seen: str = option(
        ON_SEEN[0],
        "What to do with images that were learned from, in training or in choosing: leave-out, or use them as well.",
        later=True,
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.on_seen not in ON_SEEN:
            raise SettingsError(f"--on-seen must be {' or '.join(ON_SEEN)}, got {self.on_seen!r}.")

    @property
    def uses_seen(self) -> bool:
        return self.on_seen == "use"


def identity_of(config: JudgingConfig) -> dict[str, Any]:
    """The fields of a configuration as they enter an identity.

    The default of a later option is left out: what was made before the option existed lacks it and keeps its id.
    """
    values = asdict(config)
    return {
        each.name: values[each.name]
        for each in fields(config)
        if not (each.metadata.get("later") and values[each.name] == each.default)
    }


# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    """What a field holds: the types of a single value, the types within a sequence, and whether None is a value.

    `int | None` is an optional int; `str | Sequence[str]` is a text, or a sequence of texts.
    """

    single: frozenset[Any]
    several: frozenset[Any]
    optional: bool


_WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", Path: "a path"}


@cache
def _rules(config: Any) -> Mapping[str, tuple[str, _Kind, Mapping[str, Any]]]:
    """The flag of each field, what it holds, and its range, which a subclass that declares it anew inherits.

    A flag that may be repeated is singular.
    """
    hints = get_type_hints(config)
    declared = [vars(base).get("__dataclass_fields__", {}) for base in config.__mro__]
    rules = {}
    for each in fields(config):
        metadata: Mapping[str, Any] = next(
            (level[each.name].metadata for level in declared if each.name in level and level[each.name].metadata), {}
        )
        kind, bounds = _kind(hints[each.name]), {name: metadata.get(name) for name in BOUNDS}
        flag = each.name.removesuffix("s") if kind.several and not metadata.get("parser") else each.name
        rules[each.name] = (flag, kind, bounds)
    return rules


def _kind(hint: Any) -> _Kind:
    if get_origin(hint) in (tuple, Sequence):
        return _Kind(frozenset(), _kind(next(part for part in get_args(hint) if part is not ...)).single, False)
    parts = [_kind(part) for part in get_args(hint)]
    if not parts:
        return _Kind(frozenset({hint} - {NoneType}), frozenset(), hint is NoneType)
    return _Kind(
        frozenset[Any]().union(*(part.single for part in parts)),
        frozenset[Any]().union(*(part.several for part in parts)),
        any(part.optional for part in parts),
    )


def _check_value(name: str, value: Any, kind: _Kind, bounds: Mapping[str, Any]) -> Any:
    if value is None and kind.optional:
        return None
    is_text = isinstance(value, str | bytes | os.PathLike)
    if kind.several and not (is_text and kind.single):
        if is_text or isinstance(value, Mapping) or not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
            example = "[1, 2]" if int in kind.several or float in kind.several else '["a", "b"]'
            raise SettingsError(f"{_flag(name)} must be a list such as {example}, got {_show(value)}.")
        return tuple(_check_single(name, each, kind.several, bounds) for each in value)
    return _check_single(name, value, kind.single, bounds)


def _check_single(name: str, value: Any, types: frozenset[Any], bounds: Mapping[str, Any]) -> Any:
    if types == {int} or types == {float}:
        return check_number(name, value, *types, **bounds)
    value = _plain(value)
    if str in types and Path not in types and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if types <= _WORDS.keys() and not isinstance(value, tuple(os.PathLike if t is Path else t for t in types)):
        words = " or ".join(word for type_, word in _WORDS.items() if type_ in types)
        raise SettingsError(f"{_flag(name)} must be {words}, got {_show(value)}.")
    return value


def _plain(value: Any) -> Any:
    """The Python value of a numpy scalar, or of an array or tensor with no axes."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _show(value: Any) -> str:
    """A value in one short line."""
    value = _plain(value)
    if isinstance(value, Integral) and abs(int(value)) > 10**40:  # Python refuses to write out more than 4,300 digits
        return "a number of more than 40 digits"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _flag(name: str) -> str:
    """batch_size -> --batch-size, class_ -> --class."""
    return f"--{name.strip('_').replace('_', '-')}"
