"""Tables in every format, as people and programs write them, whole and damaged; labels are what was written."""

import csv
import io
import json
import logging
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actcache.sources import open_source, read_table

NAMES = [
    "path", "image", "file_name", "label", "label_name", "class", "Finding Labels", "mask", "uri", "bytes", "", "a b",
    "Unnamed: 0", "split", "\0", "é", "x", "__index_level_0__", "category", "x\ny", "fine_label", "coarse_label",
]  # fmt: skip
CELLS = ["a.png", "b.png", "c/d.png", "/a.png", "../a.png", "", "0", "1", "-1", "001", "1.0", "1.10", "true", "NA",
         "x,y", "x;y", "\t", "é", '"', "1e5", "2024-01-31",
         " 5", "9" * 25, "\0", "line\nline", "NaN", "\r"]  # fmt: skip
VALUES: list[Any] = [
    *CELLS,
    None,
    0,
    1,
    -1,
    2**40,
    0.5,
    float("nan"),
    True,
    b"x",
    [1],
    {"bytes": b"x", "path": "a.png"},
]
TYPES = [
    pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.binary_view(), pa.int64(), pa.float64(),
    pa.bool_(),
    pa.list_(pa.string()), pa.dictionary(pa.int8(), pa.string()),
    pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    pa.date32(), pa.timestamp("us", "UTC"), pa.decimal128(20, 2), pa.null(), pa.map_(pa.string(), pa.int64()),
]  # fmt: skip


def prepare(folder: Path) -> None:
    logging.disable(logging.WARNING)  # notes on what is left out


def attempt(rng: random.Random, folder: Path, state: None) -> None:
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(b"12")
    kind = rng.choice(["labels", "csv", "csv", "tsv", "jsonl", "parquet", "parquet"])
    if kind == "labels":
        check_labels(rng, folder)
        return
    path = folder / f"x.{kind}"
    if kind == "parquet":
        write_parquet(rng, path)
    elif kind == "jsonl":
        values = [*CELLS, None, 1, 2.5, [1], {"a": 1}]
        rows = [{rng.choice(NAMES): rng.choice(values) for _ in range(3)} for _ in range(4)]
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        write_text(rng, path)
    if rng.random() < 0.5:
        damage(rng, path)
    (use_table if rng.random() < 0.3 else use_source)(rng, path)


def use_table(rng: random.Random, path: Path) -> None:
    read_table(path).to_pylist()


def use_source(rng: random.Random, path: Path) -> None:
    options = {name: rng.choice(NAMES) for name in ("path_column", "label") if rng.random() < 0.2}
    source = open_source(path, **options)
    plan = source.plan()
    assert not any("\n" in note for note in plan.notes)
    for uri in plan.table["uri"].to_pylist()[:3]:
        source.read(uri)


def check_labels(rng: random.Random, folder: Path) -> None:
    """Labels of a text file in any separator and encoding are the texts that were written."""
    labels = [
        rng.choice(["001", "true", "NA", "1.0", "dog", "é", "x;y", "a,b", "t\tt", "p|p", "null"]) for _ in range(2)
    ]
    rows = [["file_name", "label", "n"], ["a.png", labels[0], "1"], ["b.png", labels[1], "2"]]
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=rng.choice(",;\t|"), lineterminator=rng.choice(["\n", "\r\n"])).writerows(rows)
    path = folder / rng.choice(["x.csv", "x.tsv"])
    encodings = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252", "latin-1"]
    path.write_bytes(buffer.getvalue().encode(rng.choice(encodings)))
    table = open_source(path).plan().table.sort_by("uri")
    assert table["label_name"].to_pylist() == labels, labels
    assert table["n"].to_pylist() == [1, 2]


def write_text(rng: random.Random, path: Path) -> None:
    header = rng.choices(NAMES, k=rng.randrange(1, 5))
    rows = [
        [rng.choice(CELLS) for _ in range(len(header) if rng.random() < 0.9 else 2)] for _ in range(rng.randrange(6))
    ]
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=rng.choice(",;\t|"), lineterminator=rng.choice(["\n", "\r\n", "\r"]))
    writer.writerows([header, *rows])
    path.write_bytes(buffer.getvalue().encode(rng.choice(["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1"])))


def write_parquet(rng: random.Random, path: Path) -> None:
    columns: dict[str, Any] = {}
    n = rng.randrange(4)
    for name in rng.choices(NAMES, k=rng.randrange(1, 5)):
        kind = rng.choice(TYPES)
        for _ in range(20):  # values that this type takes
            try:
                columns[name] = pa.array([rng.choice(VALUES) for _ in range(n)], kind)
                break
            except (pa.ArrowException, TypeError, ValueError, OverflowError):
                continue
        else:
            columns[name] = pa.nulls(n, pa.string())
    if rng.random() < 0.5:
        columns["path"] = pa.array(["a.png", "b.png", "a.png"][:n], pa.string())
    table = pa.table(columns)
    if rng.random() < 0.3:
        facts = {"info": {"features": {name: {"_type": rng.choice(["Image", "ClassLabel"]), "names": ["x", "y"]}
                                       for name in columns}}}  # fmt: skip
        table = table.replace_schema_metadata({b"huggingface": json.dumps(facts).encode()})
    pq.write_table(table, path)


def damage(rng: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.randrange(1, 5)):
        if data:
            data[rng.randrange(len(data))] = rng.choice([0, 10, 34, 44, 127, 128, 255, rng.randrange(256)])
    if rng.random() < 0.2:
        data = data[: rng.randrange(len(data) + 1)]
    path.write_bytes(data)
