"""What this machine offers: free memory, processors, and system calls that not every system has.

Everything is asked for by capability, never by the name of a system: Linux has it all, macOS has no O_DIRECT,
posix_fadvise, huge pages, /proc or affinity, and a network file system may refuse hard links.
"""

import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from actcache.errors import SettingsError

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def count_processors() -> int:
    """Number of processors that this process may use; a job of a cluster is often given some of a machine's."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def available_bytes() -> int:
    """Memory that can still be allocated: the kernel's estimate, or what the container has left if that is less.

    Without /proc it is all memory of the machine, which then is the only limit that is known.
    """
    limits = [1 << 62]
    with suppress(OSError, StopIteration, ValueError, IndexError):
        lines = (PROC / "meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        limits.append(int(line.split()[1]) * 1024)
    if len(limits) == 1:
        with suppress(OSError, ValueError, AttributeError):
            limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min([*limits, *_container_limits()])


def _container_limits() -> list[int]:
    """What each control group that holds this process has left. Its page cache counts as free: it can be dropped."""
    limits = []
    for folder, limit, used, cache in (
        (CGROUP, "memory.max", "memory.current", "inactive_file"),
        (CGROUP / _own_group(), "memory.max", "memory.current", "inactive_file"),
        (CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError):  # no such group, or the limit is "max"
            most, now = (int((folder / name).read_text()) for name in (limit, used))
            fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            limits.append(max(0, most - now + int(fields.get(cache, 0))))
    return limits


def _own_group() -> str:
    with suppress(OSError):
        for line in (PROC / "self" / "cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                return line.removeprefix("0::/")
    return ""


def check_memory(needed: int, free: int, what: str, advice: str) -> None:
    """Raise SettingsError where more memory is needed than there is, before any of it is allocated.

    Args:
        needed: a lower bound in bytes, so that nothing that fits is refused.
        what: what needs it, the subject of the sentence: "Training this SAE".
        advice: what to do, as a sentence.
    """
    if needed > free:
        raise SettingsError(
            f"{what} needs at least {needed / 1e9:,.1f} GB of memory, but only {free / 1e9:,.1f} GB are free. {advice}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# System calls


def read_into(fd: int, buffers: Sequence[Any], offset: int) -> int:
    """Fill buffers, one after the other, from a position in a file. Returns the number of bytes that there were."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, buffers, offset)
    done = 0
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        part = os.pread(fd, len(view), offset + done)
        view[: len(part)] = part
        done += len(part)
        if len(part) < len(view):
            break
    return done


def open_past_cache(fd: int) -> int | None:
    """A second descriptor of an open file that reads past the page cache; None where that is not possible."""
    with suppress(OSError, AttributeError):
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT)
    return None


def expect_random_reads(fd: int) -> None:
    """Tell the kernel not to read ahead."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)


def zeroed_memory(n_bytes: int) -> mmap.mmap:
    """Memory that begins at a page, in huge pages where there are any."""
    memory = mmap.mmap(-1, max(1, n_bytes))
    if hasattr(mmap, "MADV_HUGEPAGE") and hasattr(memory, "madvise"):
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
