"""What the operating system refuses, in one line that names the output and says what to do."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from actcache.errors import PipelineError, StorageError

_AGAIN = ", then run the same command again: it resumes."
_REPAIR = f"Repair the disk{_AGAIN}"
_ADVICE = {
    errno.ENOSPC: f"Free space{_AGAIN}",
    errno.EDQUOT: f"Free quota{_AGAIN}",
    errno.EFBIG: f"Raise the limit of the size of files (ulimit -f){_AGAIN}",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), f"Raise the limit of open files (ulimit -n){_AGAIN}"),
    **dict.fromkeys((errno.EAGAIN, errno.ENOMEM), f"Free memory or raise the limits of this process{_AGAIN}"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), f"Correct the permissions{_AGAIN}"),
    errno.EROFS: "Choose a path on a disk that can be written.",
    errno.ENOENT: "It was removed or replaced while it was written. Run the same command again.",
    errno.ENOTEMPTY: "Another process wrote it at the same time. Run the same command again.",
    **dict.fromkeys(
        (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL),
        "Choose another path, or remove what is there.",
    ),
}
"""Advice for each error of the operating system."""


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's errors into a StorageError that names `path`, the output, and says what to do."""
    try:
        yield
    except PipelineError:
        raise
    except OSError as error:
        reason = (error.strerror or str(error).splitlines()[0]).rstrip(".")
        raise StorageError(f"{path} cannot be written: {reason}. {_ADVICE.get(error.errno or 0, _REPAIR)}") from error


_OUT_OF_MEMORY = (
    "not enough memory", "can't allocate memory", "out of memory", "Cannot allocate memory", "cannot allocate memory",
    "failed to map segment",
)  # fmt: skip
"""What torch and dask say in a RuntimeError, and Python in an ImportError of a library that does not fit."""


def describe_refusal(error: BaseException) -> str | None:
    """One line for an error of the operating system, or of a library, that says that a limit was met.

    Returns:
        None for any other error, which is a mistake of ours.
    """
    text = " ".join(str(error).split())
    if isinstance(error, BrokenPipeError):  # the reader of our output has seen enough
        return None
    if isinstance(error, OSError) and error.errno:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}. {_ADVICE.get(error.errno, 'Repair the disk or the connection')}"
    if isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY):
        return f"The memory is not enough ({text[:200] or 'out of memory'}). Free memory or raise the limit{_AGAIN}"
    if "start new thread" in text:
        return f"No more threads can be started. Raise the limit of processes (ulimit -u){_AGAIN}"
    return None
