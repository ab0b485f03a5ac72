"""Direct reading of shard files on a local disk: (hook point, array, shard, row, images) in, values in place out.

Promises: a missing, short, linked or special file raises an error that names the shard; nothing outside the store is
read; `preadv` puts the values straight into the caller's array; a file is opened once and stays open.
"""

import math
import os
import stat
import threading
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.artifacts import crc32c, is_remote
from actcache.errors import CorruptError
from actcache.hook_point import HookPoint
from actcache.machine import open_past_cache, read_into, zeroed_memory
from actcache.store.layout import INDEX_ABSENT, StoreLayout

ARRAYS = "activations.zarr"

PAGE = 4096
IOV_MAX = 1024
"""Maximum number of buffers in one preadv (Linux and macOS)."""

_OPEN_FILES = 256
"""File descriptors that a store keeps open; the usual limit of a process is 1,024."""


def shard_path(store: Path, hook_point: HookPoint, array: str, shard: int) -> Path:
    """zarr v3's default chunk key: c/<shard>/0 for cls, which has no axis of tokens; c/<shard>/0/0 for the others."""
    tail = "0" if array == "cls" else "0/0"
    return store / f"{ARRAYS}/{hook_point}/{array}/c/{shard}/{tail}"


class ShardFiles:
    """The shards of one store. Threads can share it."""

    def __init__(self, store: Path, layout: StoreLayout) -> None:
        self.store, self.layout = store, layout
        self._root = None if is_remote(store) else os.path.realpath(store)
        self._files: OrderedDict[tuple[HookPoint, str, int], _File] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, hook: HookPoint, array: str, shard: int) -> "_File":
        """The open file of a shard, after a check of its size. Raises CorruptError."""
        key = (hook, array, shard)
        with self._lock:
            if file := self._files.get(key):
                self._files.move_to_end(key)
                return file
        file = self._open(hook, array, shard)
        with self._lock:
            self._files[key] = file
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)  # it is closed when its last reader releases it
        return file

    def _open(self, hook: HookPoint, array: str, shard: int) -> "_File":
        path = shard_path(self.store, hook, array, shard)
        file, n_bytes = self._open_inside(path, shard)
        if n_bytes != (expected := self.layout.shard_bytes(array, shard)):
            raise self.corrupt(path, shard, f"has {n_bytes:,} bytes, expected {expected:,}")
        return file

    def _open_inside(self, path: Path, shard: int) -> tuple["_File", int]:
        """Open a plain file inside the store; returns it with its size."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would block forever
        except OSError as error:
            raise self.corrupt(path, shard, f"cannot be opened ({error.strerror})") from error
        file, status = _File(fd), os.fstat(fd)
        if os.path.realpath(path) != f"{self._root}{os.sep}{os.path.relpath(path, self.store)}":
            raise self.corrupt(path, shard, "is a link")
        if not stat.S_ISREG(status.st_mode):
            raise self.corrupt(path, shard, "is not a plain file")
        return file, status.st_size

    def check_inside(self, path: Path) -> None:
        """Raise CorruptError unless `path` is a plain file inside the store."""
        if not path.is_file() or os.path.realpath(path) != f"{self._root}{os.sep}{os.path.relpath(path, self.store)}":
            name = os.path.relpath(path, self.store)
            raise CorruptError(
                f"{name} of {self.store} is missing, a link or not a plain file. Run `verify {self.store} --repair`."
            )

    def check_index(self, hook: HookPoint, array: str, shard: int) -> None:
        """Raise CorruptError unless a compressed shard holds every chunk, each with the size that the layout gives.

        zarr returns zeros for a chunk that the index lacks, and allocates whatever memory a chunk claims to need.
        """
        path = shard_path(self.store, hook, array, shard)
        file, n_bytes = self._open_inside(path, shard)
        n_index, n_blocks = self.layout.index_bytes(array), self.layout.n_blocks(shard)
        end = n_bytes - n_index
        index = os.pread(file.fd, n_index, end) if end >= 0 else b""
        if len(index) != n_index or crc32c(index[:-4]) != int.from_bytes(index[-4:], "little"):
            raise self.corrupt(path, shard, "has a malformed index")
        entries = np.frombuffer(index[:-4], "<u8").reshape(-1, self.layout.n_rows(array), 2)
        chunks = entries[:n_blocks].reshape(-1, 2)
        inside = (chunks[:, 0] <= end).all() and (chunks[:, 1] <= end - chunks[:, 0]).all()
        if not inside or int(chunks[:, 1].sum()) > end or (entries[n_blocks:] != INDEX_ABSENT).any():
            raise self.corrupt(path, shard, "has an index that does not match its contents")
        for offset, length in chunks.tolist():
            header = os.pread(file.fd, 16, offset)  # blosc: flags, then the decompressed, block and compressed sizes
            sizes = int.from_bytes(header[4:8], "little"), int.from_bytes(header[12:16], "little")
            if sizes != (self.layout.chunk_bytes(array), length):
                raise self.corrupt(path, shard, f"has a malformed chunk at byte {offset:,}")

    def read(
        self, hook: HookPoint, array: str, shard: int, row: int, first: int, out: NDArray[Any], *, direct: bool = False
    ) -> None:
        """Read token row `row` of consecutive images into `out` [n, columns, D], n <= IOV_MAX.

        Args:
            first: number of the first image within the shard. The images of a row are contiguous, even across blocks,
                so this is one system call.
            out: any view in which each image is contiguous.
            direct: bypass the page cache if memory, offset and length are aligned and the file system supports it.
        """
        file = self.open(hook, array, shard)
        image_bytes = self.layout.chunk_bytes(array) // self.layout.chunk_images
        start = self.layout.chunk_offset(array, shard, 0, row) + first * image_bytes
        buffers: Any = [out.reshape(-1)] if out.flags.c_contiguous else list(out)
        wanted = len(out) * image_bytes
        fd = file.direct_fd() if direct and _aligned(buffers, start, wanted) else None
        try:
            done = read_into(file.fd if fd is None else fd, buffers, start)
        except OSError as error:
            path = shard_path(self.store, hook, array, shard)
            raise self.corrupt(path, shard, f"cannot be read ({error.strerror})") from error
        if done != wanted:  # one call reads up to 2 GiB, so the file was cut while it was read
            path = shard_path(self.store, hook, array, shard)
            raise self.corrupt(path, shard, f"ended early ({done:,} of {wanted:,} bytes)")

    def corrupt(self, path: Path, shard: int, what: str) -> CorruptError:
        return CorruptError(
            f"Shard {shard} of {self.store}, file {str(path)[len(str(self.store)) + 1 :]}, {what}. "
            f"Run `verify {self.store} --repair`."
        )


class _File:
    """A file descriptor that is closed when the last reader releases it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._direct: _File | None = None

    def direct_fd(self) -> int | None:
        """The same file opened with O_DIRECT; None if the system or the file system does not support it."""
        if self._direct is None:
            direct = open_past_cache(self.fd)
            self._direct = self if direct is None else _File(direct)
        return None if self._direct is self else self._direct.fd

    def __del__(self) -> None:
        os.close(self.fd)


def _aligned(buffers: list[NDArray[Any]], start: int, n_bytes: int) -> bool:
    whole = len(buffers) == 1 and buffers[0].ctypes.data % PAGE == 0
    return whole and start % PAGE == 0 and n_bytes % PAGE == 0


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """A zeroed array that begins at a page, as reads past the page cache require, in huge pages if available, because
    reading into it and gathering from it touch all of it in random order.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    return np.frombuffer(zeroed_memory(n_bytes), np.uint8, n_bytes).view(dtype).reshape(shape)


def image_runs(positions: NDArray[np.integer], shard_images: int) -> list[tuple[int, int]]:
    """Split positions into runs of at most IOV_MAX consecutive images of one shard: [(start, stop)] in `positions`."""
    if not len(positions):
        return []
    breaks = (np.diff(positions) != 1) | (positions[1:] % shard_images == 0)
    edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(positions)]
    return [
        (first, min(first + IOV_MAX, stop)) for start, stop in pairwise(edges) for first in range(start, stop, IOV_MAX)
    ]
