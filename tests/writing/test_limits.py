"""Limits that an administrator sets, and disks that are full or read-only: one line, soon, and the same command works.

The disks are real ones (tmpfs), which only root can mount; the limits are those of `ulimit`.
"""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from verbs import VERBS, Attempt, Forked, Trouble, contents, copy_inputs, leftovers, put_copies

NOBODY = 65534
NAMES = (
    "extract", "train", "encode", "analyze", "convert", "import", "report", "query-parquet", "evaluate", "adapt",
)  # fmt: skip
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="only root can mount a disk")


@pytest.fixture(scope="module")
def forked(memory_folder: Path) -> Iterator[Forked]:
    process = Forked(copy_inputs(memory_folder), warm=",".join(NAMES))
    yield process
    process.close()


@pytest.fixture
def disk(memory_folder: Path) -> Iterator[Path]:
    """An empty disk of 1 MB."""
    path = memory_folder / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", path], check=True)
    yield path
    subprocess.run(["umount", "-l", path], check=True)
    path.rmdir()


def fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


def assert_one_line(done: Attempt, *words: str) -> None:
    assert done.code == 1, done
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


@AS_ROOT
@pytest.mark.parametrize("name", NAMES)
def test_a_disk_that_is_full_for_a_while(forked: Forked, disk: Path, name: str) -> None:
    """Filled but for a few kilobytes; then there is room again."""
    verb, out = VERBS[name], disk / "out"
    put_copies(verb, forked.inputs, out)
    for free in (0, 4, 40):
        fill(disk / "filler")
        os.truncate(disk / "filler", os.stat(disk / "filler").st_size // 4096 * 4096 - free * 1024)
        done = forked.run(verb.command.format(o=out), out)
        if done.code:
            assert_one_line(done, str(out), "Free space")
            assert leftovers(out) == []
        (disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    assert forked.run(verb.command.format(o=out), out).code == 0
    assert contents(verb, out)
    assert leftovers(out) == []


@AS_ROOT
@pytest.mark.parametrize("name", NAMES)
def test_a_disk_that_cannot_be_written(forked: Forked, disk: Path, name: str) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    done = forked.run(VERBS[name].command.format(o=disk), disk)
    assert_one_line(done, str(disk), "Read-only file system", "Choose a path on a disk that can be written")


@pytest.mark.parametrize("name", NAMES)
def test_a_limit_of_the_size_of_files(forked: Forked, memory_folder: Path, name: str) -> None:
    out = memory_folder / f"small-{name}"
    put_copies(VERBS[name], forked.inputs, out)
    done = forked.run(VERBS[name].command.format(o=out), out, Trouble(limits={"RLIMIT_FSIZE": 600}))
    assert_one_line(done, str(out), "ulimit -f")
    assert leftovers(out) == []
    assert forked.run(VERBS[name].command.format(o=out), out).code == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_belongs_to_somebody_else(forked: Forked, memory_folder: Path, name: str) -> None:
    out = memory_folder / f"theirs-{name}"
    put_copies(VERBS[name], forked.inputs, out)
    for path in (out, *out.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    done = forked.run(VERBS[name].command.format(o=out), out, Trouble(obeys=True))
    assert_one_line(done, str(out), "Permission denied", "Correct the permissions")
    assert leftovers(out) == []


UNREADABLE = {
    "train": "a.acts/activations.zarr/blocks.1.hook_resid_post/patches/c/0/0/0", "encode": "run/sae.safetensors",
    "analyze": "a.codes/codes.zarr/1/row/c/0", "convert": "run/sae.safetensors",
    "report": "a.concepts/gallery.parquet",
    "query-parquet": "a.codes/codes.zarr/0/row/c/0", "evaluate": "model/tiny.safetensors",
    "import": "a.acts/activations.zarr/blocks.1.hook_resid_post/patches/c/0/0/0",
}  # fmt: skip


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_of_a_parent_that_may_not_be_read(forked: Forked, memory_folder: Path, name: str) -> None:
    out = memory_folder / f"unreadable-{name}"
    put_copies(VERBS[name], forked.inputs, out)
    file = forked.inputs / UNREADABLE[name]
    file.chmod(0)
    try:
        done = forked.run(VERBS[name].command.format(o=out), out, Trouble(obeys=True))
    finally:
        file.chmod(0o644)
    assert_one_line(done, file.name)
    assert leftovers(out) == []
    assert forked.run(VERBS[name].command.format(o=out), out, Trouble(obeys=True)).code == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("more_mb", [1, 30])
def test_little_address_space(forked: Forked, memory_folder: Path, name: str, more_mb: int) -> None:
    """Whether it is enough or not, the command ends soon, and says in one line what was missing."""
    out = memory_folder / f"little-{name}-{more_mb}"
    put_copies(VERBS[name], forked.inputs, out)
    size = int(Path(f"/proc/{forked.process}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit = {"RLIMIT_AS": size + (more_mb << 20)}
    done = forked.run(VERBS[name].command.format(o=out), out, Trouble(limits=limit), timeout_s=40)
    assert done.code in (0, 1), done
    if done.code:
        assert_one_line(done)
    assert leftovers(out) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("name", NAMES)
def test_no_more_threads(forked: Forked, memory_folder: Path, name: str) -> None:
    out = memory_folder / f"threads-{name}"
    put_copies(VERBS[name], forked.inputs, out)
    os.chown(out, NOBODY, NOBODY)
    trouble = Trouble(limits={"RLIMIT_NPROC": 1}, user=NOBODY)
    done = forked.run(VERBS[name].command.format(o=out), out, trouble, timeout_s=40)
    assert done.code in (0, 1), done
    if done.code:
        assert_one_line(done)
    assert leftovers(out) == []
