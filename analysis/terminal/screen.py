"""The screen: results on stdout, as text or as one JSON object; errors, warnings and hints on stderr.

Everything that is printed goes through this module. Data is escaped here (`visible`), and markup and emoji codes are
off, so `[red]` and `:smile:` in a name are printed as they are.
"""

import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from actcache.text import to_json, visible

stdout = Console(markup=False, emoji=False, highlight=False)
stderr = Console(markup=False, emoji=False, highlight=False, stderr=True)
lock = threading.RLock()
"""Held while something is written, so that a progress line and a warning do not mix."""

STARTED = time.time()
"""When this process began, in seconds since 1970."""

OURS = ("actcache", "saetrain", "analysis")


@dataclass
class Options:
    """The global flags of the command line."""

    quiet: bool = False
    json: bool = False
    traceback: bool = False


options = Options()
before_message: list[Callable[[], None]] = []
"""What a progress line does before another line is written below it."""


# ---------------------------------------------------------------------------------------------------------------------
# Results


def emit(facts: Mapping[str, Any], lines: str | Iterable[str | Text]) -> None:
    """Print the result: one JSON object, or what people read: a line, or several. A newline within one is escaped."""
    with lock:
        if options.json:
            print(to_json(facts))
            return
        for line in [lines] if isinstance(lines, str) else lines:
            stdout.print(Text(visible(line)) if isinstance(line, str) else line, soft_wrap=True)


def announce(facts: Mapping[str, Any], lines: str | Iterable[str | Text]) -> None:
    """Print what is known while the verb goes on, at once, also into a pipe."""
    emit(facts, lines)
    with suppress(OSError, ValueError):
        sys.stdout.flush()


# ---------------------------------------------------------------------------------------------------------------------
# Everything else, on stderr


def show_error(error: object) -> None:
    _tell(Text.assemble(("error: ", "bold red"), visible(error)))


def show_line(text: str) -> None:
    _tell(Text(visible(text)))


def ask(question: str, about: Iterable[str | Text]) -> bool:
    """Show on stderr what a question is about, ask it, and read from stdin whether it is yes. No answer is a no."""
    with lock:
        for line in about:
            _tell(Text(visible(line)) if isinstance(line, str) else line)
        stderr.print(Text(f"{visible(question)} "), soft_wrap=True, end="")
        return sys.stdin.readline().strip().lower() in ("y", "yes")


def show_note(text: str) -> None:
    """A hint, which --quiet and --json leave out."""
    if not (options.quiet or options.json):
        show_line(text)


def _tell(text: Text) -> None:
    with lock:
        for prepare in before_message:
            prepare()
        stderr.print(text, soft_wrap=True)


def prepare_screen() -> None:
    """Make the streams and the warnings of this process fit to be shown.

    A terminal that lacks a character gets its escape instead. Our own warnings become one line each; those of libraries
    are left out, unless --traceback asks for them.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    root = logging.getLogger()
    if not any(isinstance(handler, _Handler) for handler in root.handlers):
        root.addHandler(_Handler(logging.WARNING))
    warnings.showwarning = _show_warning


class _Handler(logging.Handler):
    """Shows what our loggers warn about."""

    def emit(self, record: logging.LogRecord) -> None:
        if options.traceback or record.name.split(".")[0] in OURS:
            with suppress(Exception):  # a message that cannot be formatted must not end the program
                show_warning(record.getMessage())


def _show_warning(message: Any, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
    if options.traceback or any(f"/{package}/" in filename for package in OURS):
        show_warning(f"{category.__name__}: {message}" if options.traceback else message)


def show_warning(message: object) -> None:
    _tell(Text.assemble(("warning: ", "bold yellow"), visible(message)))
