"""Around a question: text into what the functions take, a table into a file."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from actcache import SettingsError
from actcache.artifacts import write_atomic
from analysis.query.images import At


def parse_at(text: str) -> At:
    """`3,4` or `0:3,2:5` as `query_image` takes it; a range ends before its second number. Raises SettingsError."""
    try:
        row, column = (_parse_axis(part) for part in text.split(","))
    except ValueError as error:
        raise SettingsError(f"--at must be ROW,COLUMN or ROW:ROW,COLUMN:COLUMN, got {text!r}.") from error
    return row, column


def _parse_axis(text: str) -> int | slice:
    start, colon, stop = text.partition(":")
    if not colon:
        return int(text)
    return slice(int(start) if start.strip() else None, int(stop) if stop.strip() else None)


def parse_latents(text: str | None, flag: str) -> list[int]:
    """`12,57` as numbers. Raises SettingsError."""
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise SettingsError(f"{flag} must be latents such as 12,57, got {text!r}.") from error


def write_answer(table: pa.Table, out: str | Path) -> Path:
    """Write a table as .csv or .parquet and return its path. An existing file is replaced.

    Raises SettingsError for another suffix.
    """
    out = Path(out)
    sink = io.BytesIO()
    if out.suffix.lower() == ".csv":
        pyarrow.csv.write_csv(table, sink)
    elif out.suffix.lower() == ".parquet":
        pq.write_table(table, sink)
    else:
        raise SettingsError(f"--out must end in .csv or .parquet, got {out.name!r}.")
    write_atomic(out, sink.getvalue(), parents=True)
    return out
