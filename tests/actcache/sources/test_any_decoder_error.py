"""Whatever a decoder raises is the failure of that image, in one line; what is around its pixels is not."""

import io
import os
import stat
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from actcache import ImageSourceError
from actcache.preprocess import Preprocess
from actcache.sources import decode_image, open_source
from actcache.sources.formats import FORMATS
from actcache.sources.images import decode_mask

PIXELS = np.random.default_rng(0).integers(0, 255, (32, 40, 3), dtype=np.uint8)


def encode(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind, **options)
    return buffer.getvalue()


def add_exif(jpeg: bytes, exif: bytes) -> bytes:
    """A JPEG with an APP1 segment behind its start marker."""
    body = b"Exif\0\0" + exif
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def ifd(*entries: tuple[int, int, int, bytes], tail: bytes = b"") -> bytes:
    """A little-endian TIFF header and one directory: (tag, type, count, 4 bytes of value or offset)."""
    packed = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + b"\0\0\0\0" + tail


ROTATED = (0x0112, 3, 1, b"\x06\0\0\0")
BAD_EXIF = {
    "rational of 4 bytes": ifd(ROTATED, (0x829A, 5, 1, b"\xf0\0\0\0")),
    "rational with zero": ifd(ROTATED, (0x829A, 5, 1, b"\x26\0\0\0"), tail=bytes(8)),
    "text as number": ifd(ROTATED, (0x9003, 3, 20, b"\x26\0\0\0"), tail=b"2020:01:01 00:00:00\0" * 2),
    "float where an integer is": ifd(ROTATED, (0x011A, 11, 1, b"\0\0\xc0\x7f")),
    "signed orientation": ifd((0x0112, 5, 1, b"\x1a\0\0\0"), tail=struct.pack("<II", 6, 0)),
    "directory beyond the end": ifd(ROTATED, (0x8769, 4, 1, b"\xff\xff\xff\x7f")),
    "directory in a circle": ifd(ROTATED, (0x8769, 4, 1, b"\x08\0\0\0")),
    "cut short": ifd(ROTATED, (0x829A, 5, 1, b"\xf0\0\0\0"))[:17],
    "no header": b"no EXIF at all",
    "nothing": b"",
}


@pytest.mark.parametrize("kind", BAD_EXIF)
@pytest.mark.parametrize("container", ["JPEG", "PNG", "WEBP"])
def test_unreadable_exif_around_fine_pixels_is_ignored(kind: str, container: str) -> None:
    if container == "JPEG":
        plain = encode("JPEG")
        data = add_exif(plain, BAD_EXIF[kind])
    else:
        options = {"lossless": True} if container == "WEBP" else {}
        plain = encode(container, **options)
        data = encode(container, exif=b"Exif\0\0" + BAD_EXIF[kind], **options)
    expected, decoded = np.asarray(decode_image(plain)), np.asarray(decode_image(data))
    if decoded.shape != expected.shape:  # the orientation could be read although the rest could not
        expected = np.rot90(expected, -1)
    np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize("number", range(10))
@pytest.mark.parametrize("container", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_every_orientation_turns_the_pixels_as_pillow_does(number: int, container: str) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = number
    data = encode(container, exif=exif, **({"lossless": True} if container == "WEBP" else {}))
    with Image.open(io.BytesIO(data)) as opened:
        expected = ImageOps.exif_transpose(opened).convert("RGB")
    np.testing.assert_array_equal(np.asarray(decode_image(data)), np.asarray(expected))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_of_every_format_are_decoded_or_named_in_one_line(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    file = bytearray(SAMPLES[kind])
    for _ in range(data.draw(st.integers(1, 6))):
        # half of the damage hits the header, where formats differ most
        at = data.draw(st.integers(0, len(file) - 1) | st.integers(0, min(len(file), 200) - 1))
        file[at] = data.draw(st.integers(0, 255))
    file = file[: data.draw(st.just(len(file)) | st.integers(1, len(file)))]
    said = ""
    try:
        decoded = decode_image(bytes(file), name="a/b.jpg", max_pixels=1 << 22, preprocess=Preprocess((24, 24)))
    except ImageSourceError as error:
        said = str(error)
    if said:
        assert said.startswith("a/b.jpg cannot be read: ")
        assert "\n" not in said
        assert "BytesIO" not in said
    else:
        assert decoded.mode == "RGB"


KINDS = [kind for kind in FORMATS if kind != "AVIF" or ("avif" in features.modules and features.check("avif"))]
SAMPLES = {kind: encode(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_every_listed_format_is_decoded(kind: str) -> None:
    with Image.open(io.BytesIO(SAMPLES[kind])) as opened:
        expected = np.asarray(opened.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode_image(SAMPLES[kind])), expected)


def test_a_format_that_starts_a_program_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = tmp_path / "ran"
    for name in ("gs", "gswin64c", "gswin32c"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {ran}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
    for name, data in {"e.jpg": eps, "e.png": b"%PDF-1.4\n", "e.webp": b"\xd7\xcd\xc6\x9a" + bytes(60)}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageSourceError, match=rf"^{name} cannot be read: it is not an image in a known format"):
            decode_image(tmp_path / name)
        with pytest.raises(ImageSourceError, match="not an image in a known format"):
            decode_mask(tmp_path / name)
    assert not ran.exists()


@pytest.mark.parametrize("error", [struct.error, TypeError, RuntimeError, MemoryError, OverflowError, SyntaxError,
                                   UserWarning, RecursionError, KeyError, AssertionError])  # fmt: skip
def test_every_class_of_error_that_pillow_raises_becomes_one_line(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*_: object) -> None:
        raise error("first line\nsecond line of <_io.BytesIO object>")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(ImageSourceError, match=r"^x\.png cannot be read: .*first line.*second line"):
        decode_image(SAMPLES["PNG"], name="x.png")
    with pytest.raises(ImageSourceError, match=r"^m\.png cannot be read: "):
        decode_mask(GRAY, name="m.png")


def gray() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[..., 0]).save(buffer, "PNG")
    return buffer.getvalue()


GRAY = gray()


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


SPECIAL = [make_pipe, make_device, make_socket]


def within(seconds: float, call: Callable[[], object]) -> list[BaseException]:
    """The exception of a call that must end in time."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except ImageSourceError as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"
    return raised


@pytest.mark.parametrize("make", SPECIAL)
def test_only_regular_files_are_opened(tmp_path: Path, make: Callable[[Path], None]) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(SAMPLES["PNG"])
    make(folder / "p.jpg")
    plan = open_source(folder).plan()
    assert plan.table["uri"].to_pylist() == ["a.png"]
    assert sum(plan.left_out.values()) == 1
    for call in (
        lambda: open_source(folder).read("p.jpg"),
        lambda: decode_image(folder / "p.jpg"),
        lambda: decode_mask(folder / "p.jpg"),
    ):
        assert "not a regular file" in str(within(5, call)[0])
    (tmp_path / "photos.csv").write_text("path\nphotos/a.png\nphotos/p.jpg\n")
    assert "not a regular file" in str(within(5, lambda: open_source(tmp_path / "photos.csv").plan())[0])
    make(tmp_path / "t.tar")
    assert within(5, lambda: open_source(tmp_path / "t.tar").plan())


@pytest.mark.parametrize("make", SPECIAL)
def test_masks_are_regular_files_too(tmp_path: Path, make: Callable[[Path], None]) -> None:
    for name in ("photos", "masks"):
        (tmp_path / name).mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(SAMPLES["JPEG"])
    (tmp_path / "photos" / "b.jpg").write_bytes(SAMPLES["JPEG"])
    (tmp_path / "masks" / "a.png").write_bytes(GRAY)
    make(tmp_path / "masks" / "b.png")
    source = open_source(tmp_path / "photos", masks=tmp_path / "masks")
    assert sorted(source.plan().table["mask"].to_pylist()) == ["", "a.png"]
    assert within(5, lambda: source.read_mask("b.jpg")) == []
    assert source.read_mask("b.jpg") is None
