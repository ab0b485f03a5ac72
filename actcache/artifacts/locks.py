"""One lock for each output, held by whoever writes it: `.NAME.lock` beside the output, which names its holder.

    with OutputLock(path) as lock:
        artifact = begin_artifact(path, ..., lock=lock)  # it takes the lock if there is something to write
        ...

The operating system releases the lock of a process that dies, so the next one takes it over. On a file system without
locks the file's content decides: a holder of this machine that no longer runs does not count. The workers of one
extraction or encoding share the lock, because they write one output together; others are kept out.
"""

import json
import os
import platform
import random
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from actcache.artifacts.advice import storage_errors
from actcache.artifacts.files import artifact_path, is_remote, make_folders
from actcache.artifacts.processes import is_running, lock_file, machine, started_at
from actcache.errors import SettingsError

SHARED_WAIT_S = 20
"""How long one of several workers waits while another one begins the output; this takes well under a second."""


UNNAMED_WAIT_S = 1
"""How long a lock is tried again whose holder has not written its name, which takes it well under a millisecond."""


class OutputLock:
    """The right to write one output. Nothing is locked until `acquire`; leaving the block releases it."""

    def __init__(self, path: str | Path, *, shared: bool = False) -> None:
        self.path, self.shared, self.exclusive = artifact_path(path), shared, False
        real = self.path if is_remote(self.path) else Path(os.path.realpath(self.path))  # two names of one output
        self.file = real.with_name(f".{real.name}.lock")
        self._fd: int | None = None

    def __enter__(self) -> "OutputLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def acquire(self, wait_s: float = 0) -> None:
        """Take the lock, unless this object holds it already. An object store has no locks, and needs none.

        Raises:
            SettingsError: another process holds it, also after `wait_s`; the message names that process.
            StorageError: the folder of the output cannot be written.
        """
        deadline = time.monotonic() + wait_s
        while self._fd is None and not is_remote(self.path) and not self._open():
            holder = self._holder()  # if it has no name, it has just taken the lock, or has just released it
            if time.monotonic() >= deadline + (0 if holder else UNNAMED_WAIT_S):
                raise SettingsError(self._describe(holder))
            time.sleep(random.uniform(0.01, 0.05))
        self.exclusive = not self.shared

    def make_exclusive(self) -> bool:
        """Turn a shared lock into one that excludes the other workers. False, and nothing held, when they hold it."""
        if self._fd is not None and lock_file(self._fd, exclusive=True) is False:
            self._close()
            return False
        self.exclusive = True
        return True

    def share(self) -> None:
        """Let the other workers in again. A lock that is not shared stays as it is."""
        if self.shared and self._fd is not None:
            lock_file(self._fd, exclusive=False)
            self.exclusive = False

    def release(self) -> None:
        """Release the lock, and remove its file unless other workers hold it too."""
        if self._fd is None:
            return
        with suppress(OSError):  # an empty file that nobody locks keeps nobody out
            if lock_file(self._fd, exclusive=True) is not False:
                os.unlink(self.file)
        self._close()

    def _close(self) -> None:
        if self._fd is not None:
            with suppress(OSError):
                os.close(self._fd)
        self._fd, self.exclusive = None, False

    def _open(self) -> bool:
        with storage_errors(self.path):
            make_folders(self.file.parent)
            while True:
                fd = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
                locked = lock_file(fd, exclusive=not self.shared)
                if locked is None:  # a file system without locks
                    locked = self.shared or not _is_alive(_read_holder(fd))
                if not locked:
                    os.close(fd)
                    return False
                if not _is_at(fd, self.file):  # its holder has removed it since we opened it
                    os.close(fd)
                    continue
                self._fd = fd
                try:
                    _write_holder(fd)
                except BaseException:
                    self.release()
                    raise
                return True

    def describe_holder(self) -> str:
        """One line on the process that keeps us out."""
        return self._describe(self._holder())

    def _describe(self, holder: str | None) -> str:
        return (
            f"{self.path} is being written by {holder or 'another process'}. Wait for it to finish, or stop it and "
            "run the same command, which resumes."
        )

    def _holder(self) -> str | None:
        """The process that holds the lock, for people; None if its file does not name one."""
        try:
            holder = json.loads(self.file.read_text())
            return f"process {holder['process']} on {holder['host']}, which started at {holder['started']}"
        except (OSError, ValueError, KeyError, TypeError):
            return None


def remove_stale_lock(path: Path) -> None:
    """Delete the lock's file that a killed writer left beside an output. A lock that is held stays."""
    lock = OutputLock(path)
    if not is_remote(path) and os.path.lexists(lock.file):
        with suppress(SettingsError, OSError):
            lock.acquire()
            lock.release()


def _write_holder(fd: int) -> None:
    started = started_at(os.getpid()) or time.time()
    shown = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started))
    holder = {
        "host": platform.node(), "machine": machine(), "process": os.getpid(), "started": shown,
        "started_s": round(started),
    }  # fmt: skip
    os.ftruncate(fd, 0)
    os.pwrite(fd, (json.dumps(holder) + "\n").encode(), 0)


def _read_holder(fd: int) -> dict[str, object]:
    try:
        holder = json.loads(os.pread(fd, 4096, 0))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_alive(holder: dict[str, object]) -> bool:
    """Whether the process that wrote a lock's file may still run. One of another host is taken to run."""
    process, recorded = holder.get("process"), holder.get("started_s")
    if not isinstance(process, int) or not isinstance(recorded, int) or process == os.getpid():
        return False
    if holder.get("machine") != machine():
        return True
    started = started_at(process)
    return is_running(process) and (started is None or abs(started - recorded) <= 2)


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
