"""Images of more than 8 bits are scaled as their file says, or refused; none becomes black, wraps or is clipped."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from actcache import ImageSourceError
from actcache.preprocess import Preprocess
from actcache.sources import decode_image

RAMP = np.linspace(0, 1, 96).reshape(8, 12)
GRAY = np.round(RAMP * 255).astype(int)


def write_png(values: NDArray[Any], sbit: int | None = None) -> bytes:
    """A 16-bit PNG [H, W] or [H, W, channels] by its specification; sBIT is the number of significant bits."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    values = values if values.ndim == 3 else values[..., None]
    height, width, channels = values.shape
    color = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    significant = b"" if sbit is None else chunk(b"sBIT", bytes([sbit] * channels))
    header = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"gAMA", struct.pack(">I", 45455)) + significant
        + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    )  # fmt: skip


def write_tiff(values: NDArray[Any], **tags: tuple[int, int, float]) -> bytes:
    """tags: name=(number, type, value)."""
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for number, kind, value in tags.values():
        info.tagtype[number] = kind
        info[number] = value
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF", tiffinfo=info)
    return buffer.getvalue()


SHORT, LONG, FLOAT, SLONG = 3, 4, 11, 9


def check(data: bytes, expected: NDArray[Any]) -> None:
    """Up to the rounding of 8 bits."""
    decoded = np.asarray(decode_image(data)).astype(int)
    assert np.abs(decoded - expected[..., None]).max() <= 1
    assert decoded.max() >= 254


def refuse(data: bytes, *words: str) -> None:
    with pytest.raises(ImageSourceError) as caught:
        decode_image(data, name="a.tif")
    text = str(caught.value)
    assert text.startswith("a.tif cannot be read: ")
    assert "\n" not in text
    assert "Convert it to" in text  # what to do
    for word in words:
        assert word in text


@pytest.mark.parametrize("bits", range(8, 17))
@pytest.mark.parametrize("stretched", [False, True])
def test_sixteen_bit_gray_is_scaled_by_the_bits_that_the_png_declares(bits: int, stretched: bool) -> None:
    values = np.round(RAMP * ((1 << bits) - 1)).astype(np.uint16)
    if stretched:  # as the PNG standard wants it: the bits are repeated until 16 are full
        wide = values.astype(np.uint64)
        values = ((wide << (16 - bits)) | (wide >> max(0, 2 * bits - 16))).astype(np.uint16)
    check(write_png(values, bits), GRAY)


@pytest.mark.parametrize("bits", range(1, 15))
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_that_are_hardly_used_are_refused(bits: int, channels: int) -> None:
    values = np.round(RAMP * ((1 << bits) - 1)).astype(np.uint16)
    if channels > 1:
        values = np.repeat(values[..., None], channels, 2)
        if channels in (2, 4):
            values[..., -1] = 65535  # an opaque alpha channel is no brightness
    refuse(write_png(values), "16 bits", f"use {bits}" if channels == 1 else "nearly black")
    if channels > 2:
        refuse(write_png(values, max(bits, 8)), "nearly black")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_full_bits_keep_their_upper_byte(channels: int) -> None:
    values = np.round(RAMP * 65535).astype(np.uint16)
    data = write_png(values if channels == 1 else np.repeat(values[..., None], channels, 2))
    np.testing.assert_array_equal(np.asarray(decode_image(data)), (values >> 8)[..., None].repeat(3, 2))
    np.testing.assert_array_equal(np.asarray(decode_image(write_png(values, 16)))[..., 0], values >> 8)


def test_a_dark_image_that_declares_sixteen_bits_is_dark() -> None:
    values = np.round(RAMP * 4095).astype(np.uint16)
    np.testing.assert_array_equal(np.asarray(decode_image(write_png(values, 16)))[..., 0], values >> 8)
    black = np.zeros((4, 4), np.uint16)
    assert not np.asarray(decode_image(write_png(black))).any()


@pytest.mark.parametrize("dtype", [np.uint16, ">u2", np.int16, np.int32, np.float32])
def test_a_tiff_is_scaled_between_the_values_it_calls_black_and_white(dtype: Any) -> None:
    low, high = (100, 4095) if np.dtype(dtype).kind == "u" else (-500, 3000)
    values = (low + RAMP * (high - low)).astype(dtype)
    kind = FLOAT if np.dtype(dtype).kind == "f" else SLONG if low < 0 else LONG
    check(write_tiff(values, black=(340, kind, low), white=(341, kind, high)), GRAY)
    if low > 0:
        check(write_tiff(values, black=(280, SHORT, low), white=(281, SHORT, high)), GRAY)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (1e-6, 1e6), (0.0, 1e38)])
def test_floating_point_images_are_refused_unless_they_say_what_is_white(low: float, high: float) -> None:
    values = (low + RAMP * (high - low)).astype(np.float32)
    refuse(write_tiff(values), "mode F", "black and white")
    check(write_tiff(values, black=(340, FLOAT, float(values.min())), white=(341, FLOAT, float(values.max()))), GRAY)


@pytest.mark.parametrize("high", [1, 255, 4095, 65535, 2**31 - 1])
@pytest.mark.parametrize("negative", [False, True])
def test_integers_of_32_bits_are_refused_unless_they_say_what_is_white(high: int, negative: bool) -> None:
    values = np.round(RAMP * high - (high // 2 if negative else 0)).astype(np.int32)
    refuse(write_tiff(values), "mode I", "black and white")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1.5, -0.5])
def test_values_beyond_black_and_white_are_never_clipped(value: float) -> None:
    values = RAMP.astype(np.float32)
    values[3, 3] = value
    refuse(write_tiff(values, black=(340, FLOAT, 0.0), white=(341, FLOAT, 1.0)), "0 black and 1 white")


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (1.0, 0.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_senseless_levels_are_refused(low: float, high: float) -> None:
    refuse(write_tiff(np.zeros((4, 4), np.float32), black=(340, FLOAT, low), white=(341, FLOAT, high)))


def test_a_tiff_whose_lowest_value_is_white_is_turned_over() -> None:
    values = np.round(RAMP * 65535).astype("<u2")
    data = bytearray(write_tiff(values))
    at = data.index(struct.pack("<HHI", 262, SHORT, 1))
    data[at + 8 : at + 10] = struct.pack("<H", 0)
    check(bytes(data), 255 - GRAY)


def test_twelve_bits_of_a_tiff_are_scaled_and_signed_bytes_are_refused() -> None:
    values = np.round(RAMP * 4095).astype(int).reshape(8, 6, 2)
    packed = np.stack([values[..., 0] >> 4, (values[..., 0] & 15) << 4 | values[..., 1] >> 8, values[..., 1] & 255], -1)
    check(plain_tiff(packed.astype(np.uint8).tobytes(), 12, 1), GRAY)
    refuse(plain_tiff(np.arange(96, dtype=np.uint8).tobytes(), 8, 2), "signed")


def plain_tiff(pixels: bytes, bits: int, kind: int) -> bytes:
    """An uncompressed gray TIFF of 12 x 8 pixels."""
    entries = {256: 12, 257: 8, 258: bits, 259: 1, 262: 1, 273: 8 + 2 + 10 * 12 + 4, 277: 1, 278: 8,
               279: len(pixels), 339: kind}  # fmt: skip
    body = b"".join(struct.pack("<HHII", number, LONG, 1, value) for number, value in entries.items())
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + b"\0\0\0\0" + pixels


@pytest.mark.parametrize("maximum", [1, 15, 255, 1023, 4095, 65535])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_pgm_or_ppm_is_scaled_by_its_maximum(maximum: int, channels: int) -> None:
    values = np.round(RAMP * maximum).astype(int)
    samples = np.repeat(values[..., None], channels, 2).astype(">u2" if maximum > 255 else "u1")
    data = b"P%d 12 8 %d\n" % (5 if channels == 1 else 6, maximum) + samples.tobytes()
    check(data, np.round(values / maximum * 255).astype(int))


MODES = {
    "PNG": "1 L LA P RGB RGBA",
    "TIFF": "1 L LA P PA RGB RGBA CMYK YCbCr",
    "GIF": "1 L LA P RGB RGBA",
    "WEBP": "1 L LA P PA RGB RGBA CMYK YCbCr",
    "JPEG2000": "L LA RGB RGBA CMYK YCbCr",
    "BMP": "1 L P RGB RGBA",
}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes.split()])
def test_modes_of_eight_bits_become_rgb_as_pillow_converts_them(kind: str, mode: str) -> None:
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8))
    image = rgb.quantize(16) if mode == "P" else rgb.quantize(16).convert("PA") if mode == "PA" else rgb.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    if (kind, mode) == ("TIFF", "YCbCr") and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("older versions of Pillow cannot read the file that they write")
    with Image.open(io.BytesIO(buffer.getvalue())) as opened:
        via = {"P": "RGBA", "PA": "RGBA"}.get(opened.mode, "RGB")
        expected = np.asarray(opened.convert(via).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode_image(buffer.getvalue())), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 16), st.integers(0, 99), st.booleans())
def test_a_strip_is_scaled_as_the_whole_image_is(bits: int, seed: int, tall: bool) -> None:
    shape = (500, 3) if tall else (3, 500)
    values = np.random.default_rng(seed).integers(0, 1 << bits, shape).astype(np.uint16)
    values[0, 0] = (1 << bits) - 1  # outside what the model sees
    data = write_png(values, bits)
    whole = np.asarray(decode_image(data)).astype(int)
    assert np.abs(whole[..., 0] - (values >> (bits - 8))).max() == 0
    assert decode_image(data, preprocess=Preprocess((16, 16))).size == (16, 16)
