"""The rows of one latent are those of the whole table, and only their row groups are read."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from small_codes import write_codes

from analysis import ConceptTable, analyze
from analysis.concepts import latent_rows
from analysis.concepts.files import write_tables
from analysis.concepts.latent_rows import LatentRows

N_LATENTS = 250


class Counting(io.FileIO):
    """A file that adds up the bytes that are read of it."""

    total = 0

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        n = super().readinto(buffer) or 0
        Counting.total += n
        return n

    def read(self, size: int = -1) -> bytes:
        data = super().read(size) or b""
        Counting.total += len(data)
        return data


def open_counting(path: Path) -> Callable[[], IO[bytes]]:
    return lambda: Counting(path)  # type: ignore[return-value]


def accept(table: pa.Table) -> None:
    """Takes any table."""


@pytest.fixture(scope="module")
def table() -> pa.Table:
    """Up to 100 rows of each latent, of some none, the classes in a dictionary."""
    rng = np.random.default_rng(0)
    count = np.where(rng.random(N_LATENTS) < 0.2, 0, rng.integers(1, 100, N_LATENTS))
    latent = np.repeat(np.arange(N_LATENTS, dtype=np.int32), count)
    names = pa.array([f"class{i}" for i in range(40)])
    label = rng.integers(0, 40, len(latent)).astype(np.int32)
    return pa.table({
        "label_name": pa.DictionaryArray.from_arrays(pa.array(label), names), "label": label, "latent": latent,
        "n_tokens": rng.integers(1, 9, len(latent)).astype(np.uint32),
    })  # fmt: skip


def check(rows: LatentRows, table: pa.Table) -> None:
    for latent in [*np.random.default_rng(1).permutation(N_LATENTS).tolist(), N_LATENTS, -1]:
        expected = table.filter(pc.equal(table["latent"], latent))
        assert rows.rows_of(latent).to_pydict() == expected.to_pydict()


@pytest.mark.parametrize("group_rows", [35, 400, 1 << 20])
def test_they_are_those_of_the_whole_table(table: pa.Table, tmp_path: Path, group_rows: int) -> None:
    """A latent of up to 100 rows lies in up to four groups of 35."""
    half = table.num_rows // 2
    write_tables(tmp_path / "x.parquet", [table[:half], table[half:half], table[half:]], group_rows=group_rows)
    check(LatentRows(lambda: (tmp_path / "x.parquet").open("rb"), accept), table)


def test_only_the_groups_of_a_latent_are_read(table: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.parquet"
    write_tables(path, [table], group_rows=400)
    monkeypatch.setattr(latent_rows, "N_KEPT", 3)
    rows = LatentRows(open_counting(path), accept)
    sizes = []
    for latent in (150, 20, 280):
        before = Counting.total
        assert rows.rows_of(latent).num_rows == pc.sum(pc.equal(table["latent"], latent)).as_py()
        sizes.append(Counting.total - before)
    assert 0 < max(sizes) < 0.1 * path.stat().st_size
    before = Counting.total
    rows.rows_of(280)  # kept
    assert Counting.total == before
    for latent in range(N_LATENTS):
        rows.rows_of(latent)
    assert len(rows._kept) == 3


@pytest.mark.parametrize("how", ["within", "between", "no statistics"])
def test_a_file_that_is_not_sorted_is_read_whole(table: pa.Table, tmp_path: Path, how: str) -> None:
    if how == "within":
        mixed = table.take(np.random.default_rng(2).permutation(table.num_rows))
        pq.write_table(mixed, tmp_path / "x.parquet")
    elif how == "between":
        mixed = pa.concat_tables([table[5000:], table[:5000]])
        pq.write_table(mixed, tmp_path / "x.parquet", row_group_size=500)
    else:
        mixed = table
        pq.write_table(mixed, tmp_path / "x.parquet", row_group_size=500, write_statistics=False)
    check(LatentRows(lambda: (tmp_path / "x.parquet").open("rb"), accept), mixed)


def test_an_empty_file_has_no_rows(table: pa.Table, tmp_path: Path) -> None:
    write_tables(tmp_path / "x.parquet", [table[:0]])
    rows = LatentRows(lambda: (tmp_path / "x.parquet").open("rb"), accept)
    assert rows.rows_of(3).num_rows == 0
    assert rows.rows_of(3).column_names == table.column_names


def test_class_counts_lie_in_small_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from analysis.concepts import files

    monkeypatch.setattr(files, "GROUP_ROWS", 10)
    rng = np.random.default_rng(3)
    dense = np.where(rng.random((30, 5, 20)) < 0.2, rng.random((30, 5, 20)), 0).astype(np.float16)
    concepts = analyze(
        write_codes(tmp_path / "x.codes", dense, (30,), np.arange(30, dtype=np.int32) % 7), tmp_path / "x.concepts"
    )
    footer = pq.read_metadata(concepts.path / "class_counts.parquet")
    assert max(footer.row_group(i).num_rows for i in range(footer.num_row_groups)) == 10
    opened = ConceptTable.open(concepts.path)
    for latent in range(20):
        expected = opened.class_counts.filter(pc.equal(opened.class_counts["latent"], latent))
        assert opened.rows_of("class_counts", latent).to_pydict() == expected.to_pydict()
