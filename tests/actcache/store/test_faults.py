"""Whatever happens to a writer, and whenever: the same command again ends with the same bytes, and verify() proves it.

At every step of the writer: kills, failing system calls, a second writer. Then other clocks and torn files.
"""

import errno
import itertools
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_store import Values, Writers, all_bytes, make_settings, make_values, watched_calls, write_store

from actcache import (
    ActivationStore,
    ArtifactNotFoundError,
    HookPoint,
    IncompleteError,
    PipelineError,
    StorageError,
    verify,
)
from actcache.artifacts import missing_shards
from actcache.artifacts.litter import temporary_path
from actcache.store import ChannelStatistics

FIELDS = make_settings()  # two shards, the second one short
SHARDS = [
    f"activations.zarr/blocks.3.hook_resid_post/{name}" for name in ("patches/c/0/0/0", "patches/c/1/0/0", "cls/c/0/0")
]


@pytest.fixture(scope="module")
def writers() -> Iterator[Writers]:
    forked = Writers()
    yield forked
    forked.close()


@pytest.fixture
def tmp_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """In memory if possible: thousands of stores are written, and none has to last."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setattr(os, "fsync", lambda fd: None)
        (Path(folder) / "stores").mkdir()
        yield Path(folder) / "stores"


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of an undisturbed store."""
    return uninterrupted(tmp_path_factory.mktemp("whole"), FIELDS)


def uninterrupted(folder: Path, fields: dict[str, Any]) -> dict[str, bytes]:
    write_store(folder / "x.acts", fields)
    return all_bytes(folder / "x.acts")


def count_steps(folder: Path, fields: dict[str, Any]) -> int:
    steps = []
    with watched_calls(lambda n, name: steps.append(name)):
        write_store(folder / "counted.acts", fields)
    shutil.rmtree(folder / "counted.acts")
    assert {"pwrite", "write", "open", "link", "replace", "unlink", "mkdir", "fsync"} <= set(steps)
    return len(steps)


def assert_refused_or_whole(path: Path, fields: dict[str, Any], values: Values) -> int:
    """An unfinished store is never read. Returns the number of missing shards (all plus one without a store)."""
    try:
        opened = ActivationStore.open(path)
    except ArtifactNotFoundError:
        return 3
    except IncompleteError:
        found = verify(path)
        assert (found.complete, found.problems) == (False, ())
        return len(missing_shards(path, 2))
    for hook, x in values.items():
        np.testing.assert_array_equal(opened.read(HookPoint.parse(hook), check=True), x[:, : opened.n_tokens])
    assert verify(path).ok
    return 0


def assert_consistent(path: Path) -> dict[str, np.ndarray]:
    """Check that the store is complete and its statistics match its values. Returns its contents."""
    assert verify(path).ok
    store = ActivationStore.open(path)
    values = {}
    for hook in store.hook_points:
        values[str(hook)] = store.read(hook, check=True)
        parts = {"cls": values[str(hook)][store.valid, :1], "patch": values[str(hook)][store.valid, 1:]}
        for kind, x in parts.items():
            truth, found = ChannelStatistics.of(x.reshape(-1, store.layout.d_model)), store.statistics(hook, kind)  # type: ignore[arg-type]
            assert (truth.count, truth.absmax) == (found.count, found.absmax)
            np.testing.assert_allclose(found.sum, truth.sum, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(found.sum_squares, truth.sum_squares, rtol=1e-12)
    return values


# ---------------------------------------------------------------------------------------------------------------------
# Killed


def test_killed_at_any_step_and_repeated_it_ends_with_the_same_bytes(
    tmp_path: Path, writers: Writers, expected: dict[str, bytes]
) -> None:
    n_missing = []
    for step in itertools.count(1):
        path = tmp_path / f"{step}.acts"
        if writers.run(path, FIELDS, at=step):
            break
        n_missing.append(assert_refused_or_whole(path, FIELDS, make_values(FIELDS)))
        write_store(path, FIELDS)
        assert all_bytes(path) == expected, f"killed at step {step}"
    assert len(n_missing) > 80
    assert n_missing == sorted(n_missing, reverse=True)  # later is never less
    assert set(n_missing) == {3, 2, 1, 0}


@st.composite
def stores(draw: st.DrawFn) -> dict[str, Any]:
    return make_settings(
        n_images=draw(st.integers(1, 70)),
        codec=draw(st.sampled_from(["raw", "zstd"])),
        hook_points=[f"blocks.{layer}.hook_resid_post" for layer in range(draw(st.integers(1, 3)))],
        n_extra=draw(st.sampled_from([0, 0, 2])),
        shard_images=draw(st.sampled_from([16, 32])),
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=stores(), steps=st.lists(st.integers(1, 250), min_size=1, max_size=6))
def test_killed_again_and_again_it_ends_with_the_same_bytes(
    tmp_path: Path, writers: Writers, fields: dict[str, Any], steps: list[int]
) -> None:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    expected = uninterrupted(folder, fields)
    for step in steps:
        if writers.run(folder / "y.acts", fields, at=step):
            break
        assert_refused_or_whole(folder / "y.acts", fields, make_values(fields))
    write_store(folder / "y.acts", fields)
    assert all_bytes(folder / "y.acts") == expected
    shutil.rmtree(folder)


def test_a_temporary_name_that_is_linked_to_a_committed_file_is_not_written_to(
    tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """Leftovers of a process with our number that was killed between linking a file and unlinking its other name."""
    path = tmp_path / "x.acts"
    write_store(path, FIELDS, n_shards=0)
    for name in (*SHARDS, "commits/000000.json"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        temporary_path(path / name).write_bytes(b"committed")
        os.link(temporary_path(path / name), tmp_path / name.replace("/", "-"))
    write_store(path, FIELDS, tidy=False)
    assert all_bytes(path) == expected
    assert {file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == {b"committed"}


def test_all_that_a_record_speaks_of_is_flushed_before_the_record_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What survives a power cut: flushed contents under flushed names."""
    unsafe: set[str] = set()  # contents and names that a power cut would take
    at_record: list[set[str]] = []
    plain = {name: getattr(os, name) for name in ("pwrite", "link", "mkdir")}
    path = tmp_path / "x.acts"

    def fsync(fd: int) -> None:
        flushed = os.readlink(f"/proc/self/fd/{fd}")
        entries = {name for name in unsafe if name.endswith("/") and os.path.dirname(name[:-1]) == flushed}
        unsafe.difference_update({flushed, *entries})

    def pwrite(fd: int, data: Any, offset: int) -> int:
        unsafe.add(os.readlink(f"/proc/self/fd/{fd}"))
        return int(plain["pwrite"](fd, data, offset))

    def link(source: Any, target: Any) -> None:
        if Path(target).parent.name == "commits":
            at_record.append({name for name in unsafe if name.startswith(f"{path}/") and not name.endswith(".tmp")})
        plain["link"](source, target)
        unsafe.add(f"{target}/")
        if str(source) in unsafe:
            unsafe.add(str(target))

    def mkdir(path: Any, *args: Any, **kwargs: Any) -> None:
        plain["mkdir"](path, *args, **kwargs)
        unsafe.add(f"{path}/")

    write_store(path, FIELDS, n_shards=0)
    for function in (fsync, pwrite, link, mkdir):
        monkeypatch.setattr(os, function.__name__, function)
    write_store(path, FIELDS)
    monkeypatch.undo()
    assert at_record == [set(), set()]


# ---------------------------------------------------------------------------------------------------------------------
# A disk that fails


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_an_error_at_any_step_is_one_line_and_the_same_command_resumes(
    tmp_path: Path, expected: dict[str, bytes], code: int
) -> None:
    messages = []
    for step in range(1, count_steps(tmp_path, FIELDS) + 1):
        path = tmp_path / f"{step}.acts"

        def fail(n: int, name: str, at: int = step) -> None:
            if n == at:
                raise OSError(code, os.strerror(code))

        with watched_calls(fail):
            try:
                write_store(path, FIELDS)
            except StorageError as error:
                messages.append(str(error))
            else:  # what could not be tidied up is litter, and no harm
                assert_consistent(path)
        assert_refused_or_whole(path, FIELDS, make_values(FIELDS))
        write_store(path, FIELDS)
        assert all_bytes(path) == expected, f"{os.strerror(code)} at step {step}"
        shutil.rmtree(path)
    assert list(tmp_path.iterdir()) == []
    assert len(messages) > 60
    pattern = re.compile(
        rf"{tmp_path}/\d+\.acts.* cannot be written: {os.strerror(code)}\. .*run the same command again.*"
    )
    assert [text for text in messages if not pattern.fullmatch(text)] == []


def test_a_disk_that_stays_full_commits_nothing(tmp_path: Path, expected: dict[str, bytes]) -> None:
    path = tmp_path / "x.acts"
    write_store(path, FIELDS, n_shards=0)
    empty = all_bytes(path)

    def full(n: int, name: str) -> None:
        if name in ("pwrite", "write", "link", "replace"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for _ in range(3):
        with watched_calls(full), pytest.raises(StorageError, match=r"x\.acts .*No space left.*Free space"):
            write_store(path, FIELDS)
        assert all_bytes(path) == empty
    write_store(path, FIELDS)
    assert all_bytes(path) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Files that are there already: the first writer wins


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("kept", [("patches",), ("cls",), ("patches", "cls")])
def test_files_without_a_record_are_described_as_they_are(tmp_path: Path, codec: str, kept: tuple[str, ...]) -> None:
    """A writer that died between file and record, on a machine that computes different low bits."""
    fields = make_settings(codec=codec)
    path, failed = tmp_path / "x.acts", {3: "truncated", 35: "no image"}
    write_store(path, fields, low_bits=1, failed=failed)
    before = all_bytes(path)
    for name in ("manifest.json", "commits/000000.json", "commits/000001.json"):
        (path / name).unlink()
    for array in {"patches", "cls"} - set(kept):
        shutil.rmtree(path / "activations.zarr" / "blocks.3.hook_resid_post" / array / "c")
    write_store(path, fields, failed=failed)
    got = assert_consistent(path)["blocks.3.hook_resid_post"]
    after = all_bytes(path)
    for name in before:
        if "/c/" in name and name.split("/")[-4 if "patches" in name else -3] in kept:
            assert after[name] == before[name]
    truth = {bits: shifted(fields, bits, failed) for bits in (0, 1)}
    np.testing.assert_array_equal(got[:, 1:], truth["patches" in kept][:, 1:])
    np.testing.assert_array_equal(got[:, :1], truth["cls" in kept][:, :1])
    assert ActivationStore.open(path).failed == failed


def shifted(fields: dict[str, Any], low_bits: int, failed: Any = ()) -> np.ndarray:
    x = make_values(fields)["blocks.3.hook_resid_post"]
    x.view(np.uint16)[...] += low_bits
    x[list(failed)] = 0
    return x[:, :7]


def test_an_image_that_only_the_dead_writer_could_not_read_stays_marked(tmp_path: Path) -> None:
    """A failed image has rows of zeros on disk; a second writer that can read it must not use them as activations."""
    path = tmp_path / "x.acts"
    write_store(path, FIELDS, failed={3: "timed out"})
    for name in ("manifest.json", "commits/000000.json"):
        (path / name).unlink()
    write_store(path, FIELDS, failed={5: "timed out"})
    store = ActivationStore.open(path)
    assert list(store.failed) == [3]
    assert not store.read(images=[3]).any()
    assert_consistent(path)


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("how", ["empty", "cut", "flipped index", "link", "other shape"])
def test_a_torn_file_without_a_record_is_never_recorded(tmp_path: Path, codec: str, how: str) -> None:
    path, fields = tmp_path / "x.acts", make_settings(codec=codec)
    write_store(path, fields)
    for name in ("manifest.json", "commits/000000.json"):
        (path / name).unlink()
    file = path / SHARDS[0]
    data = file.read_bytes()
    if how == "link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    elif how == "other shape":
        file.write_bytes((path / SHARDS[1]).read_bytes())
    else:
        torn = {"empty": b"", "cut": data[:-7], "flipped index": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]}
        file.write_bytes(torn[how])
    with pytest.raises(StorageError, match=r"patches/c/0/0/0 .*not complete. Remove it and run the command again"):
        write_store(path, fields)
    assert missing_shards(path, 2) == [0]
    file.unlink()
    write_store(path, fields)
    assert_consistent(path)


# ---------------------------------------------------------------------------------------------------------------------
# Two writers at once


@pytest.mark.slow
@pytest.mark.parametrize("low_bits", [0, 1])
def test_two_writers_of_the_same_shards_end_with_one_whole_store(
    tmp_path: Path, writers: Writers, expected: dict[str, bytes], low_bits: int
) -> None:
    """One writer is stopped before its n-th call, for every n, while the other finishes; then the first continues."""
    choices, truths = set(), (shifted(FIELDS, 1), shifted(FIELDS, 0))
    for step in itertools.count(1):
        path = tmp_path / f"{step}.acts"
        if writers.run(path, FIELDS, at=step, how="SIGSTOP", low_bits=low_bits):
            break
        write_store(path, FIELDS)
        sealed = all_bytes(path)
        writers.go_on()
        after = {name: data for name, data in all_bytes(path).items() if not name.endswith(".tmp")}
        assert after == {name: data for name, data in sealed.items() if not name.endswith(".tmp")}, step
        if low_bits == 0:
            assert after == expected
            continue
        got = assert_consistent(path)["blocks.3.hook_resid_post"]
        for images, part in itertools.product((slice(0, 32), slice(32, 40)), (slice(0, 1), slice(1, 7))):
            theirs, ours = (np.array_equal(got[images, part], truth[images, part]) for truth in truths)
            assert theirs != ours
            choices.add(theirs)
    assert step > 80
    assert not low_bits or choices == {True, False}


# ---------------------------------------------------------------------------------------------------------------------
# Clocks


@pytest.mark.parametrize("when", [0, 4_000_000_000])
def test_no_clock_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes], when: int
) -> None:
    path = tmp_path / "x.acts"
    write_store(path, FIELDS, n_shards=1)
    for file in [path, *path.rglob("*")]:
        os.utime(file, (when, when))
    clock = itertools.count(when, -1000)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    kept = {name: (path / name).stat().st_mtime for name in ("artifact.json", "images.parquet", SHARDS[0])}
    write_store(path, FIELDS)
    assert all_bytes(path) == expected
    assert {name: (path / name).stat().st_mtime for name in kept} == kept == dict.fromkeys(kept, when)
    for file in [path, *path.rglob("*")]:
        os.utime(file, (when, when))
    assert_consistent(path)


# ---------------------------------------------------------------------------------------------------------------------
# What never changes, torn before the seal


def torn(data: bytes) -> Iterator[bytes]:
    """Truncate at every 97th byte, and flip every 89th byte."""
    for end in range(0, len(data), 97):
        yield data[:end]
    for position in range(0, len(data), 89):
        yield data[:position] + bytes([data[position] ^ 0x41]) + data[position + 1 :]


@pytest.mark.parametrize("name", ["images.parquet", "activations.zarr/zarr.json", SHARDS[0][:-8] + "/zarr.json"])
def test_a_torn_table_or_metadata_is_written_again_before_it_is_sealed(
    tmp_path: Path, expected: dict[str, bytes], name: str
) -> None:
    template = tmp_path / "template.acts"
    write_store(template, FIELDS, n_shards=1)
    n_restored = 0
    for data in [None, *torn((template / name).read_bytes())]:
        path = tmp_path / "x.acts"
        shutil.copytree(template, path)
        (path / name).unlink()
        if data is not None:
            (path / name).write_bytes(data)
        write_store(path, FIELDS)
        assert_consistent(path)
        assert ActivationStore.open(path).images["uri"].to_pylist() == [f"{i}.png" for i in range(40)]
        n_restored += all_bytes(path)[name] == expected[name]
        shutil.rmtree(path)
    assert n_restored > 10


def test_a_torn_table_is_an_error_for_every_reader(tmp_path: Path) -> None:
    path = tmp_path / "x.acts"
    write_store(path, FIELDS)
    file, messages = path / "images.parquet", set()
    for sealed in (True, False):
        if not sealed:
            (path / "manifest.json").unlink()
        data = file.read_bytes()
        for damaged in torn(data):
            file.write_bytes(damaged)
            if sealed:
                assert not verify(path, n_threads=1).ok
                try:
                    store = ActivationStore.open(path)
                    assert store.images.num_rows == 40
                    np.testing.assert_array_equal(store.read(), shifted(FIELDS, 0))
                except PipelineError as error:
                    messages.add(str(error))
            elif len(damaged) < len(data):
                assert [problem.file for problem in verify(path, n_threads=1).problems] == ["images.parquet"]
        file.write_bytes(data)
    assert len(messages) > 5
    assert all("images.parquet" in text and "--repair" in text and "\n" not in text for text in messages)


def test_an_incomplete_store_is_checked_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "x.acts"
    write_store(path, FIELDS, n_shards=1)
    damages: list[tuple[str, Callable[[Path], object]]] = [
        (SHARDS[0], lambda file: file.write_bytes(file.read_bytes()[:-1] + b"?")),
        ("commits/000000.json", lambda file: file.write_bytes(file.read_bytes() + b" ")),
        ("images.parquet", Path.unlink),
    ]
    for name, damage in damages:
        data = (path / name).read_bytes()
        damage(path / name)
        assert [problem.file for problem in verify(path).problems] == [name]
        (path / name).write_bytes(data)
    assert verify(path).problems == ()
