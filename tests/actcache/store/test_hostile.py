"""Stores that were forged or damaged on purpose give correct values or a PipelineError, and never anything else.

Never another exception, never a read outside the store, never a wait without end, never memory for what a file merely
claims to hold. Digests are made right again after each change, so nothing is stopped by a checksum.
"""

import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_store import make_settings, make_values, write_store

from actcache import ActivationStore, ArtifactNotFoundError, PipelineError, describe, verify
from actcache.artifacts import crc32c, digest, file_digest
from actcache.artifacts.files import encode_json
from actcache.artifacts.opening import Parent, artifact_id
from actcache.store.writer import read_statistics

PYTHONPATH = os.pathsep.join(map(str, (Path(__file__).parents[3], Path(__file__).parents[1])))
HOOK = "blocks.3.hook_resid_post"
ARRAYS = f"activations.zarr/{HOOK}"
TRUTH = {"raw": make_values(make_settings())[HOOK][:, :7], "zstd": make_values(make_settings())[HOOK][:, :7]}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small stores by codec. Read-only."""
    folder = tmp_path_factory.mktemp("stores")
    for codec in TRUTH:
        write_store(folder / f"{codec}.acts", make_settings(codec=codec))
    return {codec: folder / f"{codec}.acts" for codec in TRUTH}


@pytest.fixture(params=["raw", "zstd"])
def store(request: pytest.FixtureRequest, tmp_path: Path, stores: dict[str, Path]) -> Path:
    return Path(shutil.copytree(stores[request.param], tmp_path / f"{request.param}.acts"))


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    """An alarm kills a test that hangs."""
    signal.alarm(120)
    yield
    signal.alarm(0)


# ---------------------------------------------------------------------------------------------------------------------
# Everything that reads


def use(path: Path) -> list[str]:
    """Use a store in every possible way. Returns the messages of PipelineErrors, one line each; raises others."""
    errors: list[str] = []

    def attempt(what: Callable[[], object]) -> Any:
        try:
            return what()
        except PipelineError as error:
            errors.append(str(error))
            return None

    attempt(lambda: describe(path))
    found = attempt(lambda: verify(path, n_threads=1))
    if found is not None:
        errors += map(str, found.problems)
    store = attempt(lambda: ActivationStore.open(path))
    if store is not None:
        truth = TRUTH["zstd"]
        for keywords in ({}, {"check": True}, {"images": [0, 39, 17]}, {"images": slice(30, 35), "check": True}):
            got = attempt(lambda k=keywords: store.read(**k))  # type: ignore[misc]
            if got is not None and got.shape == truth[keywords.get("images", slice(None))].shape:
                assert got.dtype in (np.float16, np.float32)
        for tokens in ("all", "cls", "patch"):
            attempt(lambda t=tokens: store.statistics(None, t).mean)  # type: ignore[misc]
        for what in ("images", "failed", "valid", "model_id", "past_cache"):
            attempt(lambda w=what: getattr(store, w))  # type: ignore[misc]
        shape = store.layout.chunk_shape("patches")
        chunk = np.empty(shape if store.layout.chunk_bytes("patches") < 1e6 else (1, 1, 1), store.dtype)
        attempt(lambda: store.read_chunk(None, 0, 0, chunk))
    assert all("\n" not in text for text in errors), errors
    return errors


def reads_right(path: Path) -> bool:
    """Whether everything that is read equals what was written."""
    try:
        store = ActivationStore.open(path)
        return bool(np.array_equal(store.read(), TRUTH["raw"]) and np.array_equal(store.read(check=True), TRUTH["raw"]))
    except PipelineError:
        return False


def sign_all(path: Path) -> None:
    """Make identity, records and manifest consistent again after a change, if possible."""
    artifact = json.loads((path / "artifact.json").read_text())
    parents = {name: Parent(p["id"], p["path"]) for name, p in artifact["parents"].items()}
    artifact["id"] = artifact_id(artifact["kind"], artifact["settings"], parents)
    (path / "artifact.json").write_bytes(encode_json(artifact))
    for file in sorted((path / "commits").glob("*.json")):
        sign(file)
    sign_manifest(path)


def sign(file: Path, change: Callable[[dict[str, Any]], object] = lambda fields: None) -> None:
    fields = json.loads(file.read_text())
    fields.pop("digest", None)
    change(fields)
    file.write_bytes(encode_json({**fields, "digest": digest(fields)}))


def sign_manifest(path: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        for name in manifest["files"]:
            if (path / name).is_file() and not (path / name).is_symlink():
                manifest["files"][name] = file_digest(path / name)

    sign(path / "manifest.json", change)


def sign_shard(path: Path, shard: int, name: str) -> None:
    """Record the present bytes of a shard's file."""
    pieces = json.loads((path / "commits" / f"{shard:06d}.json").read_text())["files"][name]["pieces"]
    data, start, found = (path / name).read_bytes(), 0, []
    for n_bytes, _ in pieces:
        found.append([n_bytes, crc32c(data[start : start + n_bytes])])
        start += n_bytes
    new = {"bytes": len(data), "pieces": found}
    sign(path / "commits" / f"{shard:06d}.json", lambda record: record["files"].update({name: new}))
    sign_manifest(path)


def change_settings(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    artifact = json.loads((path / "artifact.json").read_text())
    change(artifact["settings"])
    (path / "artifact.json").write_text(json.dumps(artifact))
    sign_all(path)


def test_a_path_that_cannot_be_looked_at_is_no_artifact(tmp_path: Path) -> None:
    for path in (tmp_path / ("x" * 300), tmp_path / ("a/" * 3000)):
        with pytest.raises(ArtifactNotFoundError, match=r"cannot be opened .*name too long"):
            verify(path)


def test_a_store_that_was_only_signed_again_is_read(store: Path) -> None:
    sign_all(store)
    assert use(store) == []
    assert reads_right(store)


# ---------------------------------------------------------------------------------------------------------------------
# Settings

ODD = [0, -1, 1, 3, 17, 10**9, 10**18, 2**64, 10**400, 1.5, 1e300, "40", None, True, [], {}, [10**9, 10**9], [2, 3, 1],
       [0, 3], [-2, -3], ["2", "3"]]  # fmt: skip
SIZES = ["n_images", "grid", "d_model", "n_extra", "chunk_images", "shard_images", "dtype", "codec", "hook_points",
         "model_id", "rows_id"]  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_odd_settings_are_an_error_and_cost_nothing(tmp_path: Path, stores: dict[str, Path], name: str) -> None:
    for i, value in enumerate(ODD):
        path = Path(shutil.copytree(stores["raw"], tmp_path / f"{i}.acts"))
        original = make_settings()[name]
        change_settings(path, lambda fields, value=value: fields.update({name: value}))  # type: ignore[misc]
        errors = use(path)
        assert errors or value == original or name in ("model_id", "rows_id", "n_images"), value
        (path / "manifest.json").unlink()  # an unfinished one claims, too
        use(path)


def test_settings_that_lack_a_field_are_an_error(tmp_path: Path, stores: dict[str, Path]) -> None:
    unnoticed = set()
    for name in make_settings():
        path = Path(shutil.copytree(stores["raw"], tmp_path / f"{name}.acts"))
        change_settings(path, lambda fields, name=name: fields.pop(name))  # type: ignore[misc]
        if not use(path):
            unnoticed.add(name)
    assert unnoticed <= {"limit", "patch_size", "preprocess", "seed"}  # what is only shown


def test_claims_of_any_size_are_judged_in_little_memory(tmp_path: Path, stores: dict[str, Path]) -> None:
    """In a process that is limited to 1.5 GB of address space and 30 s."""
    changes: list[dict[str, Any]] = [
        {"n_images": 10**18},
        {"n_images": 10**18, "shard_images": 16 * 10**17},
        {"n_images": 10**18, "shard_images": 16 * 10**17, "chunk_images": 16 * 10**17},
        {"grid": [10**9, 10**9]},
        {"d_model": 10**12},
        {"n_extra": 10**15},
        {"shard_images": 16 * 10**15},
        {"chunk_images": 1, "shard_images": 10**10},
    ]
    paths = []
    for codec in ("raw", "zstd"):
        for i, change in enumerate(changes):
            for sealed in (True, False):
                path = Path(shutil.copytree(stores[codec], tmp_path / f"{codec}-{i}-{sealed}.acts"))
                change_settings(path, lambda fields, change=change: fields.update(change))  # type: ignore[misc]
                if not sealed:
                    (path / "manifest.json").unlink()
                paths.append(str(path))
    done = subprocess.run(
        [sys.executable, __file__, *paths], capture_output=True, text=True, check=False, timeout=100,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[path, True] for path in paths]


def use_in_little_memory(paths: list[str]) -> None:
    import zarr  # noqa: F401

    ActivationStore, verify, describe, pq.read_table  # noqa: B018  loaded before the limit
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 1_000_000_000, now + 1_000_000_000))
    for path in paths:
        signal.alarm(20)
        print(json.dumps([path, bool(use(Path(path)))]), flush=True)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 200_000, f"{(after - before) / 1000} MB"


# ---------------------------------------------------------------------------------------------------------------------
# Shards

BIG = [0, 1, 7, 100, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 16, 2**64 - 2, 2**64 - 1]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.lists(st.tuples(st.integers(0, 7), st.sampled_from(BIG)), min_size=1, max_size=4),
    good_crc=st.booleans(),
    codec=st.sampled_from(["raw", "zstd"]),
)
def test_an_index_that_points_anywhere_never_gives_wrong_values(
    tmp_path_factory: pytest.TempPathFactory, stores: dict[str, Path], entries: Any, good_crc: bool, codec: str
) -> None:
    path = tmp_path_factory.mktemp("index") / "x.acts"
    shutil.copytree(stores[codec], path)
    name = f"{ARRAYS}/patches/c/0/0/0"
    data = (path / name).read_bytes()
    index = list(struct.unpack("<8Q", data[-68:-4]))
    for position, value in entries:
        index[position] = value
    packed = struct.pack("<8Q", *index)
    crc = crc32c(packed).to_bytes(4, "little") if good_crc else data[-4:]
    (path / name).write_bytes(data[:-68] + packed + crc)
    sign_shard(path, 0, name)
    use(path)
    changed = packed != data[-68:-4]
    assert reads_right(path) == (not changed or codec == "raw")  # raw chunks are where the format says
    shutil.rmtree(path.parent)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 15), value=st.integers(0, 255), chunk=st.integers(0, 3))
def test_a_chunk_that_lies_about_its_size_is_an_error(
    tmp_path_factory: pytest.TempPathFactory, stores: dict[str, Path], position: int, value: int, chunk: int
) -> None:
    """The first 16 bytes of a compressed chunk say how large it is and how it was made."""
    path = tmp_path_factory.mktemp("chunk") / "x.acts"
    shutil.copytree(stores["zstd"], path)
    name = f"{ARRAYS}/patches/c/0/0/0"
    data = bytearray((path / name).read_bytes())
    offset = struct.unpack("<8Q", data[-68:-4])[2 * chunk]
    before = data[offset + position]
    data[offset + position] = value
    (path / name).write_bytes(data)
    sign_shard(path, 0, name)
    errors = use(path)
    if position in (*range(4, 8), *range(12, 16)) and value != before:
        assert any("Shard 0" in text and "malformed chunk" in text for text in errors)
    shutil.rmtree(path.parent)


def place(kind: str) -> Callable[[Path, Path], object]:
    """Replace a file by something else."""

    def put(file: Path, outside: Path) -> None:
        if kind == "link":
            shutil.move(file, outside)
            file.symlink_to(outside)
        elif kind == "pipe":
            file.unlink()
            os.mkfifo(file)
        elif kind == "folder":
            file.unlink()
            file.mkdir()
        elif kind == "loop":
            file.unlink()
            file.symlink_to(file)
        else:
            file.unlink()
            file.symlink_to("/dev/zero")

    return put


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "loop", "device"])
@pytest.mark.parametrize(
    "name",
    ["images.parquet", "manifest.json", "artifact.json", "commits/000000.json", "activations.zarr/zarr.json",
     f"{ARRAYS}/patches/zarr.json", f"{ARRAYS}/patches/c/0/0/0", f"{ARRAYS}/cls/c/1/0"],
)  # fmt: skip
def test_what_is_no_plain_file_of_the_store_is_not_read(store: Path, tmp_path: Path, name: str, kind: str) -> None:
    place(kind)(store / name, tmp_path / "outside")
    assert use(store)
    assert not verify_quietly(store)
    if "/c/" in name or name == "images.parquet":
        assert not reads_right(store)


def verify_quietly(path: Path) -> bool:
    try:
        return verify(path).ok
    except PipelineError:
        return False


@pytest.mark.parametrize("name", ["commits", "activations.zarr", ARRAYS, f"{ARRAYS}/patches/c", f"{ARRAYS}/cls/c/1"])
def test_a_linked_folder_is_not_followed(store: Path, tmp_path: Path, name: str) -> None:
    shutil.move(store / name, tmp_path / "outside")
    (store / name).symlink_to(tmp_path / "outside")
    assert use(store)
    with pytest.raises(PipelineError):
        ActivationStore.open(store).read(check=True)


# ---------------------------------------------------------------------------------------------------------------------
# JSON

TEXTS = [
    "[" * 100_000,
    "[" * 100_000 + "]" * 100_000,
    '{"a":' * 100_000 + "1" + "}" * 100_000,
    '{"a":' * 900 + "1" + "}" * 900,
    "1" * 10_000,
    "NaN",
    '{"files": NaN, "digest": 1e999}',
    '{"settings": Infinity, "kind": "acts", "schema": 1, "id": "x", "parents": {}, "provenance": {}}',
    '{"settings": {"n": 1e999}, "kind": "acts", "schema": 1, "id": "x", "parents": {}, "provenance": {}}',
    '{"a": 1, "a": 2}',
    "\ufeff{}",
    "",
    "null",
    "[]",
    '"text"',
    '{"schema": 1e999}',
    '{"schema": 999}',
    '{"schema": 1, "kind": [], "id": {}, "settings": [], "parents": [], "provenance": 5}',
    '{"schema": 1, "kind": "acts", "id": "x", "settings": {}, "parents": {"images": {"id": 1, "path": 2}},'
    ' "provenance": {}}',
    '{"digest": "\ud83d"}',
]


@pytest.mark.parametrize(
    "name", ["artifact.json", "manifest.json", "commits/000000.json", f"{ARRAYS}/patches/zarr.json"]
)
def test_json_of_any_kind_is_an_error(store: Path, name: str) -> None:
    for text in [*TEXTS, b"\xff\xfe{}", b"\x00" * 100, b'{"a": "\xff"}']:
        (store / name).write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        errors = use(store)
        assert errors
        if name.startswith("commits"):
            sign_manifest(store)
            assert use(store)


def test_duplicate_keys_do_not_get_past_the_digest(store: Path) -> None:
    """Of duplicate keys the last one counts for every reader, and the digest covers that one."""
    file = store / "artifact.json"
    file.write_text(file.read_text().replace('"kind":', '"schema": 1, "kind": "run", "kind":', 1))
    sign_manifest(store)
    assert reads_right(store)


NAMES = ["../../etc/passwd", "/etc/passwd", "..", ".", "", "a/../../b", "nul\0", "x" * 5000, "a/" * 2000 + "b",
         "\ud800", "new\nline", "\x1b[31mred", "commits/000000.json", "commits/x.json",
         "commits/" + "9" * 4400 + ".json", "manifest.json", "activations.zarr", "C:\\x", "//x", "./x"]  # fmt: skip


@pytest.mark.parametrize("where", ["commits/000000.json", "manifest.json"])
@pytest.mark.parametrize("value", ["digest", None, {"bytes": 10**30, "pieces": [[10**30, 0]]}, {"bytes": "1"}, [], 5])
def test_names_and_digests_of_any_kind_are_problems(store: Path, where: str, value: Any) -> None:
    for name in NAMES:
        data = (store / where).read_bytes()
        entry = {"bytes": 0, "pieces": []} if value == "digest" else value

        def change(fields: dict[str, Any], name: str = name, entry: Any = entry) -> None:
            fields["files"][name] = entry

        sign(store / where, change)
        if where != "manifest.json":
            sign_manifest(store)
        errors = use(store)
        assert errors, name
        assert all(text.isprintable() for text in errors if "is a name" in text)
        (store / where).write_bytes(data)
        sign_manifest(store)


def of_both(statistics: Any) -> dict[str, Any]:
    return {HOOK: {"cls": statistics, "patch": statistics}}


MANIFESTS: list[dict[str, Any]] = [
    {"failed": []},
    {"failed": {"x": "y"}},
    {"failed": {"-1": "y"}},
    {"failed": {str(10**18): "y"}},
    {"failed": {"9" * 5000: "y"}},
    {"failed": None},
    {"files": None},
    {"files": []},
    {"files": {"a": 1}},
    {"statistics": None},
    {"statistics": {}},
    {"statistics": {HOOK: {"cls": {}, "patch": {}}}},
    {"statistics": of_both({"count": "many", "sum": "?", "sum_squares": [[]], "absmax": []})},
    {"statistics": of_both({"count": 1, "sum": [1], "sum_squares": [1], "absmax": 1})},
    {"statistics": of_both({"count": 1, "sum": [10**400] * 4, "sum_squares": [1] * 4, "absmax": 1})},
]


@pytest.mark.parametrize("number", range(len(MANIFESTS)))
def test_a_signed_manifest_of_any_content_is_an_error(store: Path, number: int) -> None:
    sign(store / "manifest.json", lambda manifest: manifest.update(MANIFESTS[number]))
    assert use(store)
    for name in MANIFESTS[number]:
        sign(store / "manifest.json", lambda manifest, name=name: manifest.pop(name))  # type: ignore[misc]
    assert use(store)


RECORDS: list[dict[str, Any]] = [
    {"files": {}},
    {"files": None},
    {"files": {f"{ARRAYS}/patches/c/0/0/0": None, f"{ARRAYS}/cls/c/0/0": {"bytes": 4, "pieces": []}}},
    {"files": {f"{ARRAYS}/patches/c/0/0/0": {"bytes": 1604, "pieces": [[1604, 0]]}}},
    {"shard": 1},
    {"shard": "0"},
    {"images": [0, 10**18]},
    {"images": None},
]


@pytest.mark.parametrize("number", range(len(RECORDS)))
def test_a_signed_record_of_any_content_is_an_error(store: Path, number: int) -> None:
    sign(store / "commits" / "000000.json", lambda record: record.update(RECORDS[number]))
    sign_manifest(store)
    assert use(store)


@pytest.mark.parametrize("where", ["x" * 300, "/", "../" * 3000, "\n", "file:///etc", "nothing://x", "\ud800"])
def test_a_parent_may_be_said_to_lie_anywhere(store: Path, where: str) -> None:
    artifact = json.loads((store / "artifact.json").read_text())
    artifact["parents"]["images"]["path"] = where
    (store / "artifact.json").write_text(json.dumps(artifact))
    sign_all(store)
    assert reads_right(store)
    use(store)


# ---------------------------------------------------------------------------------------------------------------------
# zarr metadata, the image table


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shape", [40, 6, 5]),
        ("shape", [10**18, 6, 4]),
        ("shape", []),
        ("data_type", "float32"),
        ("data_type", "object"),
        ("fill_value", 1.0),
        ("node_type", "group"),
        ("zarr_format", 2),
        ("codecs", [{"name": "bytes", "configuration": {"endian": "big"}}]),
        ("codecs", [{"name": "gzip", "configuration": {"level": 1}}]),
        ("codecs", []),
        ("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [1, 1, 1]}}),
        ("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [10**12, 6, 4]}}),
        ("chunk_key_encoding", {"name": "default", "configuration": {"separator": "."}}),
        ("storage_transformers", [{"name": "?"}]),
    ],
)
def test_zarr_metadata_that_claims_something_else_is_an_error_or_unused(store: Path, field: str, value: Any) -> None:
    file = store / ARRAYS / "patches" / "zarr.json"
    metadata = json.loads(file.read_text())
    file.write_text(json.dumps({**metadata, field: value}))
    sign_manifest(store)
    use(store)
    assert reads_right(store) == (store.name == "raw.acts")  # raw shards are read without zarr


def test_the_endianness_inside_a_shard_counts(store: Path) -> None:
    file = store / ARRAYS / "patches" / "zarr.json"
    file.write_text(file.read_text().replace('"little"', '"big"'))
    sign_manifest(store)
    assert reads_right(store) == (store.name == "raw.acts")


@pytest.mark.parametrize("n_rows", [0, 39, 41, 400])
def test_an_image_table_of_another_length_is_an_error(store: Path, n_rows: int) -> None:
    table = pq.read_table(store / "images.parquet")
    rows = pa.array([i % 40 for i in range(n_rows)], pa.int64())
    pq.write_table(table.take(rows), store / "images.parquet")
    sign_manifest(store)
    assert any(f"has {n_rows} rows, expected 40" in text for text in use(store))


# ---------------------------------------------------------------------------------------------------------------------
# Anything


@pytest.mark.slow
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    codec=st.sampled_from(["raw", "zstd"]),
    name=st.sampled_from(
        ["artifact.json", "manifest.json", "images.parquet", "commits/000000.json", "activations.zarr/zarr.json",
         f"{ARRAYS}/patches/zarr.json"]
    ),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=4), st.integers(0, 4)), min_size=1,
                   max_size=4),
    signed=st.booleans(),
)  # fmt: skip
def test_random_bytes_in_any_metadata_are_an_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, stores: dict[str, Path], codec: str, name: str, edits: Any, signed: bool
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.acts"
    shutil.copytree(stores[codec], path)
    data = (path / name).read_bytes()
    for where, new, n_removed in edits:
        position = int(where * len(data))
        data = data[:position] + new + data[position + n_removed :]
    (path / name).write_bytes(data)
    if signed:
        try:
            if name in ("artifact.json", "commits/000000.json"):
                sign_all(path)
            elif name == "manifest.json":
                sign(path / name)
            else:
                sign_manifest(path)
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # beyond signing
    use(path)
    shutil.rmtree(path.parent)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_values_in_signed_json_are_an_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, stores: dict[str, Path], data: st.DataObject
) -> None:
    """Any value in a JSON file is replaced by one of another kind, and everything is signed again."""
    path = tmp_path_factory.mktemp("values") / "x.acts"
    shutil.copytree(stores[data.draw(st.sampled_from(["raw", "zstd"]))], path)
    name = data.draw(st.sampled_from(["artifact.json", "manifest.json", "commits/000001.json"]))
    fields = json.loads((path / name).read_text())
    parent, key = data.draw(st.sampled_from(list(places(fields))))
    odd = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False),
                    st.text(max_size=5), st.just([]), st.just({}), st.just(10**30), st.just("x" * 300))  # fmt: skip
    parent[key] = data.draw(odd)
    (path / name).write_text(json.dumps(fields))
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        sign_all(path)
    use(path)
    shutil.rmtree(path.parent)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in items:
        yield value, key
        yield from places(member)


def test_result_are_still_understood(stores: dict[str, Path]) -> None:
    record = json.loads((stores["raw"] / "commits" / "000000.json").read_text())
    assert read_statistics(record)[HOOK]["cls"].count == 32


if __name__ == "__main__":
    use_in_little_memory(sys.argv[1:])
