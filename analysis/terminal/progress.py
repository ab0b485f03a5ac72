"""Progress on stderr: one line that is rewritten on a terminal, or a new line at growing intervals where there is none.

The line always holds what is done of how much, the rate, and the time left; what does not fit beside them is left out
as a whole, so no number is ever cut. A thread redraws it, so the time goes on while a long step is computed.
"""

import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from rich.filesize import decimal

from actcache.interrupts import interrupt
from actcache.text import visible
from analysis.terminal.screen import before_message, lock, options, show_note

REDRAW_S = 0.5
QUIET_S = 1.0
"""What ends within this time shows no line."""
FIRST_LINE_S = 5.0
"""Without a terminal, the first line comes after this time, and each later one after twice the time."""
WINDOW_S = 30.0
"""The rate is that of the last half minute."""
UNITS = {"train": "steps", "adapt": "steps", "analyze": "tasks", "compare with the truth": "steps"}
"""What `show_steps` counts in a step; images in all others."""
BAR = (6, 24)
"""The fewest and the most columns of the bar."""


@dataclass
class State:
    """What is known of a task. Times are seconds of time.monotonic()."""

    name: str
    unit: str
    started: float
    done: int = 0
    total: int | None = None
    note: str = ""
    closed: bool = False
    history: deque[tuple[float, int]] = field(default_factory=deque)

    def update(self, done: int, total: int, note: str, now: float) -> None:
        """Record progress. The first call says where a resumed task begins, so that its rate is true."""
        self.done, self.total, self.note = done, total, note
        self.history.append((now, done))
        while len(self.history) > 2 and now - self.history[1][0] > WINDOW_S:
            self.history.popleft()

    @property
    def rate(self) -> float | None:
        """Units per second; None while it is not known."""
        if len(self.history) < 2:
            return None
        (first, before), (last, after) = self.history[0], self.history[-1]
        return (after - before) / (last - first) if after > before and last > first else None

    @property
    def finished(self) -> bool:
        return self.total is not None and self.done >= self.total

    def clock(self, now: float) -> str:
        """The time that the task took, has left, or has taken so far; the word says which."""
        if self.finished:
            return f"{'took' if self.closed else 'finishing,'} {show_time(now - self.started)}"
        rate = self.rate
        if rate is None or self.total is None:
            return f"{show_time(now - self.started)} so far"
        return f"{show_time(max((self.total - self.done) / rate - (now - self.history[-1][0]), 1))} left"


def show_time(seconds: float) -> str:
    """0:07, 1:02:05, 3 d 04 h."""
    whole = int(seconds + 0.5)
    hours, rest = divmod(whole, 3600)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24:02d} h"
    minutes, whole = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{whole:02d}" if hours else f"{minutes}:{whole:02d}"


def show_rate(rate: float, unit: str) -> str:
    """1,234 images/s, 12.3 images/s, or the seconds that each takes."""
    if unit == "bytes":
        return f"{decimal(int(rate))}/s"
    if rate < 0.5:
        return f"{1 / rate:,.1f} s each"
    return f"{rate:,.0f} {unit}/s" if rate >= 100 else f"{rate:.1f} {unit}/s"


def draw_line(state: State, width: int, now: float, *, bar: bool = True, ascii_only: bool = False) -> str:
    """The line, at most `width` columns wide. A note is parts between two spaces, the most important first."""
    if state.total is None:
        parts, optional = [state.name, f"starting, {show_time(now - state.started)} so far"], []
    else:
        parts = [state.name, _count(state), state.clock(now)]
        optional = [visible(part) for part in state.note.split("  ") if part]
        rate = state.rate
        if rate is not None and not any(part.endswith("/s") for part in optional):
            optional.insert(0, show_rate(rate, state.unit))
    while len("  ".join(parts)) > width and len(parts) > 2:
        parts.pop()
    for part in optional:
        if len("  ".join([*parts, part])) > width:
            break
        parts.insert(-1, part)
    room = width - len("  ".join(parts)) - 2
    if bar and state.total and room >= BAR[0]:
        parts.insert(1, _bar(state.done / state.total, min(room, BAR[1]), "#-" if ascii_only else "━─"))
    return "  ".join(parts)[:width]


def _count(state: State) -> str:
    if state.unit == "bytes":
        return f"{decimal(state.done)} of {decimal(state.total or 0)}"
    return f"{state.done:,} of {state.total:,} {state.unit}"


def _bar(share: float, width: int, signs: str) -> str:
    full = int(min(max(share, 0.0), 1.0) * width)
    return signs[0] * full + signs[1] * (width - full)


class Display:
    """Shows a task until it is closed. Nothing at all with --quiet."""

    def __init__(self, name: str, unit: str) -> None:
        self.state = State(name, unit, time.monotonic())
        self._live = sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        self._drawn = False  # whether the line is on the screen
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        if not options.quiet:
            before_message.append(self._erase)
            self._thread.start()

    def update(self, done: int, total: int, note: str = "") -> None:
        with lock:
            self.state.update(done, total, note, time.monotonic())

    def close(self) -> None:
        """Leave the last line on the screen, if there was one."""
        self._closed.set()
        self.state.closed = True
        if self._erase not in before_message:  # --quiet, or closed before
            return
        self._thread.join()
        with lock:
            before_message.remove(self._erase)
            began = self.state.total is not None
            if self._live and self._drawn:
                self._draw() if began else self._erase()
                if began:
                    sys.stderr.write("\n")
                    self._drawn = False
            elif not self._live and self._drawn and began:
                self._print()
            sys.stderr.flush()

    def _run(self) -> None:
        wait = QUIET_S if self._live else FIRST_LINE_S
        while not self._closed.wait(wait):
            with lock:
                if self._live:
                    self._draw()
                    wait = REDRAW_S
                else:
                    self._print()
                    wait = time.monotonic() - self.state.started  # after 5, 10, 20, 40 s ...
                    self._drawn = True

    def _draw(self) -> None:
        width = shutil.get_terminal_size().columns - 1  # a line that fills the screen would wrap
        encoding = (getattr(sys.stderr, "encoding", None) or "ascii").lower()
        line = draw_line(self.state, width, time.monotonic(), ascii_only=not encoding.startswith("utf"))
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()
        self._drawn = True

    def _erase(self) -> None:
        if self._live and self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._drawn = False

    def _print(self) -> None:
        sys.stderr.write(draw_line(self.state, 120, time.monotonic(), bar=False) + "\n")
        sys.stderr.flush()


@contextmanager
def show_progress(name: str, unit: str) -> Iterator[Callable[..., None]]:
    """Show a task on stderr while this `with` lasts. It yields what a library function takes as `on_progress`."""
    with interrupts() as interrupted:
        display = Display(name, unit)

        def update(done: int, total: int, note: str = "") -> None:
            if interrupted():
                raise KeyboardInterrupt
            display.update(done, total, note)

        try:
            yield update
        finally:
            display.close()


@contextmanager
def show_training() -> Iterator[Callable[..., None]]:
    """Like `show_progress`, for the training of SAEs. It yields what takes the metrics of a step beside its number."""
    with show_progress("train", "steps") as on_progress:

        def show(step: int, total: int, metrics: Mapping[str, Any]) -> None:
            note = "fvu {fvu:.3f}  {tokens_per_s:,.0f} tokens/s  dead {dead:.1%}  l0 {l0:.1f}".format(**metrics)
            on_progress(step, total, note)

        yield show


@contextmanager
def show_upload() -> Iterator[Callable[..., None]]:
    """Like `show_progress` in bytes, from the first call on: before it, the user may be asked something."""
    with ExitStack() as stack:
        shown: list[Callable[..., None]] = []

        def update(done: int, total: int) -> None:
            if not shown:
                shown.append(stack.enter_context(show_progress("upload", "bytes")))
            shown[0](done, total)

        yield update


@contextmanager
def show_download(name: str) -> Iterator[Callable[..., None]]:
    """Yield what takes the bytes of a download as `on_progress`. Nothing is shown unless there is one.

    Its first call, with 0, says how much is downloaded, because that may be much.
    """
    display: Display | None = None
    with interrupts() as interrupted:

        def update(done: int, total: int) -> None:
            nonlocal display
            if interrupted():
                raise KeyboardInterrupt
            if done == 0:
                show_note(f"Downloading {decimal(total)} of {name}.")
                display = Display("download", "bytes")
            if display is not None:
                display.update(done, total)
                if done >= total:
                    display.close()
                    display = None

        try:
            yield update
        finally:
            if display is not None:
                display.close()


@contextmanager
def show_steps(unit: str = "images") -> Iterator[Callable[..., None]]:
    """Show several tasks one after the other, as `on_step(name, done, total, note)` names them.

    Args:
        unit: what is counted in tasks that UNITS does not name.
    """
    with interrupts() as interrupted:
        display = Display("starting", "steps")

        def show(step: str, done: int, total: int, note: str = "") -> None:
            nonlocal display
            if interrupted():
                raise KeyboardInterrupt
            if step != display.state.name:
                display.close()
                display = Display(step, UNITS.get(step, unit))
            display.update(done, total, note)

        try:
            yield show
        finally:
            display.close()


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether SIGINT has come.

    Its exception is lost when it is raised in a destructor or in a callback of C code.
    """
    seen = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        seen = True
        interrupt(number, frame)

    before = signal.signal(signal.SIGINT, note) if threading.current_thread() is threading.main_thread() else None
    try:
        yield lambda: seen
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
