"""`--where` over a table of images: random words, and sensible expressions whose rows plain Python finds as well."""

import operator
import random
from pathlib import Path
from typing import Any

import pyarrow as pa

from actcache.store import select_images

COLUMNS = ["label", "uri", "width", "5_o_Clock_Shadow", "Finding Labels", "class", "taken", "price", "boxes", "nothing"]
WORDS = [
    *COLUMNS, *(f"`{name}`" for name in COLUMNS), "and", "or", "not", "in", "==", "!=", "<", ">=", "(", ")", "[", "]",
    "1", "-1", "1e999", "0x1", "'cat'", '"dog"', "True", "None", "nan", "+", "*", "**", ",", ":", "lambda", "`", "\\",
    "'2024-01-01'", "label == 1", "width > 30", "class in ['a', 'b']", "\0", "\ud800", "é", "#", "is", "if", "f''",
    "'''", '"""', "``", "`a``b`", "in (" + "1, " * 1200 + "2)", "1.", "1and", "'\\ud800'", "9" * 40, "is None", "~",
    "@",
]  # fmt: skip
SIGNS = {"==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
CONSTANTS: dict[str, list[Any]] = {
    "label": [0, 1, -1, 0.5, 2**40], "width": [1, 32.0, -0.5, 1e308], "uri": ["a.png", "`", "it's", 'a"b', ""],
    "Finding Labels": ["x|y", "", "in (1, 2)"], "class": ["a", "b"],
}  # fmt: skip


def prepare(folder: Path) -> pa.Table:
    return pa.table(
        {
            "label": [0, 1, 0, None],
            "uri": ["a.png", "b.png", None, "d.png"],
            "width": [1.0, float("nan"), 32.0, 64.0],
            "5_o_Clock_Shadow": [True, False, True, None],
            "Finding Labels": ["x|y", "x", "", None],
            "class": ["a", "b", "a", "b"],
            "taken": pa.array([0, 1, 2, None], pa.timestamp("s")),
            "price": pa.array([1, 2, None, 3]).cast(pa.decimal128(30, 2)),
            "boxes": [[1], [], None, [2, 3]],
        }
    )


def attempt(rng: random.Random, folder: Path, table: pa.Table) -> None:
    if rng.random() < 0.4:
        text, expected = make_expression(rng, table.to_pydict(), rng.choice([0, 1, 2, 4, 6]))
        rows = select_images(table, text).tolist()
        assert rows == [value is True for value in expected], text
        return
    n_words = rng.choice([1, 3, 3, 5, 9, 30, 3000])
    text = rng.choice([" ", "", " or "]).join(rng.choice(WORDS) for _ in range(n_words))
    if rng.random() < 0.1:
        text = rng.choice(["(", "not ", "[", "-"]) * rng.randrange(5000) + text
    select_images(table, text)


def make_expression(rng: random.Random, columns: dict[str, list[Any]], depth: int) -> tuple[str, list[bool | None]]:
    """An expression, and what it is for each row: true, false, or None for a comparison with a missing value."""
    if depth == 0:
        return make_comparison(rng, columns)
    word = rng.choice(["and", "or", "not"])
    first, a = make_expression(rng, columns, depth - 1)
    if word == "not":
        return f"not ({first})", [None if value is None else not value for value in a]
    second, b = make_expression(rng, columns, rng.randrange(depth))
    decisive = word == "or"  # the value that decides a joint expression whatever the other side is
    joint = [
        decisive if decisive in pair else None if None in pair else not decisive for pair in zip(a, b, strict=True)
    ]
    return f"({first}) {word} ({second})", joint


def make_comparison(rng: random.Random, columns: dict[str, list[Any]]) -> tuple[str, list[bool | None]]:
    name = rng.choice([*CONSTANTS, "5_o_Clock_Shadow"])
    quoted = f"`{name}`" if rng.random() < 0.5 or not name.isidentifier() or name == "class" else name
    values = columns[name]
    kind = rng.choice(["sign", "mirrored", "in", "not in", "is", "is not"])
    if kind in ("is", "is not"):
        return f"{quoted} {kind} None", [(value is None) == (kind == "is") for value in values]
    if name not in CONSTANTS:
        return quoted, list(values)
    if kind in ("in", "not in"):
        wanted = rng.choices(CONSTANTS[name], k=rng.choice([0, 1, 3, 1500]))
        found = [None if value is None else (value in wanted) == (kind == "in") for value in values]
        return f"{quoted} {kind} {wanted!r}", found
    sign, constant = rng.choice(sorted(SIGNS)), rng.choice(CONSTANTS[name])
    sides = (quoted, repr(constant)) if kind == "sign" else (repr(constant), quoted)
    order = (lambda a, b: (a, b)) if kind == "sign" else (lambda a, b: (b, a))
    found = [None if value is None else SIGNS[sign](*order(value, constant)) for value in values]
    return f"{sides[0]} {sign} {sides[1]}", found
