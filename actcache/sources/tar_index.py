"""Where the members of a tar are, from its headers alone.

In: an uncompressed tar: POSIX ustar, pax or GNU. Out: name, offset and size of every regular file, and the payload of
small files with requested suffixes. Python's tarfile makes an object for each member and lists 40,000 per second on one
core, this module 150,000; a million samples are three million members. Other payloads are never read.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from actcache.errors import ImageSourceError
from actcache.machine import expect_random_reads

BLOCK = 512
WINDOW = 4096
"""Bytes read at a time: a header and, often, a small payload and the next header."""

MAX_SMALL_BYTES = 1 << 24
"""Larger .cls, .json or .txt files are not read, and larger name records are an error."""


class Member(NamedTuple):
    """A regular file in a tar. `data` is its payload if that was requested."""

    name: str
    offset: int
    size: int
    data: bytes | None


def walk_tar(path: Path, *, wanted: tuple[str, ...] = ()) -> Iterator[Member]:
    """Iterate over the headers of a tar.

    Args:
        wanted: suffixes (lower case) of files whose payload is read.

    Raises:
        ImageSourceError: this is not a tar, or it is damaged, compressed or truncated.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            expect_random_reads(file.fileno())  # do not read ahead into payloads
            yield from _walk(_Reader(file.fileno(), path.name), wanted)
    except OSError as error:
        raise ImageSourceError(f"{path} cannot be read: {error.strerror}. Check the path.") from error


class _Reader:
    """Reads of a file at any offset, through a small buffer."""

    def __init__(self, descriptor: int, name: str) -> None:
        self.name = name
        self.size = os.fstat(descriptor).st_size
        self._descriptor = descriptor
        self._start = 0
        self._window = b""

    def read(self, offset: int, size: int) -> bytes:
        first = offset - self._start
        if first < 0 or first + size > len(self._window):
            self._window = os.pread(self._descriptor, max(size, WINDOW), offset)
            self._start, first = offset, 0
        data = self._window[first : first + size]
        if len(data) < size:
            raise self.cut_short()
        return data

    def cut_short(self) -> ImageSourceError:
        return ImageSourceError(f"{self.name} is truncated at byte {self.size:,}. Download or write it again.")


def _walk(reader: _Reader, wanted: tuple[str, ...]) -> Iterator[Member]:
    offset = 0
    long_name: str | None = None  # name of the next member, from a record before it
    long_size: int | None = None
    while True:
        header = reader.read(offset, BLOCK)
        if not header[0] and not any(header):
            return
        # The checksum is the sum of the header's bytes, with its own eight bytes counted as blanks.
        if _number(header[148:156]) != sum(header) - sum(header[148:156]) + 256:
            what = "is not an uncompressed tar" if offset == 0 else f"is damaged at byte {offset:,}"
            raise ImageSourceError(f"{reader.name} {what}. Unpack or repair it.")
        kind, start = header[156:157], offset + BLOCK
        size = _number(header[124:136])
        if kind in b"xLKg" and kind:
            if size > MAX_SMALL_BYTES:
                raise ImageSourceError(f"{reader.name} is damaged at byte {offset:,}. Repair it.")
            data = reader.read(start, size)
            if kind == b"L":
                long_name = _text(data.split(b"\0", 1)[0], reader, offset)
            elif kind == b"x":
                fields = _pax(data)
                if b"path" in fields:
                    long_name = _text(fields[b"path"], reader, offset)
                if b"size" in fields:
                    long_size = int(fields[b"size"])
        else:
            size = size if long_size is None else long_size
            size = size if kind not in b"123456" or kind == b"" else 0  # links, devices, folders, pipes
            if start + size > reader.size:
                raise reader.cut_short()
            if kind in (b"0", b"\0", b"7"):
                name = long_name if long_name is not None else _name(header, reader, offset)
                name = name.removeprefix("./")
                small = bool(wanted) and size <= MAX_SMALL_BYTES and name.lower().endswith(wanted)
                yield Member(name, start, size, reader.read(start, size) if small else None)
            long_name = long_size = None
        offset = start + -(-size // BLOCK) * BLOCK


def _name(header: bytes, reader: _Reader, offset: int) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":  # where POSIX has the first part of a long path, GNU has times
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return _text(name, reader, offset)


def _text(name: bytes, reader: _Reader, offset: int) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise ImageSourceError(f"{reader.name} has a name at byte {offset:,} that is not UTF-8. Rename it.") from error


def _number(digits: bytes) -> int:
    """Read octal text, or base 256 if the top bit is set. -1 if it is neither."""
    if digits[0] & 0x80:
        return int.from_bytes(digits, "big") & ((1 << (8 * len(digits) - 1)) - 1)
    try:
        return int(digits.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return -1


def _pax(data: bytes) -> dict[bytes, bytes]:
    """Parse records `<length> <key>=<value>\\n`."""
    fields: dict[bytes, bytes] = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(data):
            break
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        fields[key] = value
        data = data[int(length) :]
    return fields
