"""verify() finds and names all damage, down to a single byte."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_store import make_settings, write_store
from typer.testing import CliRunner

import actcache.store.verification
import cli
from actcache import ActivationStore, CorruptError, PipelineError, verify
from actcache.artifacts import digest, write_json

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


def swap(file: Path, other: Path) -> None:
    first, second = file.read_bytes(), other.read_bytes()
    file.write_bytes(second)
    other.write_bytes(first)


def link(file: Path) -> None:
    """Replace a file or folder by a link to the same contents outside."""
    outside = file.parents[len(file.parts) - 1 - file.parts.index("x.acts")] / "outside"
    shutil.move(file, outside)
    file.symlink_to(outside)


def sign(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a record or manifest and update its digest."""
    fields = json.loads(file.read_text())
    del fields["digest"]
    change(fields)
    write_json(file, {**fields, "digest": digest(fields)})


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


# what is done, to which file, its shard, what the problem says
DAMAGE: list[tuple[str, Callable[[Path], object], str, int | None, str]] = [
    ("a missing shard", Path.unlink, SHARD, 1, "is missing"),
    ("a truncated shard", cut, SHARD, 1, "bytes, expected"),
    ("a shard with more", lambda f: f.write_bytes(f.read_bytes() + b"?"), SHARD, 1, "bytes, expected"),
    ("a bit flip in a chunk", lambda f: flip(f, 100), SHARD, 1, "differs from what was written in bytes 0 to"),
    ("a bit flip in the index", lambda f: flip(f, -20), SHARD, 1, "differs"),
    ("two swapped shards", lambda f: swap(f, f.parents[2] / "2" / "0" / "0"), SHARD, 1, "differs"),
    ("a link to a shard", link, SHARD, 1, "is a link"),
    ("a link to a folder of shards", lambda f: link(f.parents[1]), SHARD, 1, "is missing"),
    ("a pipe for a shard", pipe, SHARD, 1, "not a plain file"),
    ("a folder for a shard", lambda f: (f.unlink(), f.mkdir()), SHARD, 1, "is missing"),
    ("a changed record", lambda f: flip(f, -9), "commits/000001.json", 1, "commits/000001.json"),
    (
        "a record with a space more",
        lambda f: f.write_bytes(f.read_bytes() + b" "),
        "commits/000001.json",
        1,
        "bytes, ex",
    ),
    ("a pipe for a record", pipe, "commits/000001.json", 1, "not a plain file"),
    ("a link to a record", link, "commits/000001.json", 1, "is a link"),
    (
        "a record of another shard",
        lambda f: f.write_bytes((f.parent / "000002.json").read_bytes()),
        "commits/000001.json",
        1,
        "is not the record of shard 1",
    ),
    ("two swapped records", lambda f: swap(f, f.parent / "000002.json"), "commits/000001.json", 1, "not the record of"),
    (
        "a signed record with other statistics",
        lambda f: sign(f, lambda r: r["statistics"]["blocks.0.hook_resid_post"]["cls"].update(count=1)),
        "commits/000001.json",
        1,
        "commits/000001.json",
    ),
    (
        "a record too many",
        lambda f: f.write_bytes((f.parent / "000002.json").read_bytes()),
        "commits/000009.json",
        9,
        "commits/000009.json",
    ),
    ("a missing record", Path.unlink, "commits/000003.json", 3, "is missing"),
    ("a link to the records", link, "commits", None, "is a link"),
    (
        "a changed manifest",
        lambda f: f.write_text(f.read_text().replace('"count": 75', '"count": 74')),
        "manifest.json",
        None,
        "differs from what was written",
    ),
    ("a manifest with a space more", lambda f: f.write_bytes(f.read_bytes() + b" "), "manifest.json", None, "differs"),
    ("half a manifest", lambda f: f.write_bytes(f.read_bytes()[:900]), "manifest.json", None, "manifest.json"),
    (
        "changed provenance",
        lambda f: f.write_text(f.read_text().replace("tiny.json", "nice.json")),
        "artifact.json",
        None,
        "differs",
    ),
    ("a missing image table", Path.unlink, "images.parquet", None, "is missing"),
    ("a changed image table", lambda f: flip(f, 50), "images.parquet", None, "differs"),
    ("a link to the image table", link, "images.parquet", None, "is a link"),
    ("changed zarr metadata", lambda f: flip(f, 30), "activations.zarr/zarr.json", None, "differs"),
    ("a link to the arrays", link, "activations.zarr", None, "is a link"),
    ("a foreign file", lambda f: f.write_text("?"), "activations.zarr/note.txt", None, "was not written"),
]


@pytest.mark.parametrize(
    ("damage", "name", "shard", "word"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE]
)
def test_damage_is_found_and_named_with_its_shard(
    store: Path, damage: Callable[[Path], object], name: str, shard: int | None, word: str
) -> None:
    assert verify(store).ok
    damage(store / name)
    found = verify(store)
    assert not found.ok
    named = [problem for problem in found.problems if problem.file == name and problem.shard == shard]
    assert any(word in str(problem) for problem in named), found.problems
    assert shard is None or shard in found.shards


def test_a_seal_over_half_of_the_shards_is_noticed(store: Path) -> None:
    """A manifest that was signed again can omit files, but not the shards that the settings imply."""
    for name in [f"commits/{shard:06d}.json" for shard in (3, 4)]:
        (store / name).unlink()
        sign(store / "manifest.json", lambda manifest, name=name: manifest["files"].pop(name))  # type: ignore[misc]
    shutil.rmtree(store / "activations.zarr" / "blocks.0.hook_resid_post" / "patches" / "c" / "3")
    assert [problem.shard for problem in verify(store).problems if problem.what == "is missing"] == [3, 4]


# ---------------------------------------------------------------------------------------------------------------------
# Codes

ARRAYS = ("indptr", "latent", "value", "latent_indptr", "row", "latent_value")
CODES_DAMAGE: list[tuple[str, Callable[[Path], object], str, int | None, str]] = [
    *(
        (f"{what} {column}", damage, f"codes.zarr/2/{column}/c/0", 2, word)
        for column in ARRAYS
        for what, damage, word in (
            ("a flipped bit in", lambda f: flip(f, f.stat().st_size // 2), "differs from what was written in bytes 0"),
            ("a truncated", cut, "bytes, expected"),
            ("a missing", Path.unlink, "is missing"),
        )
    ),
    ("changed metadata of an array", lambda f: flip(f, 30), "codes.zarr/2/row/zarr.json", 2, "differs"),
    ("changed metadata of a shard", lambda f: flip(f, 10), "codes.zarr/2/zarr.json", 2, "differs"),
    ("two swapped shards", lambda f: swap(f, f.parents[3] / "3/value/c/0"), "codes.zarr/2/value/c/0", 2, "differs"),
    ("a missing shard", lambda f: shutil.rmtree(f.parent), "codes.zarr/2/zarr.json", 2, "is missing"),
    ("a changed record", lambda f: flip(f, -9), "commits/000002.json", 2, "commits/000002.json"),
    ("a missing record", Path.unlink, "commits/000002.json", 2, "is missing"),
    ("a changed manifest", lambda f: flip(f, -9), "manifest.json", None, "manifest.json"),
    ("a changed image table", lambda f: flip(f, 50), "images.parquet", None, "differs"),
    ("a foreign file", lambda f: f.write_text("?"), "codes.zarr/2/note.txt", None, "was not written"),
]


@pytest.mark.parametrize(
    ("damage", "name", "shard", "word"), [case[1:] for case in CODES_DAMAGE], ids=[case[0] for case in CODES_DAMAGE]
)
def test_damaged_codes_are_found_and_named_with_their_shard(
    tmp_path: Path, tiny_codes: Path, damage: Callable[[Path], object], name: str, shard: int | None, word: str
) -> None:
    codes = Path(shutil.copytree(tiny_codes, tmp_path / "x.codes"))
    damage(codes / name)
    found = verify(codes)
    assert not found.ok
    named = [problem for problem in found.problems if problem.file == name and problem.shard == shard]
    assert any(word in str(problem) for problem in named), found.problems
    assert shard is None or shard in found.shards


def test_the_command_names_shard_and_file_and_exits_1(tmp_path: Path, tiny_codes: Path) -> None:
    codes = Path(shutil.copytree(tiny_codes, tmp_path / "x.codes"))
    assert CliRunner().invoke(cli.app, ["verify", str(codes)]).exit_code == 0
    flip(codes / "codes.zarr/2/latent_value/c/0", 7)
    (codes / "codes.zarr/4/indptr/c/0").unlink()
    done = CliRunner().invoke(cli.app, ["--json", "verify", str(codes)])
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert found["shards"] == [2, 4]
    assert [problem.split(":")[0] for problem in sorted(found["problems"])] == [
        "codes.zarr/2/latent_value/c/0",
        "codes.zarr/4/indptr/c/0",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Any single byte


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """verify() without threads: in thirty thousand calls, starting them is most of the work."""

    class Here:
        def __init__(self, n_threads: int) -> None: ...
        def __enter__(self) -> "Here":
            return self

        def __exit__(self, *error: object) -> None: ...

        map = staticmethod(map)

    monkeypatch.setattr(actcache.store.verification, "ThreadPoolExecutor", Here)


def mutations(data: bytes) -> Iterator[bytes]:
    """Change every byte by a varying value and single bits of every 16th byte; append and remove a byte."""
    changed = bytearray(data)
    values = np.random.default_rng(0).integers(1, 256, len(data)).tolist()
    for position, value in enumerate(values):
        changed[position] ^= value
        yield bytes(changed)
        changed[position] = data[position]
    for position in range(0, len(data), 16):
        for bit in range(8):
            yield data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]
    for position in (position for position, byte in enumerate(data) if byte in b" \n"):  # JSON reads on unmoved
        yield data[:position] + data[position + 1 :]
        yield data[:position] + b" " + data[position:]
    yield from (data[:-1], data[1:], data + b"\0", data + b" ", data + b"\n", b"")


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_no_change_of_any_byte_is_missed(tmp_path: Path, codec: str) -> None:
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    store = memory / f"bytes-{os.getpid()}.acts"
    try:
        write_store(store, make_settings(n_images=17, d_model=2, grid=[1, 2], shard_images=16, codec=codec))
        missed, tried = [], 0
        files = [file for file in store.rglob("*") if file.is_file()]
        for file in files if codec == "raw" else [file for file in files if file.parts[-2].isdigit()]:
            data = file.read_bytes()
            for changed in mutations(data):
                file.write_bytes(changed)
                tried += 1
                try:
                    if verify(store, n_threads=1).ok:
                        missed.append((file.name, changed))
                except PipelineError:
                    pass  # artifact.json itself
            file.write_bytes(data)
        assert missed == []
        assert tried > (10_000 if codec == "raw" else 500)
        assert verify(store).ok
    finally:
        shutil.rmtree(store, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# Readers, progress


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
    beside = (tiny_store / "places.json").stat().st_size  # it is checked at once, and no part of the progress
    assert seen[-1] == (found.n_bytes - beside,) * 2
    assert json.loads((tiny_store / "manifest.json").read_text())["failed"] == {}
