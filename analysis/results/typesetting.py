"""Tables as text to paste into a paper: Markdown, and LaTeX with booktabs. In: rows of strings and numbers."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from analysis.results.result import Row

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "±": r"$\pm$",
    "\u2212": "$-$", "\u00d7": r"$\times$", "Σ": r"$\Sigma$", "δ": r"$\delta$", "Δ": r"$\Delta$", "β": r"$\beta$",
    "≥": r"$\geq$", "≤": r"$\leq$", "²": r"\textsuperscript{2}",
}  # fmt: skip
"""What LaTeX reads as something else, or does not have in its text fonts."""
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~])")
_MINUS = re.compile(r"(?<![\w.])-(?=\d)")


class TextTable(NamedTuple):
    """A table with a title.

    Attributes:
        name: one word, for references.
        rows: all with the same columns.
        bold: (first cell of a row, name of a column) of the cells that stand out.
    """

    name: str
    title: str
    rows: Sequence[Row]
    bold: frozenset[tuple[str, str]] = frozenset()


def to_markdown(tables: Sequence[TextTable]) -> str:
    """Each table below its title."""
    parts = []
    for table in tables:
        head = list(table.rows[0])
        lines = [[escape_markdown(name) for name in head], ["---", *["---:"] * (len(head) - 1)]]
        for row in table.rows:
            cells = {name: escape_markdown(_text(row.get(name))) for name in head}
            lines.append(
                [f"**{cell}**" if (row[head[0]], name) in table.bold else cell for name, cell in cells.items()]
            )
        parts.append(f"**{escape_markdown(table.title)}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def to_latex(tables: Sequence[TextTable]) -> str:
    """Each table as a `table` with a caption and the label tab:NAME."""
    parts = [r"% Needs \usepackage{booktabs}."]
    for table in tables:
        head = list(table.rows[0])
        lines = [[escape_latex(name) for name in head]]
        for row in table.rows:
            cells = {name: escape_latex(_text(row.get(name))) for name in head}
            lines.append(
                [rf"\textbf{{{cell}}}" if (row[head[0]], name) in table.bold else cell for name, cell in cells.items()]
            )
        first, *body = [" & ".join(line) + r" \\" for line in lines]
        parts.append("\n".join([
            r"\begin{table}", r"\centering",
            rf"\caption{{{escape_latex(table.title)}}}", rf"\label{{tab:{table.name}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule", first, r"\midrule", *body, r"\bottomrule",
            r"\end{tabular}", r"\end{table}",
        ]))  # fmt: skip
    return "\n\n".join(parts) + "\n"


def escape_markdown(text: str) -> str:
    """Text as a cell of a Markdown table shows it."""
    return " ".join(_MARKDOWN.sub(r"\\\1", text).split())


def escape_latex(text: str) -> str:
    """Text as LaTeX prints it, with a minus before negative numbers rather than a hyphen."""
    return "".join(_LATEX.get(letter, letter) for letter in _MINUS.sub("\u2212", " ".join(text.split())))


def _text(cell: str | float | None) -> str:
    return "" if cell is None else cell if isinstance(cell, str) else f"{cell:,}"
