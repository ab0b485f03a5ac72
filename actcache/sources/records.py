"""JSON objects of somebody else become columns: those of a tar's samples, or the lines of a file.

In: the bytes of one object after the other. Out: columns of plain values. Objects may have any keys, so at most
`MAX_COLUMNS` of them become columns, the most frequent ones; a note says how many were left out.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from actcache.sources.arrow_types import list_names

MAX_COLUMNS = 256
"""1,500 samples with 250 keys of their own each would be 375,000 columns of 1,500 rows: 5 GB."""

MAX_KEYS = 16 * MAX_COLUMNS
"""When so many keys have been met, all but the most frequent ones are forgotten."""


def parse_object(data: bytes, what: str = "it") -> dict[str, object]:
    """Parse a JSON object; lists and objects in it become JSON text.

    Raises:
        ValueError: it is not a JSON object, too deep, or holds what a table cannot hold. The message is one line.
    """
    try:
        text = data.decode(json.detect_encoding(data))
        values = json.loads(text)
        if not isinstance(values, dict):
            values = None
        else:
            values |= {key: json.dumps(value) for key, value in values.items() if isinstance(value, dict | list)}
    except RecursionError as error:
        raise ValueError(f"{what} is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8") from error
    except ValueError as error:
        if "int_max_str_digits" in str(error):
            raise ValueError(f"{what} holds a number of more than 4,300 digits") from error
        raise ValueError(f"{what} is not JSON ({error})") from error
    if values is None:
        raise ValueError(f"{what} is not an object")
    fields: dict[str, object] = values
    if "\\u" in text:  # only an escape can make half of a character
        for item in fields.items():
            for part in item:
                if isinstance(part, str) and not part.isascii():
                    check_whole(part, what)
    return fields


def check_whole(text: str, what: str) -> None:
    """Raise ValueError for a lone surrogate, which UTF-8 does not have."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds half of a character ({text[error.start]!r})") from error


class Records:
    """Collects the fields of rows, each under its row number, so that a rare key costs no more than its values."""

    def __init__(self) -> None:
        self._columns: dict[str, tuple[list[int], list[Any]]] = {}
        self._forgotten: set[str] = set()

    def add(self, row: int, fields: Mapping[str, Any]) -> None:
        for name, value in fields.items():
            if name in self._forgotten:
                continue
            rows, values = self._columns.setdefault(name, ([], []))
            rows.append(row)
            values.append(value)
        if len(self._columns) > MAX_KEYS:
            kept = _most_frequent({name: len(rows) for name, (rows, _) in self._columns.items()})
            self._forgotten |= self._columns.keys() - kept
            self._columns = {name: column for name, column in self._columns.items() if name in kept}

    @staticmethod
    def join(parts: Iterable[tuple["Records", int]], source: str) -> tuple[dict[str, pa.Array], tuple[str, ...]]:
        """Columns of all rows of (records, number of rows), and a note on keys that are no columns."""
        parts = list(parts)
        total = sum(n for _, n in parts)
        counts: Counter[str] = Counter()
        for records, _ in parts:
            counts.update({name: len(rows) for name, (rows, _) in records._columns.items()})
        forgotten = set().union(*(records._forgotten for records, _ in parts))
        kept = _most_frequent({name: n for name, n in counts.items() if name not in forgotten})
        columns = {}
        for name in counts:
            if name not in kept:
                continue
            whole: list[Any] = [None] * total
            start = 0
            for records, n in parts:
                for row, value in zip(*records._columns.get(name, ((), ())), strict=True):
                    whole[start + row] = value
                start += n
            columns[name] = make_column(whole)
        left_out = sorted((counts.keys() | forgotten) - kept)
        if not left_out:
            return columns, ()
        return columns, (
            f"{source} has {len(kept) + len(left_out):,} different keys in its JSON. The {len(kept)} most frequent are "
            f"columns; {len(left_out):,} are left out: {list_names(left_out, 3)}.",
        )


def _most_frequent(counts: Mapping[str, int]) -> set[str]:
    """The most frequent names; of equally frequent ones those that came first. What gives the label always stays."""
    always = [name for name in ("label", "label_name", "text") if name in counts]
    ordered = sorted(counts, key=lambda name: -counts[name])
    return set(always) | set(ordered[:MAX_COLUMNS])


def make_column(values: list[Any]) -> pa.Array:
    """Python values in the type that arrow infers; as text if they have different types."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # different types, or an integer beyond 64 bits
        texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
        return pa.array(texts, pa.string())
