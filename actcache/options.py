"""option(): a field of a configuration, with the help text that the command line shows for its flag."""

from collections.abc import Callable
from dataclasses import field
from typing import Any, TypeVar

T = TypeVar("T")


def option(default: T, help: str, *, sweep: bool = False, parser: Callable[[str], T] | None = None) -> T:
    """A dataclass field with a default and a help text.

    Args:
        help: one complete phrase, as `--help` prints it.
        sweep: the flag may be given several times, and every combination of such values is run.
        parser: turns the flag's text into a value, if the value has a notation of its own.
    """
    return field(default=default, metadata={"help": help, "sweep": sweep, "parser": parser})


def required(help: str) -> Any:
    """A dataclass field without a default, with a help text as `option` takes it."""
    return field(metadata={"help": help, "sweep": False, "parser": None})
