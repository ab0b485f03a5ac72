"""What is printed: any text, any facts and any table come out as lines that fit, and as strict JSON."""

import json
import math
import random
from pathlib import Path
from typing import Any

from rich.text import Text

from actcache.text import to_json, visible
from analysis.terminal.checks import find_unquoted
from analysis.terminal.tables import draw_facts, draw_table

SIGNS = ["\x1b[2J", "\x1b]0;x\x07", "\u202e", "\u200b", "[red]", ":smile:", "\n", "\r", "\t", "\x9b", "\udcff", "猫",
    "é",
         "😀", "👨\u200d👩", "\u3164", "a", " ", "1,234", "…", "\x00", "\U000e0041", "\ufeff", "{}", "%s"]  # fmt: skip


def prepare(folder: Path) -> None:
    return None


def attempt(rng: random.Random, folder: Path, state: None) -> None:
    def text() -> str:
        return "".join(rng.choice(SIGNS) for _ in range(rng.randint(0, 12)))

    def value() -> Any:
        numbers = [
            rng.random() * 10 ** rng.randint(-9, 9),
            rng.randint(-(10**9), 10**9),
            math.nan,
            math.inf,
            None,
            True,
        ]
        return rng.choice([*numbers, text(), text()])

    names = [text() for _ in range(rng.randint(1, 9))]
    rows = [{name: value() for name in names} for _ in range(rng.randint(0, 5))]
    width = rng.randint(60, 200)
    for line in [*draw_table(rows, width), *draw_facts({name: value() for name in names}, width)]:
        plain = line.plain if isinstance(line, Text) else line
        assert visible(plain) == plain, repr(plain)
    for line in draw_table(rows, width):
        assert Text(str(line)).cell_len <= width, repr(line)
    facts = {"rows": rows, text(): [value(), {text(): value()}]}
    line = to_json(facts)
    assert "\n" not in line
    json.loads(line, parse_constant=_refuse)
    find_unquoted([rng.choice(["--where", "--group=", "label", "==", "in", text()]) for _ in range(rng.randint(0, 6))])


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")
