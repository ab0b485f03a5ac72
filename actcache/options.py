"""option(): a field of a configuration, with the help text that the command line shows for its flag.

JudgingConfig is the one option that everything that judges has in common.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, asdict, dataclass, field
from typing import Any, TypeVar

from actcache.errors import SettingsError

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


ON_SEEN = ("leave-out", "use")


@dataclass(frozen=True)
class JudgingConfig:
    """What is done with images that an ancestor of what is judged has learned from. Raises SettingsError."""

    _: KW_ONLY
    on_seen: str = option(
        ON_SEEN[0],
        "What to do with images that were learned from, in training or in choosing: leave-out, or use them as well.",
    )

    def __post_init__(self) -> None:
        if self.on_seen not in ON_SEEN:
            raise SettingsError(f"--on-seen must be {' or '.join(ON_SEEN)}, got {self.on_seen!r}.")

    @property
    def uses_seen(self) -> bool:
        return self.on_seen == "use"


def identity_of(config: JudgingConfig) -> dict[str, Any]:
    """The fields of a configuration as they enter an identity.

    The default of `on_seen` is left out: what was made before the option existed lacks it and keeps its id.
    """
    fields = asdict(config)
    return {name: value for name, value in fields.items() if (name, value) != ("on_seen", ON_SEEN[0])}
