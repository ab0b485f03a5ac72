"""Ctrl-C while modules are being imported. Imports only what Python has loaded already, so that it loads at once.

A KeyboardInterrupt inside an import is lost, or comes out as another error: Python wraps it (RuntimeError: Error
calling __set_name__), a lazy module recurses, a module stays half made. So the program ends there and then, quietly.
Nothing is lost: an artifact is as whole as after a kill, and the same command resumes.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SHOW_CURSOR = "\x1b[?25h"
"""What a progress bar leaves hidden."""


def leave(number: int = signal.SIGINT, frame: FrameType | None = None) -> None:
    """End the program as interrupted, at once and quietly."""
    with suppress(Exception):  # the signal may have come while the same stream was being written
        sys.stdout.flush()
        if sys.stderr.isatty():
            sys.stderr.write(SHOW_CURSOR)
            sys.stderr.flush()
    os._exit(130)


def interrupt(number: int, frame: FrameType | None) -> None:
    """End the program if a module is being imported, and raise KeyboardInterrupt otherwise."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            leave()
        frame = frame.f_back
    raise KeyboardInterrupt


@contextmanager
def on_interrupt(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Let a function answer SIGINT inside this `with`. Only the main thread can; elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
