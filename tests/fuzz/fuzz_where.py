"""`--where` over a table of images: random expressions, some sensible, some not."""

import random
from pathlib import Path

import pyarrow as pa

from actcache.store import select_images

COLUMNS = ["label", "uri", "width", "5_o_Clock_Shadow", "Finding Labels", "class", "taken", "nothing"]
WORDS = [
    *COLUMNS, *(f"`{name}`" for name in COLUMNS), "and", "or", "not", "in", "==", "!=", "<", ">=", "(", ")", "[", "]",
    "1", "-1", "1e999", "0x1", "'cat'", '"dog"', "True", "None", "nan", "+", "*", "**", ",", ":", "lambda", "`", "\\",
    "'2024-01-01'", "label == 1", "width > 30", "class in ['a', 'b']", "\0", "\ud800", "é", "#", "is", "if", "f''",
]  # fmt: skip


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
        }
    )


def attempt(rng: random.Random, folder: Path, table: pa.Table) -> None:
    n_words = rng.choice([1, 3, 3, 5, 9, 30, 3000])
    text = rng.choice([" ", "", " or "]).join(rng.choice(WORDS) for _ in range(n_words))
    if rng.random() < 0.1:
        text = rng.choice(["(", "not ", "[", "-"]) * rng.randrange(5000) + text
    select_images(table, text)
