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
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

from actcache.interrupts import interrupt
from actcache.progress import State, draw_line, show_bytes
from analysis.terminal.screen import before_message, lock, options, show_note

REDRAW_S = 0.5
QUIET_S = 1.0
"""What ends within this time shows no line."""
FIRST_LINE_S = 5.0
"""Without a terminal, the first line comes after this time, and each later one after twice the time."""
UNITS = {"train": "steps", "adapt": "steps", "analyze": "tasks", "compare with the truth": "steps"}
"""What `show_steps` counts in a step; images in all others."""


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
                show_note(f"Downloading {show_bytes(total)} of {name}.")
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
