"""Tables and lists of facts, laid out for the width of the screen. Numbers are never cut: only texts are shortened.

In: rows, or facts. Out: lines. A table that is too wide even with short texts is continued below itself, and the first
column is repeated. Where the output is no terminal, nothing is shortened, so that a pipe receives the whole text.
"""

import math
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from actcache.text import visible

GAP = 2
MIN_TEXT = 12
"""Columns of the screen that a shortened text keeps."""
MAX_HEAD = 24
"""Columns of the screen that the head of a column of numbers may take where there is too little room."""
WIDE = 10_000
"""The width of what is not a terminal."""


def screen_width() -> int:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDE


def draw_table(rows: Sequence[Mapping[str, Any]], width: int | None = None) -> list[str | Text]:
    """The lines of a table, with a bold head. Columns: those of the first row."""
    if not rows:
        return ["nothing found"]
    width = width or screen_width()
    names = [visible(name) for name in rows[0]]
    cells = [[show_value(row.get(name)) for name in rows[0]] for row in rows]
    is_text = [any(isinstance(row.get(name), str) for row in rows) for name in rows[0]]
    full = [max(cell_len(text) for text in column) for column in zip(names, *cells, strict=True)]
    numbers = [max(cell_len(text) for text in column) for column in zip(*cells, strict=True)]
    floors = [
        MIN_TEXT if text else max(number, min(cell_len(name), MAX_HEAD))
        for text, number, name in zip(is_text, numbers, names, strict=True)
    ]
    widths = _shrink(full, floors, width)
    lines: list[str | Text] = []
    for block in _blocks(widths, width):
        head = _join([(names[i], widths[i], is_text[i]) for i in block])
        lines += [*([""] if lines else []), Text(head, style="bold")]
        lines += [_join([(row[i], widths[i], is_text[i]) for i in block]) for row in cells]
    return lines


def _shrink(full: Sequence[int], floors: Sequence[int], width: int) -> list[int]:
    """Take what is too much from the widest columns, down to their floors."""
    widths = list(full)
    while sum(widths) + GAP * (len(widths) - 1) > width:
        longer = [i for i, floor in enumerate(floors) if widths[i] > floor]
        if not longer:
            break
        widths[max(longer, key=lambda i: widths[i])] -= 1
    return widths


def _blocks(widths: Sequence[int], width: int) -> list[list[int]]:
    """Columns that stand side by side; each further block begins with the first column again."""
    blocks, used = [[0]], widths[0]
    for i in range(1, len(widths)):
        if used + GAP + widths[i] > width and len(blocks[-1]) > (len(blocks) > 1):
            blocks.append([0])
            used = widths[0]
        blocks[-1].append(i)
        used += GAP + widths[i]
    return blocks


def _join(cells: Sequence[tuple[str, int, bool]]) -> str:
    parts = []
    for text, width, is_text in cells:
        if cell_len(text) > width:
            text = set_cell_size(text, width - 1) + "…"
        padding = " " * (width - cell_len(text))
        parts.append(text + padding if is_text else padding + text)
    return (" " * GAP).join(parts).rstrip()


def show_value(value: Any) -> str:
    """A number with four digits, a count with commas, nothing for a value that does not exist."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return visible(value)


def draw_facts(facts: Mapping[str, Any], width: int | None = None) -> list[str | Text]:
    """A line for each fact, folded between words."""
    width = min(width or screen_width(), 100)
    names = [visible(name).replace("_", " ") for name in facts]
    margin = max(map(len, names), default=0) + GAP
    lines: list[str | Text] = []
    for name, value in zip(names, facts.values(), strict=True):
        folded = textwrap.wrap(_say(value), max(width - margin, 20), break_on_hyphens=False, break_long_words=False)
        lines.append(Text.assemble((name.ljust(margin), "bold"), folded[0] if folded else ""))
        lines += [" " * margin + line for line in folded[1:]]
    return lines


def _say(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{visible(key)} {_say(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_say, value)) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else show_value(value)
