"""Who may write an output, what becomes of what is there, and what a dead writer leaves."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actcache import PipelineError, SettingsError, StorageError, describe, verify
from actcache.artifacts import Artifact, OutputLock, begin_artifact, open_artifact, seal_artifact, write_record
from actcache.artifacts import litter as litter_module
from actcache.artifacts.files import build_folder, write_output
from actcache.artifacts.litter import GRACE_S, is_litter, remove_litter
from actcache.artifacts.processes import machine, started_at

NO_PROCESS = 4194305  # above the largest number of a process


def begin(path: Path, *, k: int = 3, overwrite: bool = False, shared: bool = False, **parents: Path) -> Artifact:
    with OutputLock(path, shared=shared) as lock:
        return begin_artifact(
            path, "run", settings={"k": k}, parents={name: ("abc", where) for name, where in parents.items()},
            provenance={}, overwrite=overwrite, lock=lock,
        )  # fmt: skip


def in_process(work: Callable[..., None], *args: Any) -> Any:
    process = multiprocessing.get_context("fork").Process(target=work, args=args)
    process.start()
    return process


def hold(path: Path, shared: bool, ready: Any) -> None:
    lock = OutputLock(path, shared=shared)
    lock.acquire()
    ready.set()
    time.sleep(60)


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """A function that starts a process which holds the lock of tmp_path / "a"."""
    started = []

    def start(*, shared: bool = False) -> Any:
        ready = multiprocessing.get_context("fork").Event()
        started.append(in_process(hold, tmp_path / "a", shared, ready))
        assert ready.wait(20)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


# ---------------------------------------------------------------------------------------------------------------------
# Locks


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_who_meets_the_lock_is_told_the_holder_and_changes_nothing(
    tmp_path: Path, holder: Any, overwrite: bool, there: bool
) -> None:
    if there:
        begin(tmp_path / "a")
    process = holder()
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(SettingsError, match=f"a is being written by process {process.pid} on .+, which started at "):
        begin(tmp_path / "a", k=5, overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == before
    assert not there or open_artifact(tmp_path / "a").settings == {"k": 3}


@pytest.mark.parametrize("shared", [False, True])
def test_the_lock_of_a_killed_holder_is_taken_over(tmp_path: Path, holder: Any, shared: bool) -> None:
    process = holder(shared=shared)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / ".a.lock").exists()
    begin(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]


def test_workers_share_a_lock_and_keep_others_out(tmp_path: Path, holder: Any) -> None:
    begin(tmp_path / "a", shared=True)
    holder(shared=True)
    assert begin(tmp_path / "a", shared=True).settings == {"k": 3}
    with pytest.raises(SettingsError, match="is being written by process"):
        begin(tmp_path / "a")


def test_a_complete_artifact_is_opened_while_somebody_holds_the_lock(tmp_path: Path, holder: Any) -> None:
    begin(tmp_path / "a")
    seal_artifact(tmp_path / "a")
    holder()
    assert begin(tmp_path / "a").complete


def test_two_names_of_one_output_have_one_lock(tmp_path: Path, holder: Any) -> None:
    (tmp_path / "b").symlink_to(tmp_path / "a")
    holder()
    for name in ("b", "b/../a", "c/../a"):
        (tmp_path / "c").mkdir(exist_ok=True)
        with pytest.raises(SettingsError, match="is being written"):
            begin(tmp_path / name)


def work_together(path: Path, number: int) -> None:
    with OutputLock(path, shared=True) as lock:
        artifact = begin_artifact(
            path, "run", settings={"k": 7}, parents={}, provenance={}, lock=lock,
            prepare=lambda folder: (folder / "by").write_text(str(number)) and None,
        )  # fmt: skip
        write_record(artifact.path, number, {"files": {}})


@pytest.mark.parametrize("round_", range(3))
def test_workers_that_start_at_once_replace_a_stub_once(tmp_path: Path, round_: int) -> None:
    begin(tmp_path / "a", k=round_)
    workers = [in_process(work_together, tmp_path / "a", number) for number in range(6)]
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 6
    assert len(os.listdir(tmp_path / "a" / "commits")) == 6
    assert os.listdir(tmp_path) == ["a"]


def test_without_locks_of_the_file_system_the_file_decides(
    tmp_path: Path, holder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actcache.artifacts.locks.lock_file", lambda fd, exclusive: None)
    process = holder()
    with pytest.raises(SettingsError, match=f"process {process.pid} "):
        begin(tmp_path / "a")
    process.kill()
    process.join()
    begin(tmp_path / "a")
    recycled = {"process": 1, "machine": machine(), "started_s": 5, "host": "here", "started": "long ago"}
    (tmp_path / ".b.lock").write_text(json.dumps(recycled))
    begin(tmp_path / "b")
    elsewhere = {**recycled, "machine": "00000000", "host": "there"}
    (tmp_path / ".c.lock").write_text(json.dumps(elsewhere))
    with pytest.raises(SettingsError, match="process 1 on there"):
        begin(tmp_path / "c")


# ---------------------------------------------------------------------------------------------------------------------
# What is there


def test_a_stub_is_replaced_by_a_corrected_command(tmp_path: Path) -> None:
    for k in (3, 4, 5):
        assert begin(tmp_path / "a", k=k).settings == {"k": k}
    write_record(tmp_path / "a", 0, {"files": {}})
    with pytest.raises(SettingsError, match="k: 5 there, 6 asked for"):
        begin(tmp_path / "a", k=6)


@pytest.mark.parametrize(
    "finished",
    [
        "commits/000000.json",
        "checkpoints/step-00000001.json",
        "checkpoint.safetensors",
        "manifest.json",
        "notes/own.json",
    ],
)
def test_what_would_be_lost_is_not_a_stub(tmp_path: Path, finished: str) -> None:
    begin(tmp_path / "a")
    (tmp_path / "a" / finished).parent.mkdir(exist_ok=True)
    (tmp_path / "a" / finished).write_text("{}")
    with pytest.raises(SettingsError, match="made with other settings"):
        begin(tmp_path / "a", k=4)
    assert (tmp_path / "a" / finished).exists()


@pytest.mark.parametrize("names", [("commits",), ("commits", "codes.zarr"), ("images.parquet", "activations.zarr")])
@pytest.mark.parametrize("overwrite", [False, True])
def test_remains_without_an_artifact_file_are_taken_over(
    tmp_path: Path, names: tuple[str, ...], overwrite: bool
) -> None:
    for name in names:
        (tmp_path / "a" / name).mkdir(parents=True)
    assert begin(tmp_path / "a", overwrite=overwrite).settings == {"k": 3}
    assert sorted(name for name in os.listdir(tmp_path / "a") if not name.startswith(".")) == [
        "artifact.json",
        "commits",
        "places.json",
    ]


@pytest.mark.parametrize("foreign", ["thesis.tex", "notes/own.json", "sub/artifact.json"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_somebody_elses_folder_is_left_alone(tmp_path: Path, foreign: str, overwrite: bool) -> None:
    (tmp_path / "a" / "commits").mkdir(parents=True)
    (tmp_path / "a" / foreign).parent.mkdir(exist_ok=True)
    (tmp_path / "a" / foreign).write_text("precious")
    with pytest.raises(FileNotFoundError, match=r"has no artifact\.json"):
        begin(tmp_path / "a", overwrite=overwrite)
    assert (tmp_path / "a" / foreign).read_text() == "precious"


def test_what_was_sealed_and_lost_its_artifact_file_needs_overwrite(tmp_path: Path) -> None:
    begin(tmp_path / "a")
    seal_artifact(tmp_path / "a")
    (tmp_path / "a" / "artifact.json").unlink()
    with pytest.raises(PipelineError, match=r"has no artifact\.json"):
        begin(tmp_path / "a")
    assert not begin(tmp_path / "a", overwrite=True).complete


def test_an_interrupted_overwrite_resumes_and_a_finished_one_starts_again(tmp_path: Path) -> None:
    begin(tmp_path / "a")
    seal_artifact(tmp_path / "a")
    begin(tmp_path / "a", overwrite=True)
    write_record(tmp_path / "a", 0, {"files": {}})
    begin(tmp_path / "a", overwrite=True)
    assert (tmp_path / "a" / "commits" / "000000.json").exists()
    seal_artifact(tmp_path / "a")
    assert verify(tmp_path / "a").ok
    assert not list((tmp_path / "a").glob("*.tmp"))
    begin(tmp_path / "a", overwrite=True)
    assert not (tmp_path / "a" / "commits" / "000000.json").exists()


def test_an_interrupted_overwrite_that_is_damaged_can_be_begun_again(tmp_path: Path) -> None:
    begin(tmp_path / "a", overwrite=True)
    write_record(tmp_path / "a", 0, {"files": {}})
    (tmp_path / "a" / "commits" / "000000.json").write_text("{")
    begin(tmp_path / "a", overwrite=True)
    assert not (tmp_path / "a" / "commits" / "000000.json").exists()


def test_overwriting_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    begin(tmp_path / "a")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    begin(tmp_path / "b", k=9, overwrite=True)
    assert (tmp_path / "b").is_symlink()
    assert open_artifact(tmp_path / "a").settings == {"k": 9}


def test_the_old_artifact_stays_when_the_new_one_cannot_be_begun(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    begin(tmp_path / "a")
    seal_artifact(tmp_path / "a")
    with pytest.raises(StorageError, match=r"/a cannot be written: No space left on device\. Free space"):
        begin_artifact(tmp_path / "a", "run", settings={}, parents={}, provenance={}, prepare=fail, overwrite=True)
    assert verify(tmp_path / "a").ok
    assert os.listdir(tmp_path) == ["a"]


# ---------------------------------------------------------------------------------------------------------------------
# Places


@pytest.mark.parametrize("inside", ["parent/a", "parent/deep/a", "link/a", "other/../parent/a", "parent"])
def test_an_output_does_not_lie_inside_its_parent(tmp_path: Path, inside: str) -> None:
    (tmp_path / "parent").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "parent")
    before = sorted(tmp_path.rglob("*"))
    for parent in ("parent", "link", "other/../parent"):
        with pytest.raises(SettingsError, match=r"(lies inside|would be made from)"):
            begin(tmp_path / inside, store=tmp_path / parent)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_parent_does_not_lie_inside_the_output(tmp_path: Path) -> None:
    (tmp_path / "a" / "parent").mkdir(parents=True)
    with pytest.raises(SettingsError, match=r"contains .*parent, which it is made from"):
        begin(tmp_path / "a", store=tmp_path / "a" / "parent", overwrite=True)
    assert os.listdir(tmp_path / "a") == ["parent"]


@pytest.mark.parametrize("inside", ["a/b", "a/commits/b", "link/b", "a/notes/../b"])
def test_nothing_is_written_inside_an_artifact_but_notes(tmp_path: Path, inside: str) -> None:
    begin(tmp_path / "a")
    seal_artifact(tmp_path / "a")
    (tmp_path / "a" / "notes").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for write in (begin, lambda path: write_output(path, b"x")):
        with pytest.raises(SettingsError, match="lies inside the artifact"):
            write(tmp_path / inside)
    write_output(tmp_path / "a" / "notes" / "page.html", b"x")
    assert verify(tmp_path / "a").ok


# ---------------------------------------------------------------------------------------------------------------------
# Litter


def leave(path: Path, process: int, host: str, age_s: float = 0) -> Path:
    """A temporary file or folder as a writer leaves it."""
    name = f".{path.name}.{host}-{process}.tmp" if host else f".{path.name}.{process}.tmp"
    left = path.with_name(name)
    if path.suffix == ".folder":
        (left / "inside").mkdir(parents=True)
    else:
        left.write_bytes(b"half")
    os.utime(left, (time.time() - age_s, time.time() - age_s))
    return left


@pytest.mark.parametrize("name", ["a", "a.old", "a/manifest.json", "a/x.folder", "a/commits/0.json"])
def test_the_litter_of_dead_writers_goes_and_that_of_living_ones_stays(tmp_path: Path, name: str) -> None:
    begin(tmp_path / "a")
    alive = os.getppid()
    dead = [
        leave(tmp_path / name, NO_PROCESS, machine()), leave(tmp_path / name, 1, "00000000", age_s=GRACE_S + 60),
        leave(tmp_path / name, 2, "", age_s=GRACE_S + 60),
    ]  # fmt: skip
    living = [
        leave(tmp_path / name, alive, machine()), leave(tmp_path / name, 3, "00000000"), leave(tmp_path / name, 4, ""),
    ]  # fmt: skip
    begin(tmp_path / "a")
    assert [path.exists() for path in dead] == [False] * 3
    assert [path.exists() for path in living] == [True] * 3


def test_a_number_that_another_process_has_now_protects_nothing(tmp_path: Path) -> None:
    started = started_at(os.getppid())
    if started is None:
        pytest.skip("this system does not say when a process started")
    left = leave(tmp_path / "a", os.getppid(), machine(), age_s=time.time() - started + 60)
    assert is_litter(left)


def test_litter_of_a_neighbor_with_a_similar_name_stays(tmp_path: Path) -> None:
    neighbor = leave(tmp_path / "a.b", NO_PROCESS, machine())
    remove_litter(tmp_path / "a")
    assert neighbor.exists()
    remove_litter(tmp_path / "a.b")
    assert not neighbor.exists()


def test_a_persons_folder_is_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home" / "deep").mkdir(parents=True)
    monkeypatch.setattr(litter_module.os, "walk", lambda *args: pytest.fail("it was searched"))
    remove_litter(tmp_path / "home")


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def build_half() -> None:
        with build_folder(tmp_path / "a") as folder:
            (folder / "x").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        build_half()
    assert os.listdir(tmp_path) == []
    with build_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("x")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["a", "a/x"]
    with pytest.raises(StorageError, match="Another process wrote it"), build_folder(tmp_path / "a"):
        pass
    with build_folder(tmp_path / "a", replace=True):
        pass
    assert list((tmp_path / "a").iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# What `info` says


@pytest.mark.parametrize("lost", ["commits", "commits/000003.json", "images.parquet", "activations.zarr"])
def test_info_does_not_call_a_store_complete_that_lacks_files(tmp_path: Path, tiny_store: Path, lost: str) -> None:
    store = Path(shutil.copytree(tiny_store, tmp_path / "x.acts"))
    assert describe(store)["complete"] is True
    shutil.rmtree(store / lost) if (store / lost).is_dir() else (store / lost).unlink()
    facts = describe(store)
    assert facts["complete"] is False
    assert re.match(rf"{lost}.*verify {store}", str(facts["missing"]))


@pytest.mark.parametrize("lost", ["commits", "codes.zarr/2", "images.parquet"])
def test_info_does_not_call_codes_complete_that_lack_files(tmp_path: Path, tiny_codes: Path, lost: str) -> None:
    codes = Path(shutil.copytree(tiny_codes, tmp_path / "x.codes"))
    assert describe(codes)["complete"] is True
    shutil.rmtree(codes / lost) if (codes / lost).is_dir() else (codes / lost).unlink()
    assert describe(codes)["complete"] is False


def test_a_lock_whose_holder_is_not_named_yet_is_tried_again(tmp_path: Path) -> None:
    """Between taking a lock and naming oneself, and between removing the file and letting go, nobody can be named."""
    unnamed, waiting = OutputLock(tmp_path / "x"), OutputLock(tmp_path / "x")
    unnamed.acquire()
    unnamed.file.write_text("")
    timer = threading.Timer(0.2, unnamed.release)
    timer.start()
    waiting.acquire()
    timer.join()
    waiting.release()
    unnamed.acquire()
    started = time.monotonic()
    with pytest.raises(SettingsError, match=f"by process {os.getpid()} on "):
        waiting.acquire()
    assert time.monotonic() - started < 0.5
    unnamed.release()


def test_a_holder_that_ends_while_it_is_named_is_still_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It removes the lock's file with its name just when the other one has read it and gives up."""
    held, second = OutputLock(tmp_path / "x"), OutputLock(tmp_path / "x")
    held.acquire()
    clock, n_calls = time.monotonic, 0

    def tick() -> float:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 2:  # after the deadline was set, and the name was read
            held.release()
        return clock()

    monkeypatch.setattr("actcache.artifacts.locks.time.monotonic", tick)
    with pytest.raises(SettingsError, match=f"is being written by process {os.getpid()} on "):
        second.acquire()
