"""Images and masks: valid files of many formats with damaged bytes, headers, EXIF and sizes; folders that hold them."""

import io
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, features

from actcache import ImageSourceError
from actcache.preprocess import Preprocess
from actcache.sources import ImageFolder, decode_image, resize_image
from actcache.sources.formats import SUFFIXES
from actcache.sources.images import decode_mask

MAX_PIXELS = 1 << 24
"""Damaged headers announce any size; below this one Pillow may allocate it."""

MODES = {
    "JPEG": "L RGB CMYK",
    "PNG": "1 L LA P RGB RGBA I;16",
    "WEBP": "RGB RGBA",
    "GIF": "L P",
    "TIFF": "1 L LA P RGB RGBA CMYK YCbCr LAB I I;16 F",
    "BMP": "1 L P RGB",
    "AVIF": "RGB RGBA",
    "JPEG2000": "L LA RGB RGBA I;16",
    "PPM": "1 L RGB I",
    "ICO": "RGBA",
    "TGA": "RGB",
    "EPS": "RGB",
    "PDF": "RGB",
    "PCX": "RGB",
    "SGI": "RGB",
}
SIZES = [(1, 1), (40, 30), (31, 64), (300, 2), (2, 300), (1, 700), (64, 64)]


def prepare(folder: Path) -> list[tuple[str, bytes]]:
    """Valid files: (format, bytes)."""
    rng = np.random.default_rng(0)
    files = []
    for kind, modes in MODES.items():
        if kind == "AVIF" and not features.check("avif"):
            continue
        for mode in modes.split():
            for size in SIZES:
                files += [(kind, data) for data in encode(kind, mode, size, rng)]
    return files


def encode(kind: str, mode: str, size: tuple[int, int], rng: np.random.Generator) -> list[bytes]:
    """One image with every option that changes how it is stored; none if Pillow does not write it."""
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    rgb = Image.fromarray(pixels)
    if mode == "LAB":
        image = Image.merge("LAB", rgb.split())
    elif mode in ("I;16", "I", "F"):
        dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        image = Image.fromarray((pixels[..., 0].astype(dtype) * rng.choice([1, 16, 257])).astype(dtype))
    else:
        image = rgb.quantize(7) if mode == "P" else rgb.convert(mode)
    exif = Image.Exif()
    exif[0x0112], exif[0x9003], exif[0x829A] = int(rng.integers(0, 10)), "2020:01:01 00:00:00", (1, 60)
    options: list[dict[str, object]] = [{}, {"exif": exif}]
    if kind == "TIFF":
        options += [{"compression": "tiff_lzw"}, {"compression": "tiff_deflate"}, {"tiffinfo": {281: 255, 340: 0.0}}]
    if kind == "JPEG":
        options += [{"progressive": True}]
    files = []
    for chosen in options:
        buffer = io.BytesIO()
        try:
            image.save(buffer, kind, **chosen)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError):
            continue
        files.append(buffer.getvalue())
    return files


def attempt(rng: random.Random, folder: Path, files: list[tuple[str, bytes]]) -> None:
    data = damage(rng, *rng.choice(files))
    size = rng.choice([(24, 24), (16, 30), (224, 224)])
    preprocess = Preprocess(
        size,
        resize_mode=rng.choice(["shortest", "squash", "longest"]),
        interpolation=rng.choice(["bicubic", "nearest"]),
    )
    kept = decode(data, preprocess)
    whole = decode(data, None)
    assert (kept is None) == (whole is None), "it is read with a preprocessing or without, but not both ways"
    if kept is not None and whole is not None:
        assert whole.mode == kept.mode == "RGB"
        seen = np.asarray(resize_image(kept, preprocess))
        assert seen.shape == (*size, 3)
        assert seen.dtype == np.uint8
        assert np.array_equal(seen, np.asarray(resize_image(whole, preprocess)))
    try:
        mask = decode_mask(data)
        assert mask.ndim == 2
        assert mask.dtype == np.uint8
    except ImageSourceError as error:
        check_line(str(error))
    if rng.random() < 0.1:
        list_folder(rng, folder, data)


def decode(data: bytes, preprocess: Preprocess | None) -> Image.Image | None:
    try:
        return decode_image(data, name="a/b.jpg", max_pixels=MAX_PIXELS, preprocess=preprocess)
    except ImageSourceError as error:
        check_line(str(error))
        return None


def check_line(text: str) -> None:
    assert " cannot be read: " in text
    assert "\n" not in text
    assert "BytesIO" not in text


def damage(rng: random.Random, kind: str, data: bytes) -> bytes:
    """Change some bytes, a number, a length or a piece of a file; the checksums of a PNG are mended again."""
    changed = bytearray(data)
    for _ in range(rng.choice([0, 1, 1, 2, 5, 30])):
        near = min(len(changed), rng.choice([32, 300, 1 << 30]))
        at = rng.randrange(near) if near else 0
        what = rng.randrange(5)
        if what == 0:
            changed[at : at + 1] = bytes([rng.randrange(256)])
        elif what == 1:
            changed[at : at + 4] = struct.pack(rng.choice("<>") + "I", rng.choice([0, 1, 255, 65536, 2**31, 2**32 - 1]))
        elif what == 2:
            changed[at : at + 2] = struct.pack(rng.choice("<>") + "H", rng.choice([0, 1, 3, 5, 10, 12, 32768, 65535]))
        elif what == 3:
            del changed[at : at + rng.choice([1, 4, 100])]
        else:
            changed[at:at] = changed[: rng.randrange(60)]
    if rng.random() < 0.2:
        del changed[rng.randrange(len(changed) + 1) :]
    if kind == "PNG" and rng.random() < 0.7:
        changed = repair_checksums(bytes(changed))
    return bytes(changed)


def repair_checksums(data: bytes) -> bytearray:
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        body = data[at + 4 : at + 8 + size]
        out += data[at : at + 4] + body + zlib.crc32(body).to_bytes(4, "big")
        at += size + 12
    return out


def list_folder(rng: random.Random, folder: Path, data: bytes) -> None:
    """A folder of strange names: the listing, its plan and every file that it names are right or refused."""
    words = ["train", "val", "test", "cat", "@eaDir", ".git", "é", " ", "lost+found", "001.cat", "a\\b", "%s"]
    for i in range(rng.randrange(1, 8)):
        place = folder.joinpath(*(rng.choice(words) for _ in range(rng.randrange(4))))
        place.mkdir(parents=True, exist_ok=True)
        name = place / f"{rng.choice(['', '.', '._'])}{i}{rng.choice([*SUFFIXES, '.txt', '', '.PNG'])}"
        kind = rng.randrange(6)
        if kind == 0:
            os.mkfifo(name)
        elif kind == 1:
            name.symlink_to(rng.choice(["/dev/zero", "/nowhere", str(folder), str(place)]))
        else:
            name.write_bytes(data)
    source = ImageFolder(folder, class_level=rng.choice([None, None, 0, 1, 2, -1, -2, 7]))
    for uri in source.plan().table["uri"].to_pylist():
        assert source.read(uri) == data
