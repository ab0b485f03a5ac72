"""verify(): every damage is found and named, down to any single byte."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from actcache import ActivationStore, CorruptError, PipelineError, extract, verify

SHARD = "activations.zarr/blocks.0.hook_resid_post/patches/c/1/0/0"


@pytest.fixture
def store(tmp_path: Path, tiny_store: Path) -> Path:
    return Path(shutil.copytree(tiny_store, tmp_path / "x.acts"))


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def swap(file: Path) -> None:
    other = file.parents[2] / "2" / "0" / "0"
    first, second = file.read_bytes(), other.read_bytes()
    file.write_bytes(second)
    other.write_bytes(first)


DAMAGE: list[tuple[str, Callable[[Path], object], str, str]] = [
    ("a missing shard", Path.unlink, SHARD, "is missing"),
    ("a truncated shard", cut, SHARD, "bytes, expected"),
    ("a bit flip in a chunk", lambda f: flip(f, 100), SHARD, "differs from what was written in bytes 0 to"),
    ("a bit flip in the index", lambda f: flip(f, -20), SHARD, "differs"),
    ("two swapped shards", swap, SHARD, "differs"),
    ("a changed record", lambda f: flip(f, -9), "commits/000001.json", "commits/000001.json"),
    (
        "a changed manifest",
        lambda f: f.write_text(f.read_text().replace('"count": 75', '"count": 74')),
        "manifest.json",
        "differs from what was written",
    ),
    ("half a manifest", lambda f: f.write_bytes(f.read_bytes()[:900]), "manifest.json", "manifest.json"),
    (
        "changed provenance",
        lambda f: f.write_text(f.read_text().replace("tiny.json", "nice.json")),
        "artifact.json",
        "differs",
    ),
    (
        "a record of another shard",
        lambda f: f.write_bytes((f.parent / "000002.json").read_bytes()),
        "commits/000001.json",
        "is not the record of shard 1",
    ),
    (
        "a record too many",
        lambda f: f.write_bytes((f.parent / "000002.json").read_bytes()),
        "commits/000009.json",
        "commits/000009.json",
    ),
    ("a missing image table", Path.unlink, "images.parquet", "is missing"),
    ("a missing record", Path.unlink, "commits/000003.json", "is missing"),
    ("a changed image table", lambda f: flip(f, 50), "images.parquet", "differs"),
    ("changed zarr metadata", lambda f: flip(f, 30), "activations.zarr/zarr.json", "differs"),
    ("a foreign file", lambda f: f.write_text("?"), "activations.zarr/note.txt", "was not written"),
]


@pytest.mark.parametrize(("damage", "name", "word"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_damage_is_found_and_named(store: Path, damage: Callable[[Path], object], name: str, word: str) -> None:
    assert verify(store).ok
    damage(store / name)
    found = verify(store)
    assert not found.ok
    assert any(name in str(problem) and word in str(problem) for problem in found.problems), found.problems


def test_any_single_byte_is_missed_nowhere(
    tmp_path: Path, make_images: Callable[..., Path], tiny_model: dict[str, str]
) -> None:
    """One byte at a time, at 60 to 120 places of every file of a store of 16 images, its first and last included."""
    store = tmp_path / "x.acts"
    extract(make_images(tmp_path / "images", 16), store, **tiny_model, layers=[1], shard_images=16)
    tried = 0
    for file in [f for f in store.rglob("*") if f.is_file()]:
        data = file.read_bytes()
        for position in [*range(0, len(data), max(1, len(data) // 60)), len(data) - 1]:
            damaged = bytearray(data)
            damaged[position] ^= 0x41
            file.write_bytes(damaged)
            tried += 1
            try:
                found = verify(store, n_threads=1)
            except PipelineError:
                continue
            assert not found.ok, f"{file.name} byte {position}"
        file.write_bytes(data)
    assert tried > 500
    assert verify(store).ok


def test_the_reader_notices_what_zarr_would_not(store: Path) -> None:
    opened = ActivationStore.open(store)
    flip(store / SHARD, 100)
    opened.read(0, images=[16])  # not asked to check
    with pytest.raises(CorruptError, match=r"Shard 1 .*differs from what was written"):
        opened.read(0, images=[16], check=True)
    (store / SHARD).unlink()
    with pytest.raises(CorruptError, match=r"Shard 1 .*cannot be opened"):
        ActivationStore.open(store).read(0, images=[16])


def test_an_incomplete_store_is_told_apart_from_a_damaged_one(store: Path) -> None:
    (store / "manifest.json").unlink()
    found = verify(store)
    assert (found.ok, found.complete, found.problems) == (False, False, ())


def test_progress_ends_at_the_whole(tiny_store: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = verify(tiny_store, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (found.n_bytes, found.n_bytes)
    assert json.loads((tiny_store / "manifest.json").read_text())["failed"] == {}
