"""Tars of samples: valid ones hold what tarfile says, and damaged ones are listed or refused in one line."""

import io
import json
import logging
import random
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from actcache import ImageTars, PipelineError
from actcache.sources.tar_index import walk_tar

SUFFIXES = [".png", ".jpg", ".PPM", ".cls", ".json", ".txt", ".mask.png", "", ".bin", ".tar"]
PAYLOADS = [
    b"", b"3", b"dog\n", b"-1", b"\xff", b"9" * 5000, b"{}", b'{"label": 3}', b'{"label": "dog", "year": 1.5}', b"null",
    b"[" * 2000, b'{"a": "\\ud800"}', b'{"\\udfff": [1]}', b'{"": 1}', b'{"uri": 1}', b'{"a": 1e999, "b": NaN}',
    b'{"class": [1, {"x": null}], "n": 123456789012345678901234567890}', b"x" * 700, b"\0" * 512, b"{" * 600,
]  # fmt: skip
FIELDS = [(100, 8), (124, 12), (148, 8), (156, 1), (257, 8), (345, 155), (482, 1), (0, 100)]
"""Where a header has its mode, size, checksum, kind, magic, prefix, sparse map and name."""

VALUES = [b"\0", b"\xff", b"\x80", b"-", b"7", b"8", b" ", b"x", b"L", b"g", b"S", b"K", b"1", b"\n", b"../", b"/"]


def prepare(folder: Path) -> None:
    logging.disable(logging.WARNING)  # notes on what is left out


def attempt(rng: random.Random, folder: Path, state: None) -> None:
    path = folder / "x.tar"
    expected = write(rng, path)
    with tarfile.open(path) as file:
        assert [(m.name, m.offset_data, m.size) for m in file.getmembers() if m.isreg()] == expected
    assert [(m.name, m.offset, m.size) for m in walk_tar(path)] == [
        (name.removeprefix("./"), offset, size) for name, offset, size in expected
    ]
    if rng.random() < 0.7:
        damage(rng, path)
    plan = ImageTars(path, label=rng.choice([None, None, None, "year"])).plan()
    source = ImageTars(path)
    for uri in plan.table["uri"].to_pylist()[:3]:
        with suppress(PipelineError):
            source.read(uri)


def write(rng: random.Random, path: Path) -> list[tuple[str, int, int]]:
    """Write a valid tar. Returns (name, offset, size) of its regular members."""
    layout = rng.choice([tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    with tarfile.open(path, "w", format=layout) as file:
        for _ in range(rng.randrange(8)):
            folder = rng.choice(["", "a/", "./", "é/" * 3, "d" * rng.choice([90, 120]) + "/"])
            name = folder + rng.choice("01é") + rng.choice(SUFFIXES)
            info = tarfile.TarInfo(name)
            info.type = rng.choice([tarfile.REGTYPE] * 6 + [tarfile.AREGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE,
                                                            tarfile.DIRTYPE, tarfile.FIFOTYPE])  # fmt: skip
            info.linkname = "0.png"
            if rng.random() < 0.2:
                info.mtime, info.pax_headers = 1.5, {"comment": "é=\n"}
            data = rng.choice(PAYLOADS) if rng.random() < 0.8 else json.dumps(any_value(rng, 3)).encode()
            info.size = len(data) if info.isreg() else 0
            if info.isreg() or info.type != tarfile.AREGTYPE:
                try:
                    file.addfile(info, io.BytesIO(data))
                except ValueError:  # too long for ustar
                    continue
    with tarfile.open(path) as file:
        return [(m.name, m.offset_data, m.size) for m in file.getmembers() if m.isreg()]


def any_value(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(7 if depth else 5)
    if kind == 5:
        return [any_value(rng, depth - 1) for _ in range(rng.randrange(3))]
    if kind == 6:
        names = ["label", "class", "year", "x", "mask", "text", "k" + str(rng.randrange(1000))]
        return {rng.choice(names): any_value(rng, depth - 1) for _ in range(rng.randrange(5))}
    return [None, rng.randrange(-5, 2**70), rng.random(), rng.choice(["", "dog", "é", "\0"]), rng.random() < 0.5][kind]


def damage(rng: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.randrange(1, 4)):
        block = rng.randrange(len(data) // 512) * 512
        start, size = rng.choice(FIELDS)
        value = (rng.choice(VALUES) * rng.choice([1, size]))[:size]
        at = block + start + rng.randrange(size - len(value) + 1)
        data[at : at + len(value)] = value
        if rng.random() < 0.7:  # with a checksum that fits
            data[block + 148 : block + 156] = b" " * 8
            data[block + 148 : block + 156] = b"%06o\0 " % sum(data[block : block + 512])
    if rng.random() < 0.2:
        data = data[: rng.randrange(len(data))]
    path.write_bytes(data)
