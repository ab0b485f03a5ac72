"""write_answer: the file holds the answer, and nothing in it is run by a spreadsheet."""

import csv
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.query import write_answer

FORMULAS = ["=1+2", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", '=HYPERLINK("http://x","y")', "-"]
PLAIN = ["cat", "", " =1", "a=b", "'=1", "1-2", "c++"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())], ids=str)
def test_text_that_a_spreadsheet_would_run_is_prefixed(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [*FORMULAS, *PLAIN, None]
    numbers = [-1.5] * len(texts)
    table = pa.table({"uri": pa.array(texts).cast(kind), "score": numbers, "count": [-2] * len(texts)})
    file = write_answer(table, tmp_path / "answer.csv")
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["uri"] for row in rows] == [*(f"'{text}" for text in FORMULAS), *PLAIN, ""]
    assert {(row["score"], row["count"]) for row in rows} == {("-1.5", "-2")}


def test_names_of_columns_and_rows_of_dictionaries_are_made_safe_too(tmp_path: Path) -> None:
    file = write_answer([{"=a": "=b", "n": -1}], tmp_path / "answer.csv")
    with file.open(newline="") as stream:
        assert list(csv.reader(stream)) == [["'=a", "n"], ["'=b", "-1"]]


def test_parquet_keeps_the_text_as_it_is(tmp_path: Path) -> None:
    table = pa.table({"uri": FORMULAS})
    assert pq.read_table(write_answer(table, tmp_path / "answer.parquet")).equals(table)
