"""Opening files that somebody else named: only regular files, without waiting, and no more bytes than they have.

A named pipe called `p.jpg` would wait for a writer without end, and a device would deliver bytes without end.
"""

import errno
import os
import stat
from pathlib import Path

from actcache.errors import ImageSourceError

NOT_REGULAR = "it is not a regular file but a folder, pipe, socket or device"

FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
"""O_NONBLOCK opens a pipe without waiting for its other end; it changes nothing for a regular file."""


def open_regular(path: str | Path) -> int:
    """A file descriptor of a regular file, to be closed by the caller.

    Raises:
        OSError: it cannot be opened, or it is no regular file.
    """
    try:
        descriptor = os.open(path, FLAGS)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV):  # a socket, or a device that is not there
            raise OSError(0, NOT_REGULAR) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, NOT_REGULAR)
    return descriptor


def read_file(path: str | Path, name: str) -> bytes:
    """All bytes of a regular file. Raises ImageSourceError, which calls the file `name`."""
    try:
        with open(open_regular(path), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(size)
            while len(data) < size and (more := file.read(size - len(data))):  # a read returns at most 2 GiB
                data += more
            return data
    except (OSError, ValueError, MemoryError) as error:  # ValueError: a zero byte in the path
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageSourceError(f"{name} cannot be read: {reason}.") from error
