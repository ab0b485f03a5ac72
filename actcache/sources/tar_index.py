"""Where the members of a tar are, from its headers alone.

In: an uncompressed tar: POSIX ustar, pax or GNU. Out: name, offset and size of every regular file, the payload of small
files with requested suffixes and, if wanted, the names of links, devices and sparse files, which have no bytes of their
own in one piece. Whatever the headers say, the walk only goes forward. Python's tarfile makes an object for each member
and lists 40,000 per second on one core, this module 150,000; a million samples are three million members. Other
payloads are never read.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from actcache.errors import ImageSourceError
from actcache.machine import expect_random_reads
from actcache.sources.files import open_regular

BLOCK = 512
WINDOW = 4096
"""Bytes read at a time: a header and, often, a small payload and the next header."""

MAX_SMALL_BYTES = 1 << 24
"""Larger .cls, .json or .txt files are not read, and larger name records are an error."""


SPECIAL = {b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device", b"6": "pipe", b"S": "sparse file"}


class Member(NamedTuple):
    """A file in a tar. `data` is its payload if that was requested.

    `special` is what it is if not a regular file: its content is not at `offset`.
    """

    name: str
    offset: int
    size: int
    data: bytes | None
    special: str = ""


def walk_tar(path: Path, *, wanted: tuple[str, ...] = (), special: bool = False) -> Iterator[Member]:
    """Iterate over the headers of a tar.

    Args:
        wanted: suffixes (lower case) of files whose payload is read.
        special: whether links, devices and sparse files are listed too.

    Raises:
        ImageSourceError: this is not a tar, or it is damaged, compressed or truncated.
    """
    try:
        with open(open_regular(path), "rb", buffering=0) as file:
            expect_random_reads(file.fileno())  # do not read ahead into payloads
            for member in _walk(_Reader(file.fileno(), path.name), wanted):
                if special or not member.special:
                    yield member
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

    def damaged(self, offset: int) -> ImageSourceError:
        return ImageSourceError(f"{self.name} is damaged at byte {offset:,}. Repair it.")

    def cut_short(self) -> ImageSourceError:
        return ImageSourceError(f"{self.name} is truncated at byte {self.size:,}. Download or write it again.")


def _walk(reader: _Reader, wanted: tuple[str, ...]) -> Iterator[Member]:
    offset = 0
    record: dict[bytes, bytes] = {}  # what records before a member say about it
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
        if kind in (b"x", b"L", b"K", b"g"):
            if not 0 <= size <= MAX_SMALL_BYTES:
                raise reader.damaged(offset)
            data = reader.read(start, size)
            if kind == b"L":
                record[b"path"] = data.split(b"\0", 1)[0]
            elif kind == b"x":
                record |= _pax(data)
        else:
            if b"size" in record:
                size = int(record[b"size"]) if re.fullmatch(rb"\d{1,18}", record[b"size"]) else -1
            size = 0 if kind in (b"1", b"2", b"3", b"4", b"5", b"6") else size  # these have no payload
            if size < 0:
                raise reader.damaged(offset)
            start = start if kind != b"S" else _skip_sparse_map(reader, header, start)
            if start + size > reader.size:
                raise reader.cut_short()
            is_sparse = any(key.startswith(b"GNU.sparse.") for key in record)
            if is_sparse or kind in (b"0", b"\0", b"7", *SPECIAL):
                name = _text(record[b"path"], reader, offset) if b"path" in record else _name(header, reader, offset)
                if is_sparse and b"GNU.sparse.name" in record:
                    name = _text(record[b"GNU.sparse.name"], reader, offset)
                name = name.removeprefix("./")
                special = SPECIAL[b"S"] if is_sparse else SPECIAL.get(kind, "")
                small = bool(wanted) and not special and size <= MAX_SMALL_BYTES and name.lower().endswith(wanted)
                yield Member(name, start, size, reader.read(start, size) if small else None, special)
            record = {}
        offset = start + -(-size // BLOCK) * BLOCK


def _skip_sparse_map(reader: _Reader, header: bytes, start: int) -> int:
    """Where the payload of an old GNU sparse member begins: after the blocks that continue its map."""
    more = header[482]
    while more:
        more = reader.read(start, BLOCK)[504]
        start += BLOCK
    return start


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
        return int.from_bytes(digits, "big") & ((1 << (8 * len(digits) - 1)) - 1) if digits[0] == 0x80 else -1
    text = digits.split(b"\0", 1)[0].strip()
    if not text.isdigit():
        return -1 if text else 0
    try:
        return int(text, 8)
    except ValueError:
        return -1


def _pax(data: bytes) -> dict[bytes, bytes]:
    """Parse records `<length> <key>=<value>\\n`."""
    fields: dict[bytes, bytes] = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not re.fullmatch(rb"\d{1,9}", length) or not len(length) + 1 < int(length) <= len(data):
            break
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        fields[key] = value
        data = data[int(length) :]
    return fields
