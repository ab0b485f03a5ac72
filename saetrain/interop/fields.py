"""Which fields and tensors a version of a format has: every one is used, known not to matter, or refused by its name.

A field that nobody looked at may change what the SAE computes (a scaling factor, another activation), so a reader
never passes over one. What "does not matter" is listed by name too: settings of the training, where the activations
came from, and where the weights lay.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from actcache import CorruptError, SettingsError


@dataclass(frozen=True)
class Fields:
    """The fields of a settings file.

    Attributes:
        version: the package and its versions, in messages.
        used: the reader takes their values into account.
        neutral: no value of them changes what the SAE computes.
        only: fields that would change it, with the values for which they do not; any other is refused.
    """

    version: str
    used: frozenset[str]
    neutral: frozenset[str] = frozenset()
    only: Mapping[str, tuple[object, ...]] = field(default_factory=dict)


def names(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


def check_fields(config: Mapping[str, object], fields: Fields, path: Path) -> None:
    """Raise SettingsError for a field that is not known, or that has a value that cannot be read."""
    unknown = sorted(map(shorten, set(config) - fields.used - fields.neutral - set(fields.only)))
    if unknown:
        raise SettingsError(
            f"{path} has {_count(unknown, 'field')} that {fields.version} is not known to write: "
            f"{', '.join(unknown[:4])}. It may change what the SAE computes. Remove it from a copy of the file if you "
            "know that it does not."
        )
    for name, values in fields.only.items():
        if name in config and not any(is_same(config[name], value) for value in values):
            accepted = " or ".join(map(repr, values))
            raise SettingsError(
                f"{path} has {name} = {shorten(config[name])}, which no SAE here can compute; only {accepted} can be "
                "read. Give another SAE."
            )


def check_tensors(tensors: Mapping[str, object], known: Iterable[str], path: Path) -> None:
    """Raise CorruptError for a tensor that the reader does not take into account."""
    unknown = sorted(map(shorten, set(tensors) - set(known)))
    if unknown:
        raise CorruptError(
            f"{path} has {_count(unknown, 'entry')} that this kind of SAE does not have: {', '.join(unknown[:4])}. "
            "It may change what the SAE computes. Check that the recorded architecture is right, or remove it from a "
            "copy of the file."
        )


def check_sizes(config: Mapping[str, object], sizes: Mapping[str, int], path: Path) -> None:
    """Raise CorruptError unless the recorded sizes, where there are any, are those of the tensors."""
    for name, size in sizes.items():
        value = config.get(name)
        if value is not None and not (isinstance(value, int | float) and value == size):
            raise CorruptError(
                f"{path} has {name} = {shorten(value)}, but its tensors have {size}. Copy both files again: they do "
                "not belong together."
            )


def is_same(value: object, other: object) -> bool:
    """Equality that tells True from 1."""
    return type(value) is type(other) and value == other


def shorten(value: object) -> str:
    """A value from a file as a message shows it: at most 60 characters, without control characters.

    An integer of thousands of digits has no text in Python (`sys.set_int_max_str_digits`), and none that helps here.
    """
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    text = ascii(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def _count(found: list[str], noun: str) -> str:
    return f"one {noun}" if len(found) == 1 else f"{len(found)} {'entrie' if noun == 'entry' else noun}s"
