"""Reading the files of tables: CSV and TSV with any separator and encoding, JSON lines, Parquet.

In: a file that anybody may have written. Out: columns of plain Arrow types. Cells of a text file are first read as they
are written; a column becomes numbers only if each of its cells can be written back, so that 001 stays 001.
"""

import codecs
import csv
import io
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from actcache.errors import ImageSourceError
from actcache.sources.arrow_types import plain_table
from actcache.sources.columns import LABEL_COLUMNS, PATH_COLUMNS, normalize
from actcache.sources.files import open_regular, read_file
from actcache.sources.records import Records, parse_object

LINE_SUFFIXES = (".jsonl", ".ndjson")
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", *LINE_SUFFIXES)

SEPARATORS = ",;\t|"
SAMPLE_BYTES, SAMPLE_LINES = 1 << 16, 20
"""How much of a file decides on its separator."""

BLOCK_BYTES = 1 << 24
"""A line may not be longer than this."""

MISSING = ("", "NA", "N/A", "#N/A", "<NA>", "NaN", "nan", "-nan", "null", "NULL", "None")
"""What stands for a missing value among numbers. In a column of text it is text."""

READER_ERRORS = (pa.ArrowException, OSError, ValueError, LookupError, OverflowError, MemoryError, NotImplementedError)
"""What pyarrow raises for a damaged file."""


class RawTable(NamedTuple):
    """Attributes:
    table: the columns; those of a CSV file are text as it is written, see `number_texts`.
    is_text: whether this is so.
    notes: what the user should know about how the file was read.
    """

    table: pa.Table
    is_text: bool
    notes: tuple[str, ...] = ()


def read_table(path: Path) -> pa.Table:
    """Read a table, its numbers as numbers. Raises ImageSourceError with the reader's reason in one line."""
    raw = read_raw_table(path)
    return number_texts(raw.table) if raw.is_text else raw.table


def read_raw_table(path: Path) -> RawTable:
    """Read a table, its texts as they are written. Raises ImageSourceError with the reader's reason in one line."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            return _read_parquet(path)
        data = read_file(path, path.name)
        if suffix in LINE_SUFFIXES:
            return _read_lines(path.name, data)
        return _read_text(path.name, data, "\t" if suffix == ".tsv" else ",")
    except READER_ERRORS as error:
        raise not_a_table(path, error) from error


def not_a_table(path: Path, error: Exception) -> ImageSourceError:
    """The error for a file that a reader refuses."""
    if isinstance(error, ImageSourceError):
        return error
    if isinstance(error, OSError) and error.strerror:
        return ImageSourceError(f"{path} cannot be read: {error.strerror}. Check the path.")
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")[:200]
    return ImageSourceError(f"{path.name} is not a table: {reason}. Expected rows of image paths.")


def check_regular(path: Path) -> None:
    """Raise OSError for what is missing, or is a pipe or a device."""
    os.close(open_regular(path))


# -- Parquet and JSON --------------------------------------------------------------------------------------------------


def _read_parquet(path: Path) -> RawTable:
    check_regular(path)
    if not path.stat().st_size:
        raise ValueError("it is empty")
    table = pq.ParquetFile(path).read()
    table, notes = plain_table(table, path.name)
    table.validate(full=True)  # texts that are not UTF-8
    kept = [name for name in table.column_names if not (_is_index_name(name) and pa.types.is_integer(table[name].type))]
    return RawTable(table.select(kept) if len(kept) < table.num_columns else table, False, notes)


def _read_lines(source: str, data: bytes) -> RawTable:
    """One JSON object per line."""
    records, n = Records(), 0
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        if line.strip():
            records.add(n, parse_object(line, f"its line {number:,}"))
            n += 1
    if not n:
        raise ValueError("it is empty")
    columns, notes = Records.join([(records, n)], source)
    return RawTable(pa.table(columns), False, notes)


def _is_index_name(name: str) -> bool:
    """Whether pandas calls a column so that has no name of its own."""
    return re.fullmatch(r"Unnamed: \d+(_level_\d+)?|__index_level_\d+__", name) is not None


# -- CSV ---------------------------------------------------------------------------------------------------------------


def _read_text(source: str, data: bytes, usual: str) -> RawTable:
    data, notes = _to_utf8(data, source)
    if not data.strip():
        raise ValueError("it is empty")
    if told := re.match(rb"sep=([,;|\t])\r?\n", data):  # a line with which Excel tells itself the separator
        data, usual = data[told.end() :], told[1].decode()
    separator, header = _sniff(data, usual)
    names = [f"{i}" for i in range(len(header))]  # names may occur twice, and pyarrow has types by name
    table = pyarrow.csv.read_csv(
        pa.BufferReader(data),
        read_options=pyarrow.csv.ReadOptions(column_names=names, skip_rows_after_names=1, block_size=BLOCK_BYTES),
        parse_options=pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
    )
    columns, kept = [], []
    for name, column in zip(header, table.columns, strict=True):
        cells = pc.utf8_ltrim_whitespace(column) if name[:1] == " " else column  # written with a space after each comma
        name = name.strip()
        if (not name or _is_index_name(name)) and pc.all(
            pc.match_substring_regex(cells, r"^\d*$")
        ).as_py() is not False:
            continue  # the row numbers that pandas and R write, or a separator at the end of each line
        columns.append(cells)
        kept.append(name)
    return RawTable(pa.table(columns, names=kept), True, notes)


def _to_utf8(data: bytes, source: str) -> tuple[bytes, tuple[str, ...]]:
    """The text in UTF-8 without a byte order mark, and a note if the encoding is a guess."""
    encoding = None
    for mark, name in ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
                       (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")):  # fmt: skip
        if data.startswith(mark):
            encoding = name
            break
    sample = data[:4096]
    if encoding is None and b"\0" in sample:  # without a mark: Latin letters have a zero as one of their two bytes
        zeros = [sample[start::2].count(0) for start in (0, 1)]
        if max(zeros) > 0.4 * len(sample) / 2:
            encoding = "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    if encoding not in (None, "utf-8"):
        return data.decode(encoding).removeprefix("\ufeff").encode(), ()
    data = data.removeprefix(codecs.BOM_UTF8)
    if _is_utf8(data):
        return data, ()
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:  # five bytes mean nothing in Windows-1252
        text = data.decode("latin-1")
    return text.encode(), (f"{source} is not in UTF-8; it is read as Windows-1252 (Western European).",)


def _is_utf8(data: bytes) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(data), BLOCK_BYTES):  # in pieces, so that no second copy of a large file is made
            decoder.decode(data[start : start + BLOCK_BYTES])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _sniff(data: bytes, usual: str) -> tuple[str, list[str]]:
    """The separator, and the names of the columns as they are written.

    The right one cuts the first line into known names, and all lines into equally many cells.
    """
    sample = data[:SAMPLE_BYTES].decode(errors="ignore")
    whole = len(data) <= SAMPLE_BYTES
    best: tuple[tuple[bool, bool, int], str, list[str]] | None = None
    for separator in sorted(SEPARATORS, key=lambda one: one != usual):
        try:
            reader = csv.reader(io.StringIO(sample, newline=""), delimiter=separator)
            rows = [row for row, _ in zip(reader, range(SAMPLE_LINES), strict=False)]
        except csv.Error:  # a cell of more than 128 kB
            continue
        rows = [row for row in (rows if whole or len(rows) == SAMPLE_LINES else rows[:-1] or rows) if row]
        if not rows:
            continue
        known = any(normalize(name) in (*PATH_COLUMNS, *LABEL_COLUMNS) for name in rows[0])
        even = len({len(row) for row in rows}) == 1
        score = (known, even, len(rows[0]))
        if best is None or score > best[0]:
            best = score, separator, rows[0]
    if best is None:
        raise ValueError("its first line has no names of columns")
    return best[1], best[2]


def number_texts(table: pa.Table) -> pa.Table:
    """Turn each column of text into numbers, or true and false, if nothing is lost by it."""
    columns = [number_text(column) if pa.types.is_string(column.type) else column for column in table.columns]
    return pa.table(columns, names=table.column_names)


WHOLE = r"^-?(0|[1-9][0-9]*)$"
NUMBER = r"^-?(0|[1-9][0-9]*)?(\.[0-9]*)?([eE][+-]?[0-9]{1,3})?$"


def number_text(texts: Any) -> Any:
    """A column of text as numbers, if every cell is a number or missing and different texts are different numbers."""
    cells = pc.utf8_trim_whitespace(texts)
    given = pc.if_else(pc.is_in(cells, value_set=pa.array(MISSING)), None, cells)
    present = given.drop_null()
    if not len(present):
        return texts
    first = present[0].as_py()
    if first.lower() in ("true", "false"):
        styles = [("true", "false"), ("True", "False"), ("TRUE", "FALSE")]
        fits = any(pc.all(pc.is_in(present, value_set=pa.array(style))).as_py() for style in styles)
        return pc.equal(pc.utf8_lower(given), "true") if fits else texts
    if not (re.match(NUMBER, first) and pc.all(pc.match_substring_regex(present, NUMBER)).as_py()):
        return texts
    try:
        whole = pc.all(pc.match_substring_regex(present, WHOLE)).as_py()
        numbers = given.cast(pa.int64() if whole else pa.float64())
        if not whole:
            integers = present.filter(pc.match_substring_regex(present, WHOLE))
            if len(integers) and pc.max(pc.utf8_length(integers)).as_py() > 15:  # not every one is a float64
                return texts
            if not pc.all(pc.is_finite(numbers.drop_null())).as_py():
                return texts
    except pa.ArrowInvalid:  # beyond 64 bits, or a lone point
        return texts
    same = pc.count_distinct(numbers).as_py() == pc.count_distinct(given).as_py()
    return numbers if same and "-0" not in pc.unique(present).slice(0, 1000).to_pylist() else texts
