"""Text of others inside Markdown and YAML: a name or a note shows as what it is, and never as a heading or a tag."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence

from actcache.text import visible

_SIGNS = re.compile(r"([\\`*_{}\[\]()#.!|~:@$])")
"""With `.`, `:` and `@`, of which a renderer makes links."""
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
MAX_CHARACTERS = 200


def escape(text: object) -> str:
    """A text on one line in which no sign of Markdown, HTML or a table has a meaning, cut to 200 characters."""
    shown = visible(text)
    shown = shown if len(shown) <= MAX_CHARACTERS else shown[: MAX_CHARACTERS - 1] + "…"
    for sign, entity in _ENTITIES.items():
        shown = shown.replace(sign, entity)
    return _SIGNS.sub(r"\\\1", shown)


def code(text: object) -> str:
    """A technical name in typewriter letters; escaped instead where it could end them."""
    shown = visible(text)
    return f"`{shown}`" if shown and not set(shown) & set("`|\\<>&") and len(shown) <= MAX_CHARACTERS else escape(text)


def draw_rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table. Its cells are Markdown already."""
    return [_line(head), _line(["---"] * len(head)), *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_front_matter(fields: Mapping[str, str | Sequence[str] | None]) -> list[str]:
    """The lines of a YAML block: texts and lists of texts in JSON's quotes, which YAML takes; None is left out."""
    lines = ["---"]
    for name, value in fields.items():
        if isinstance(value, str):
            lines.append(f"{name}: {_quote(value)}")
        elif value:
            lines += [f"{name}:", *(f"- {_quote(entry)}" for entry in value)]
    return [*lines, "---"]


def _quote(text: str) -> str:
    return json.dumps(visible(text), ensure_ascii=True)
