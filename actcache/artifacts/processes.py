"""What the operating system knows of processes and locks. Everything that differs between platforms is here.

In: numbers of processes, descriptors of files. Out: whether a process runs and since when, and locks between processes.
"""

import hashlib
import os
import platform
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

from actcache.errors import SettingsError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]


@cache
def machine() -> str:
    """8 hex digits for this host, boot and process namespace, within which a process number is unique."""
    facts = [platform.node()]
    with suppress(OSError):  # Linux only
        facts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def is_running(process: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it runs, as another user
        return True
    return True


def started_at(process: int) -> float | None:
    """When a process of this machine started, in seconds since 1970; None where that is not known."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return _booted_at() + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, StopIteration):
        return None


@cache
def _booted_at() -> float:
    lines = Path("/proc/stat").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("btime ")))


def check_threads() -> None:
    """Raise SettingsError unless a few more threads can be started.

    pyarrow waits for ever for threads that the system did not start: 8 that read files, and one per processor.
    """
    n_threads, ended = 8 + (os.cpu_count() or 1), threading.Event()
    threads = [threading.Thread(target=ended.wait, daemon=True) for _ in range(n_threads)]
    try:
        for thread in threads:  # 1 ms
            thread.start()
    except RuntimeError as error:
        raise SettingsError(
            f"{n_threads} more threads are needed, but the system does not start them. Raise the limit of processes "
            "(ulimit -u) or of memory (ulimit -v), then run the same command again."
        ) from error
    finally:
        ended.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()


def lock_file(fd: int, *, exclusive: bool) -> bool | None:
    """Lock an open file without waiting, or change the lock that this descriptor holds.

    The operating system releases the lock when the descriptor is closed, however the process ends.

    Returns:
        False when another descriptor holds it; None where the platform or the file system has no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
