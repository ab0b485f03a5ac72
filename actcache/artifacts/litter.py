"""Temporary names, the one scheme for all files and folders of this project, and what dead writers left under them.

    .NAME.MACHINE-PROCESS.tmp

NAME is the final name, MACHINE stands for host, boot and process namespace. So what a killed process left is told from
what a running one is writing, and the next command that writes the same output removes it.
"""

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from actcache.artifacts.processes import is_running, machine, started_at

GRACE_S = 86_400
"""Age from which the file of a process that cannot be checked, such as one of another host, counts as left behind. No
file is under a temporary name for a day without being written to."""

OLD = ".old"
"""What is appended to the name of an output that is being replaced."""

_TEMPORARY = re.compile(r"\.(?P<name>.+?)\.(?:(?P<machine>[0-9a-f]{8})-)?(?P<process>\d+)\.tmp")
_SLACK_S = 2  # clocks of files and of processes differ by less


def temporary_path(path: Path) -> Path:
    """Where this process writes what will become `path`."""
    return path.with_name(f".{path.name}.{machine()}-{os.getpid()}.tmp")


def old_path(path: Path) -> Path:
    """Where this process puts what was at `path` before it deletes it."""
    return temporary_path(path.with_name(path.name + OLD))


def is_litter(path: Path) -> bool:
    """Whether a temporary file or folder belongs to a process that no longer runs."""
    match = _TEMPORARY.fullmatch(path.name)
    if match is None:
        return False
    try:
        written = os.lstat(path).st_mtime
    except OSError:  # another process has removed it
        return False
    process = int(match["process"])
    if match["machine"] != machine():  # it cannot be checked
        return time.time() - written > GRACE_S
    if process == os.getpid() or not is_running(process):
        return True  # our own, and we are not writing now
    started = started_at(process)
    return started is not None and started > written + _SLACK_S  # the number was given to another process


def remove_litter(path: Path) -> None:
    """Delete what dead writers left beside an output and, if it is a folder, inside it."""
    for litter in _temporaries(path):
        if is_litter(litter):
            with suppress(OSError):  # it does no harm, and a broken disk is reported by the next write
                if litter.is_dir() and not litter.is_symlink():
                    shutil.rmtree(litter, ignore_errors=True)
                else:
                    litter.unlink(missing_ok=True)


def _temporaries(path: Path) -> Iterator[Path]:
    with suppress(OSError):
        for name in os.listdir(path.parent):
            match = _TEMPORARY.fullmatch(name)
            if match and match["name"].removesuffix(OLD) == path.name:
                yield path.parent / name
    if not (path / "artifact.json").exists():  # it is not ours, and may be large
        return
    for folder, folders, names in os.walk(path):  # os.walk tolerates that others rename and remove files meanwhile
        for name in [*folders, *names]:
            if name.endswith(".tmp"):
                yield Path(folder) / name
        folders[:] = [name for name in folders if not name.endswith(".tmp")]
