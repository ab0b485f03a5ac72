"""Progress: the types of callbacks, what is known of a task that runs, and the line that says it.

A callback is called with what is done and what there is to do in all. The line always holds both and the time left;
what does not fit beside them is left out as a whole, so no number is ever cut.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from actcache.text import visible

Progress = Callable[[int, int], None]
"""Called with (done, total), in units that the function that takes it names: images, bytes, tasks."""

ProgressWithNote = Callable[[int, int, str], None]
"""Called with (done, total, note); the note is a short text such as `loss 1.234` or `measuring`."""

WINDOW_S = 30.0
"""The rate is that of the last half minute."""
BAR = (6, 24)
"""The fewest and the most columns of the bar."""
_PREFIXES = "kMGTP"


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


def show_bytes(n_bytes: float) -> str:
    """812 bytes, 1.2 MB, in powers of 1,000."""
    if n_bytes < 1000:
        return f"{int(n_bytes)} byte{'' if int(n_bytes) == 1 else 's'}"
    power = min(int(math.log10(n_bytes)) // 3, len(_PREFIXES))
    return f"{n_bytes / 1000**power:.1f} {_PREFIXES[power - 1]}B"


def show_rate(rate: float, unit: str) -> str:
    """1,234 images/s, 12.3 images/s, or the seconds that each takes."""
    if unit == "bytes":
        return f"{show_bytes(rate)}/s"
    if rate < 0.5:
        return f"{1 / rate:,.1f} s each"
    counted = f" {unit}/s" if unit else "/s"
    return f"{rate:,.0f}{counted}" if rate >= 100 else f"{rate:.1f}{counted}"


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
    return "  ".join(parts if state.name else parts[1:])[:width]


def _count(state: State) -> str:
    if state.unit == "bytes":
        return f"{show_bytes(state.done)} of {show_bytes(state.total or 0)}"
    return f"{state.done:,} of {state.total:,} {state.unit}".rstrip()


def _bar(share: float, width: int, signs: str) -> str:
    full = int(min(max(share, 0.0), 1.0) * width)
    return signs[0] * full + signs[1] * (width - full)


class TaskCount:
    """Shows the tasks of several steps as one count."""

    def __init__(self, on_progress: Progress | None) -> None:
        self.on_progress, self.total = on_progress, 0

    def add(self, n_tasks: int) -> Progress:
        """A callback that counts the next `n_tasks`."""
        before = self.total
        self.total += n_tasks
        return lambda done, total: self.on_progress(before + done, self.total) if self.on_progress else None
