"""Tables as people have them: any separator, encoding, column name and type; what is written is what is kept."""

import csv
import datetime
import io
import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from actcache import ImageSourceError, ImageTable
from actcache.sources import open_source, read_table

NAMES = ("a.png", "b.png", "c.png", "d.png")


def png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (value % 256, 7, 9)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(png(i))
    return tmp_path


def rows_of(path: Path, **options: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = open_source(path, **options).plan().table.sort_by("uri").to_pylist()
    return rows


def labels_of(path: Path, **options: Any) -> list[tuple[int, str]]:
    return [(row["label"], row["label_name"]) for row in rows_of(path, **options)]


def notes_of(path: Path, **options: Any) -> str:
    return "\n".join(open_source(path, **options).plan().notes)


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ImageSourceError) as caught:
        open_source(path, **options).plan()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 900
    return str(caught.value)


def write(path: Path, rows: Sequence[Sequence[str]], separator: str = ",", encoding: str = "utf-8") -> Path:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=separator, lineterminator="\n").writerows(rows)
    path.write_bytes(buffer.getvalue().encode(encoding))
    return path


# -- separators and encodings ------------------------------------------------------------------------------------------

ROWS = [
    ["file_name", "label", "note"],
    ["a.png", "Äpfel", "x, y; z|1"],
    ["b.png", "Öl", "\t"],
    ["c.png", "Äpfel", 'q"r'],
]


@pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "latin-1", "cp1252",
                                      "utf-32"])  # fmt: skip
def test_separator_and_encoding_are_found_out(folder: Path, name: str, separator: str, encoding: str) -> None:
    path = write(folder / name, ROWS, separator, encoding)
    assert [(row["uri"], row["label_name"], row["note"]) for row in rows_of(path)] == [tuple(row) for row in ROWS[1:]]
    assert ("Windows-1252" in notes_of(path)) == (encoding in ("latin-1", "cp1252"))


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_one_column_and_lines_within_cells_are_no_matter(folder: Path, separator: str) -> None:
    assert len(rows_of(write(folder / "x.csv", [["path"], ["a.png"], ["b.png"]], separator))) == 2
    rows = [["path", "text"], ["a.png", f"one\ntwo{separator}three"], ["b.png", "four\r\n"]]
    assert [row["text"] for row in rows_of(write(folder / "x.csv", rows, separator))] == [rows[1][1], rows[2][1]]


def test_excels_line_on_the_separator_is_no_row(folder: Path) -> None:
    (folder / "x.csv").write_text("sep=;\npath;label\na.png;x,y\n")
    assert labels_of(folder / "x.csv") == [(0, "x,y")]


def test_a_byte_that_no_encoding_has_is_no_obstacle(folder: Path) -> None:
    (folder / "x.csv").write_bytes(b"path,label\na.png,caf\xe9\nb.png,\x81\n")
    assert [name for _, name in labels_of(folder / "x.csv")] == ["café", "\x81"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_spaces_after_the_separator_do_not_belong_to_names_and_cells(folder: Path, end: str) -> None:
    lines = ["path, label, score", "a.png, dog, 1", "b.png, a cat, 2.5", ""]
    (folder / "x.csv").write_bytes(end.join(lines).encode())
    assert [(row["label_name"], row["score"]) for row in rows_of(folder / "x.csv")] == [("dog", 1.0), ("a cat", 2.5)]


@pytest.mark.parametrize("index", [["0", "1"], ["17", "3"], ["", ""], ["1", "2"]])
@pytest.mark.parametrize("name", ["", "Unnamed: 0", "Unnamed: 3", " "])
@pytest.mark.parametrize("place", [0, 2])
def test_an_index_without_a_name_is_ignored(folder: Path, name: str, index: list[str], place: int) -> None:
    rows = [["path", "label"], ["a.png", "x"], ["b.png", "y"]]
    for row, cell in zip(rows, [name, *index], strict=True):
        row.insert(place, cell)
    columns = open_source(write(folder / "x.csv", rows)).plan().table.column_names
    assert columns == ["source_index", "uri", "label", "label_name", "bytes"]


def test_texts_without_a_name_are_not_ignored(folder: Path) -> None:
    assert "a column without a name" in refusal(write(folder / "x.csv", [["path", ""], ["a.png", "dog"]]))


def test_the_index_that_pandas_writes_into_parquet_is_ignored(folder: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"path": list(NAMES[:2]), "label": ["x", np.nan]}, index=[5, 3])
    frame.to_parquet(folder / "x.parquet")
    assert labels_of(folder / "x.parquet") == [(0, "x"), (-1, "")]
    assert "__index_level_0__" not in open_source(folder / "x.parquet").plan().table.column_names
    frame.to_csv(folder / "x.csv")
    assert labels_of(folder / "x.csv") == [(0, "x"), (-1, "")]


# -- what is written is what is kept -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["001", "010", "100"], [(0, "001"), (1, "010"), (2, "100")]),
        (["true", "false", "true"], [(1, "true"), (0, "false"), (1, "true")]),
        (["True", "False", ""], [(1, "True"), (0, "False"), (-1, "")]),
        (["1.0", "2.0", "10.0"], [(0, "1.0"), (2, "2.0"), (1, "10.0")]),
        (["NA", "DE", "NA"], [(1, "NA"), (0, "DE"), (1, "NA")]),
        (["NA", "NA", "NA"], [(0, "NA")] * 3),
        (["null", "None", "nan"], [(2, "null"), (0, "None"), (1, "nan")]),
        (["2024-01-31", "2024-02-01", "2024-01-31"], [(0, "2024-01-31"), (1, "2024-02-01"), (0, "2024-01-31")]),
        (["12:30", "1e5", "0x10"], [(1, "12:30"), (2, "1e5"), (0, "0x10")]),
        (["7", "3", ""], [(7, "7"), (3, "3"), (-1, "")]),
        (["7", "-1", "0"], [(7, "7"), (-1, ""), (0, "0")]),
        (["7", "+3", "0"], [(2, "7"), (0, "+3"), (1, "0")]),
        (["99999999999", "1", "2"], [(2, "99999999999"), (0, "1"), (1, "2")]),
        (["", "", ""], [(-1, "")] * 3),
    ],
)
@pytest.mark.parametrize("column", ["label", "class", "category"])
def test_labels_are_the_text_as_written(
    folder: Path, column: str, texts: list[str], expected: list[tuple[int, str]]
) -> None:
    path = write(
        folder / "x.csv", [["path", column], *([name, text] for name, text in zip(NAMES, texts, strict=False))]
    )
    assert labels_of(path) == expected
    assert labels_of(path, label=column) == expected


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["1", "-2", "30"], [1, -2, 30]),
        (["1", "", "NA"], [1, None, None]),
        (["0.5", "1", "-2e3"], [0.5, 1.0, -2000.0]),
        (["0.50", "1.25", "nan"], [0.5, 1.25, None]),
        (["007", "010", "8"], ["007", "010", "8"]),
        (["1.1", "1.10", "1.2"], ["1.1", "1.10", "1.2"]),
        (["12345678901234567890", "1", "2"], ["12345678901234567890", "1", "2"]),
        (["9007199254740993", "0.5", "1"], ["9007199254740993", "0.5", "1"]),
        (["true", "false", ""], [True, False, None]),
        (["True", "False", "True"], [True, False, True]),
        (["true", "False", "yes"], ["true", "False", "yes"]),
        (["NA", "", "NA"], ["NA", "", "NA"]),
        (["2024-01-31", "2024-02-01", ""], ["2024-01-31", "2024-02-01", ""]),
        (["1_000", "2", "3"], ["1_000", "2", "3"]),
        (["+5", "2", "3"], ["+5", "2", "3"]),
        (["-0", "2", "3"], ["-0", "2", "3"]),
        (["inf", "2", "3"], ["inf", "2", "3"]),
        ([" 5", "2 ", "3"], [5, 2, 3]),
    ],
)
def test_a_column_is_a_number_only_if_nothing_is_lost(folder: Path, texts: list[str], expected: list[Any]) -> None:
    rows = [["path", "label", "own"], *([name, "x", text] for name, text in zip(NAMES, texts, strict=False))]
    assert [row["own"] for row in rows_of(write(folder / "x.csv", rows))] == expected
    assert read_table(folder / "x.csv")["own"].to_pylist() == expected


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.integers(-(10**20), 10**20).map(str), st.floats(allow_nan=False).map(repr),
                          st.sampled_from(["", "01", "NA", "true", "1.50", " 7", "-0", "1e400"])),
                min_size=1, max_size=4))  # fmt: skip
def test_numbers_can_be_written_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("table") / "x.csv"
    column = read_table(write(path, [["own", "n"], *([text, "1"] for text in texts)]))["own"]
    values = column.to_pylist()
    if pa.types.is_string(column.type):
        assert values == texts
        return
    for text, value in zip(texts, values, strict=True):
        if value is None:
            assert text.strip() in ("", "NA")
        elif not isinstance(value, bool):
            assert Decimal(text.strip()) == Decimal(repr(value))


# -- names of columns --------------------------------------------------------------------------------------------------

PATH_NAMES = ["path", "image", "file", "filename", "uri", "file_name", "filepath", "file_path", "image_path",
              "imagePath",
              "Image Path", "img", "img_path", "image_file", "image_name", "image_filename", "FileName",
              "Image Index"]  # fmt: skip
LABEL_NAMES = ["label", "labels", "class", "class_name", "Class Name", "category", "target", "fine_label", "className",
               "class_label", "coarse_label", "category_name", "LABEL"]  # fmt: skip


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
@pytest.mark.parametrize("name", PATH_NAMES)
def test_the_usual_names_of_paths_are_known(folder: Path, name: str, suffix: str) -> None:
    path = write_any(folder, suffix, {name: ["b.png", "a.png"], "n": [1, 2]})
    assert [row["uri"] for row in rows_of(path)] == ["a.png", "b.png"]


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
@pytest.mark.parametrize("name", LABEL_NAMES)
def test_the_usual_names_of_labels_are_known(folder: Path, name: str, suffix: str) -> None:
    path = write_any(folder, suffix, {"path": ["a.png", "b.png"], name: ["dog", "cat"]})
    assert labels_of(path) == [(1, "dog"), (0, "cat")]
    assert not notes_of(path)
    if name != "label":
        assert [row[name] for row in rows_of(path)] == ["dog", "cat"]
    whole = write_any(folder, suffix, {"path": ["a.png", "b.png"], name: [4, 2]})
    assert labels_of(whole) == [(4, "4"), (2, "2")]


def write_any(folder: Path, suffix: str, columns: Mapping[str, Sequence[Any]]) -> Path:
    path = folder / f"x.{suffix}"
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if suffix == "parquet":
        pq.write_table(pa.table(dict(columns)), path)
    elif suffix == "jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    else:
        write(path, [list(columns), *([str(value) for value in row.values()] for row in rows)])
    return path


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_columns_of_any_name_can_be_chosen(folder: Path, suffix: str) -> None:
    columns = {"path": ["b.png", "c.png"], "thumb": ["a.png", "d.png"], "kind": ["x", "y"], "label": ["dog", "cat"]}
    path = write_any(folder, suffix, columns)
    plan = open_source(path, path_column="thumb", label="kind").plan()
    rows = plan.table.sort_by("uri").to_pylist()
    assert [(row["uri"], row["label_name"], row["path"], row["kind"]) for row in rows] == [
        ("a.png", "x", "b.png", "x"), ("d.png", "y", "c.png", "y"),
    ]  # fmt: skip
    assert dict(plan.columns) == {"path": "thumb", "label": "kind"}
    assert "'label' is left out" in "\n".join(plan.notes)
    assert open_source(path, path_column="thumb").read("a.png") == png(0)
    usual = open_source(path, path_column="path", label="label").plan()
    assert dict(usual.columns) == {}
    assert usual.table.equals(open_source(path).plan().table)
    assert "no column 'nothing' for --label. Its columns are" in refusal(path, label="nothing")
    assert "no column 'nothing' for --path-column. Its columns are path, thumb" in refusal(path, path_column="nothing")


def test_several_or_no_labels_are_said_in_one_line(folder: Path) -> None:
    several = write_any(folder, "csv", {"path": NAMES, "fine_label": ["a", "b", "a", "b"], "coarse_label": ["x"] * 4})
    assert labels_of(several)[0] == (0, "a")
    assert notes_of(several) == (
        "x.csv: the labels are those of column 'fine_label'; coarse_label could be labels too. "
        "Choose with --label COLUMN."
    )
    assert not notes_of(several, label="coarse_label")
    assert [name for _, name in labels_of(several, label="coarse_label")] == ["x"] * 4
    none = write_any(folder, "csv", {"path": NAMES, "animal": ["a", "b", "a", "b"], "id": ["p", "q", "r", "s"]})
    assert labels_of(none)[0] == (-1, "")
    assert "could be labels: animal. Choose one with --label COLUMN" in notes_of(none)
    assert not notes_of(write_any(folder, "csv", {"path": NAMES}))
    scores = write_any(folder, "csv", {"path": NAMES, "target": ["0.5", "1.5", "2", "3"]})
    assert labels_of(scores) == [(-1, "")] * 4


def test_a_column_that_holds_paths_is_proposed(folder: Path) -> None:
    message = refusal(write_any(folder, "csv", {"who": ["x", "y"], "where": ["a.png", "b.png"]}))
    assert "'where' holds such paths: choose it with --path-column" in message
    assert "--path-column" in refusal(write_any(folder, "csv", {"who": ["x", "y"]}))


def test_choices_are_for_tables(folder: Path) -> None:
    with pytest.raises(ImageSourceError, match="--path-column"):
        open_source(folder, path_column="x").plan()
    with pytest.raises(ImageSourceError, match="--label"):
        open_source(folder, label="x").plan()


# -- types of Parquet --------------------------------------------------------------------------------------------------


def dictionary(values: list[Any]) -> pa.Array:
    return pa.array(values).dictionary_encode()


def runs(values: list[Any]) -> pa.Array:
    return pa.RunEndEncodedArray.from_arrays(list(range(1, len(values) + 1)), values)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(),
                                  pa.dictionary(pa.int32(), pa.string()),
                                  pa.dictionary(pa.int8(), pa.large_string())], ids=str)  # fmt: skip
def test_text_of_every_layout_is_text(folder: Path, kind: pa.DataType) -> None:
    def texts(values: list[str | None]) -> pa.Array:
        if not pa.types.is_dictionary(kind):
            return pa.array(values).cast(kind)
        encoded = pa.array(values, kind.value_type).dictionary_encode()
        return pa.DictionaryArray.from_arrays(encoded.indices.cast(kind.index_type), encoded.dictionary)

    table = pa.table({"path": texts(["b.png", "a.png"]), "label": texts(["dog", None]), "own": texts([None, "x"])})
    pq.write_table(table, folder / "x.parquet")
    plan = open_source(folder / "x.parquet").plan().table
    assert [(row["uri"], row["label_name"], row["own"]) for row in plan.sort_by("uri").to_pylist()] == [
        ("a.png", "", "x"), ("b.png", "dog", None),
    ]  # fmt: skip
    assert plan.schema.field("own").type == pa.string()


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pa.array([1.0, float("nan")]), [(1, "1"), (-1, "")]),
        (pa.array([2.0, None], pa.float32()), [(2, "2"), (-1, "")]),
        (pa.array([3, None], pa.uint8()), [(3, "3"), (-1, "")]),
        (pa.array([True, False]), [(1, "true"), (0, "false")]),
        (pa.array([True, None]), [(1, "true"), (-1, "")]),
        (pa.array([Decimal(3), None], pa.decimal128(5, 0)), [(3, "3"), (-1, "")]),
        (dictionary([5, None]), [(5, "5"), (-1, "")]),
        (pa.nulls(2), [(-1, ""), (-1, "")]),
    ],
)
def test_missing_labels_of_every_type_are_none(folder: Path, labels: pa.Array, expected: Any) -> None:
    pq.write_table(pa.table({"path": ["a.png", "b.png"], "label": labels}), folder / "x.parquet")
    assert labels_of(folder / "x.parquet") == expected


NESTED = {
    "list": pa.array([["x"], None]),
    "large list": pa.array([["x"], None]).cast(pa.large_list(pa.large_string())),
    "list of views": pa.array([["x"], None], pa.list_(pa.string_view())),
    "fixed list": pa.array([[1, 2], [3, 4]], pa.list_(pa.int32(), 2)),
    "struct": pa.array([{"a": 1, "b": "x"}, None]),
    "struct of views": pa.array([{"a": "x"}, None], pa.struct([("a", pa.string_view())])),
    "map": pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int32())),
    "date": pa.array([datetime.date(2024, 1, 1), None]),
    "zone": pa.array([datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC), None]),
    "decimal": pa.array([Decimal("1.5"), None]),
    "half": pa.array([np.float16(1), None]),
    "duration": pa.array([1, None], pa.duration("s")),
    "fixed bytes": pa.array([b"ab", None], pa.binary(2)),
}
if int(pa.__version__.split(".")[0]) >= 24:  # older ones cannot read the file that they write of it
    NESTED["fixed list with a gap"] = pa.array([[1, 2], None], pa.list_(pa.int32(), 2))


@pytest.mark.parametrize("name", NESTED)
def test_own_columns_of_every_type_are_kept(folder: Path, name: str) -> None:
    pq.write_table(pa.table({"path": ["a.png", "b.png"], "own": NESTED[name]}), folder / "x.parquet")
    assert [row["own"] for row in rows_of(folder / "x.parquet")] == NESTED[name].to_pylist()


@pytest.mark.parametrize(
    "labels", [NESTED["list"], NESTED["struct"], NESTED["map"], NESTED["zone"], pa.array([b"x", b"y"])]
)
def test_labels_that_are_no_classes_are_one_line(folder: Path, labels: pa.Array) -> None:
    pq.write_table(pa.table({"path": ["a.png", "b.png"], "label": labels}), folder / "x.parquet")
    assert "a label that is not a class" in refusal(folder / "x.parquet")
    pq.write_table(pa.table({"path": ["a.png", "b.png"], "labels": labels}), folder / "x.parquet")
    assert labels_of(folder / "x.parquet") == [(-1, "")] * 2
    assert "a label that is not a class" in refusal(folder / "x.parquet", label="labels")


# -- damage ------------------------------------------------------------------------------------------------------------


def invalid_text() -> pa.Array:
    data = pa.py_buffer(b"a.png\xff\xfepng")
    return pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(np.array([0, 5, 10], np.int32)), data])


@pytest.mark.parametrize("column", ["path", "label", "own", "mask"])
def test_text_that_is_not_utf8_is_one_line(folder: Path, column: str) -> None:
    columns = {"path": pa.array(["a.png", "b.png"])} | {column: invalid_text()}
    pq.write_table(pa.table(columns), folder / "x.parquet")
    assert "x.parquet" in refusal(folder / "x.parquet")


@pytest.mark.parametrize("cut", [0, 1, 3, 4, 8, 11, 12, 40, -1, -4, -5, -8, -9, -100])
def test_a_parquet_file_cut_anywhere_is_one_line(folder: Path, cut: int) -> None:
    pq.write_table(pa.table({"path": list(NAMES), "label": ["x"] * 4}), folder / "x.parquet")
    whole = (folder / "x.parquet").read_bytes()
    (folder / "x.parquet").write_bytes(whole[:cut])
    assert "x.parquet is not a table" in refusal(folder / "x.parquet")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_parquet_file_is_a_listing_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "a.png").write_bytes(b"1")
    pq.write_table(pa.table({"path": ["a.png"], "label": ["x"]}), folder / "x.parquet")
    whole = bytearray((folder / "x.parquet").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    (folder / "x.parquet").write_bytes(whole)
    try:
        message = str(ImageTable(folder / "x.parquet").plan().n_images)
    except ImageSourceError as error:
        message = str(error)
    assert "\n" not in message


HOSTILE_LINES = {
    "deep": b"[" * 1_000 + b"]" * 1_000, "list": b"[1]", "number": b'{"path": "a.png", "n": ' + b"9" * 5_000 + b"}",
    "surrogate": b'{"path": "a.png", "n": "\\ud800"}', "cut": b'{"path": "a.png"', "bytes": b'{"path": "\xff"}',
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE_LINES)
def test_a_line_that_is_no_object_is_named(folder: Path, what: str) -> None:
    (folder / "x.jsonl").write_bytes(b'{"path": "a.png"}\n\n' + HOSTILE_LINES[what] + b"\n")
    assert "x.jsonl" in refusal(folder / "x.jsonl")
    assert "line 3" in refusal(folder / "x.jsonl")


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf", b"\xff\xfe", b"path", b"path\n", b"path,\xff\n",
                                  b"\0\0\0\0",
                                  b'path,"x\na.png,1', b"path,x\na.png\n", b"path,x\n\"" + b"y" * 100_000,
                                  "path\n\ud800".encode("utf-16-le", "surrogatepass")])  # fmt: skip
@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "jsonl"])
def test_a_file_that_is_no_table_is_one_line(folder: Path, suffix: str, data: bytes) -> None:
    (folder / f"x.{suffix}").write_bytes(data)
    assert f"x.{suffix}" in refusal(folder / f"x.{suffix}")
