"""Memory follows what the model sees, not the shape of the image; usual shapes are resized to the byte as before."""

import io
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from actcache import ImageSourceError
from actcache.preprocess import Preprocess
from actcache.sources import decode_image, resize_image
from actcache.sources.resizing import STRIP_RATIO, is_strip

FILTERS = ("bicubic", "bilinear", "lanczos", "nearest", "box")
MODES = ("shortest", "squash", "longest")


def resize_whole(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """The plain order: resize all of the image, then crop."""
    (height, width), method = preprocess.size, Image.Resampling[preprocess.interpolation.upper()]
    if width == height:
        short = min(image.size)
        scaled = (int(width * image.width / short), int(height * image.height / short))
    else:
        ratio = min(image.width / width, image.height / height)
        scaled = (round(image.width / ratio), round(image.height / ratio))
    left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
    return image.resize(scaled, method).crop((left, top, left + width, top + height))


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 300), st.integers(1, 300), st.integers(8, 40), st.integers(0, 9), st.sampled_from(FILTERS),
    st.integers(0, 99),
)  # fmt: skip
def test_usual_shapes_are_resized_to_the_byte_as_before(
    width: int, height: int, side: int, more: int, method: str, seed: int
) -> None:
    if is_strip(width, height):
        height = max(1, width // STRIP_RATIO + 1) if width > height else width * STRIP_RATIO
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image, preprocess = Image.fromarray(pixels), Preprocess((side, side + more), interpolation=method)
    expected = np.asarray(resize_whole(image, preprocess))
    np.testing.assert_array_equal(np.asarray(resize_image(image, preprocess)), expected)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    kept = decode_image(buffer.getvalue(), preprocess=preprocess)
    np.testing.assert_array_equal(np.asarray(kept), pixels)  # the model's own transform resizes it


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.floats(STRIP_RATIO + 1, 90), st.booleans(), st.sampled_from([(16, 16), (24, 31), (48, 40)]),
    st.sampled_from(FILTERS[:3]),
)  # fmt: skip
def test_a_strip_shows_what_it_showed_before(
    short: int, ratio: float, tall: bool, size: tuple[int, int], method: str
) -> None:
    width, height = (short, int(short * ratio) + 1) if tall else (int(short * ratio) + 1, short)
    y, x = np.mgrid[:height, :width]
    wave = 120 + 60 * np.sin(x * 6.0 / width * 9) + 60 * np.cos(y * 6.0 / height * 9)
    image, preprocess = Image.fromarray(wave.astype(np.uint8)).convert("RGB"), Preprocess(size, interpolation=method)
    before, now = (np.asarray(f(image, preprocess)).astype(int) for f in (resize_whole, resize_image))
    assert np.abs(before - now).max() <= 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(3, 3000), (3000, 3), (1, 40000), (40000, 1)])
@pytest.mark.parametrize("rotated", [False, True])
def test_a_strip_is_decoded_as_it_is_resized(mode: str, shape: tuple[int, int], rotated: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6 if rotated else 1
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    preprocess = Preprocess((24, 24), resize_mode=mode)
    whole = decode_image(buffer.getvalue())
    assert whole.size == (shape if rotated else shape[::-1])
    expected = resize_image(whole, preprocess)
    assert expected.size == (24, 24)
    kept = decode_image(buffer.getvalue(), preprocess=preprocess)
    np.testing.assert_array_equal(np.asarray(kept), np.asarray(expected))


@pytest.mark.parametrize("size", [(24, 24), (24, 48), (40, 16), (31, 32)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(90, 60), (61, 200), (48, 48), (20, 33)])
def test_models_whose_input_is_not_square_see_what_their_own_transform_shows(
    size: tuple[int, int], mode: str, shape: tuple[int, int]
) -> None:
    import open_clip

    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (*shape, 3), dtype=np.uint8))
    config = open_clip.transform.PreprocessCfg(size=size, resize_mode=mode)
    expected = image
    for step in open_clip.transform.image_transform_v2(config, is_train=False).transforms:
        after = step(expected)
        if not isinstance(after, Image.Image):
            break
        expected = after
    preprocess = Preprocess.from_json(vars(config))
    resized = resize_image(image, preprocess)
    np.testing.assert_array_equal(np.asarray(resized), np.asarray(expected))
    np.testing.assert_array_equal(np.asarray(resize_image(resized, preprocess)), np.asarray(expected))


CHILD = """
import resource, sys
import actcache.sources, PIL.Image
from actcache import ImageSourceError
from actcache.preprocess import Preprocess
from actcache.sources import decode_image, resize_image
from actcache.sources.formats import open_image
preprocess = Preprocess((224, 224), resize_mode=sys.argv[2])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
decode_image(sys.argv[3], preprocess=preprocess)
before = peak()
try:
    print(resize_image(decode_image(sys.argv[1], preprocess=preprocess), preprocess).size)
except ImageSourceError as error:
    print(error)
print(peak() - before)
"""


def measure(path: Path, mode: str) -> tuple[str, int]:
    """What a process of its own prints of an image, and by how many MB its memory grew."""
    small = path.with_name("small.png")
    Image.new("RGB", (300, 200)).save(small)
    command = [sys.executable, "-c", CHILD, str(path), mode, str(small)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    said, grown = done.stdout.splitlines()
    return said, int(grown)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(30000, 2), (1, 60000), (60000, 1), (2, 30000)])
def test_strips_take_little_memory(tmp_path: Path, size: tuple[int, int], mode: str) -> None:
    path = tmp_path / "strip.png"
    Image.new("RGB", size, (10, 200, 30)).save(path)
    said, grown = measure(path, mode)
    assert said == "(224, 224)"
    assert grown < 50


def write_png(path: Path, width: int, height: int) -> None:
    """A gray PNG of zeros, compressed piece by piece."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    packer, n_bytes, packed = zlib.compressobj(1), (width + 1) * height, b""
    piece = bytes(1 << 22)
    while n_bytes > 0:
        packed += packer.compress(piece[: min(n_bytes, len(piece))])
        n_bytes -= len(piece)
    packed += packer.flush()
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b""))


@pytest.mark.parametrize("mode", MODES)
def test_a_row_of_two_million_pixels_is_read(tmp_path: Path, mode: str) -> None:
    write_png(tmp_path / "row.png", 1, 2_000_000)
    said, grown = measure(tmp_path / "row.png", mode)
    assert said == "(224, 224)"
    assert grown < 150


@pytest.mark.parametrize("size", [(1, 100_000_000), (100_000_000, 1), (20_000, 10_000)])
def test_an_image_above_the_limit_is_refused_before_it_is_decoded(tmp_path: Path, size: tuple[int, int]) -> None:
    write_png(tmp_path / "large.png", *size)
    said, grown = measure(tmp_path / "large.png", "shortest")
    assert said.startswith(f"large.png cannot be read: it has {size[0]:,} x {size[1]:,} pixels")
    assert "the limit is 178,956,970" in said
    assert "--max-pixels" in said
    assert grown < 50


@pytest.mark.parametrize("limit", [99, 100, None, 178_956_971])
def test_the_limit_of_pixels_is_exact(limit: int | None) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (10, 10)).save(buffer, "PNG")
    if limit == 99:
        with pytest.raises(ImageSourceError, match="10 x 10 pixels, and the limit is 99"):
            decode_image(buffer.getvalue(), max_pixels=limit)
    else:
        assert decode_image(buffer.getvalue(), max_pixels=limit).size == (10, 10)


def test_a_limit_above_pillows_own_is_ours_alone(tmp_path: Path) -> None:
    write_png(tmp_path / "large.png", 14_000, 13_000)  # 182 million pixels
    assert (
        decode_image(tmp_path / "large.png", max_pixels=200_000_000, preprocess=Preprocess((24, 24))).size[0] == 14_000
    )
    assert Image.MAX_IMAGE_PIXELS == 89_478_485
