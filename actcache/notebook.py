"""What a notebook shows of us: a bar while a verb works, and the facts of an artifact as a small table.

In: calls of `on_progress`, or facts. Out: HTML without scripts and styles of its own, so it takes the colors of the
page, light or dark, and stays readable where a page removes styles. Names are escaped.
"""

import html
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from actcache.progress import State, draw_line
from actcache.text import visible

QUIET_S = 0.5
"""What ends within this time shows no bar."""
REDRAW_S = 0.25


def progress_bar(name: str = "", unit: str = "") -> Callable[..., None]:
    """A bar for the `on_progress` of any function here. Make a new one for each call.

        extract("photos", "val.acts", layers=[10], on_progress=progress_bar("extract", "images"))

    In a notebook it stands below the cell, and on a terminal it is one line of stderr that is rewritten. Where there is
    neither, as in the log of a batch job, nothing is shown.

    Args:
        name, unit: what the bar says beside its numbers.
    """
    state, show = State(name, unit, time.monotonic()), _find_screen()
    drawn = 0.0

    def update(done: int, total: int, note: str | Mapping[str, Any] = "") -> None:
        nonlocal drawn
        now = time.monotonic()
        state.update(done, total, note if isinstance(note, str) else f"fvu {note['fvu']:.3f}", now)
        ended = state.finished and drawn  # the last call is shown whenever an earlier one was
        if show and (ended or (now - state.started > QUIET_S and now - drawn > REDRAW_S and not state.finished)):
            drawn = now
            show(replace(state, closed=True) if ended else state)

    return update


def draw_facts(title: str, facts: Mapping[str, object], rows: Sequence[Mapping[str, object]] = ()) -> str:
    """An HTML table of facts below a title, and a second table of rows below it if there are any. All are escaped."""
    left = 'style="text-align: left"'
    lines = [f"<tr><th {left}>{_cell(name)}</th><td {left}>{_cell(value)}</td></tr>" for name, value in facts.items()]
    table = f"<table>{''.join(lines)}</table>"
    if rows:
        head = "".join(f"<th>{_cell(name)}</th>" for name in rows[0])
        body = "".join(f"<tr>{''.join(f'<td>{_cell(value)}</td>' for value in row.values())}</tr>" for row in rows)
        table += f"<table><tr>{head}</tr>{body}</table>"
    return f"<b>{_cell(title)}</b>{table}"


def _cell(value: object) -> str:
    text = f"{value:,}" if type(value) is int else f"{value:.3g}" if isinstance(value, float) else str(value)
    return html.escape(visible(text))


class _Bar:
    """A state as IPython displays it: HTML in a page, text elsewhere."""

    def __init__(self, state: State) -> None:
        self.state, self.now = state, time.monotonic()

    def __repr__(self) -> str:
        return draw_line(self.state, 100, self.now)

    def _repr_html_(self) -> str:
        state = self.state
        line = html.escape(draw_line(state, 100, self.now, bar=False))
        bar = "" if state.closed else f'<progress value="{state.done}" max="{max(state.total or 1, 1)}"></progress> '
        return f"<small>{bar}{line}</small>"


def _find_screen() -> Callable[[State], None] | None:
    """What shows a state; None where nothing is to be shown."""
    if _is_notebook():
        return _Cell().show
    return _show_line if sys.stderr is not None and sys.stderr.isatty() else None


def _is_notebook() -> bool:
    """Whether the code runs in a kernel. A notebook has imported IPython before."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


class _Cell:
    """The place below a cell, which is written over."""

    def __init__(self) -> None:
        self.handle: Any = None

    def show(self, state: State) -> None:
        from IPython.display import display

        if self.handle is None:
            self.handle = display(_Bar(replace(state)), display_id=True)
        else:
            self.handle.update(_Bar(replace(state)))


def _show_line(state: State) -> None:
    encoding = (getattr(sys.stderr, "encoding", None) or "ascii").lower()
    width = shutil.get_terminal_size().columns - 1  # a line that fills the screen would wrap
    line = draw_line(state, width, time.monotonic(), ascii_only=not encoding.startswith("utf"))
    sys.stderr.write(f"\r\x1b[K{line}" + "\n" * state.closed)
    sys.stderr.flush()
