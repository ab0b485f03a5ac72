"""Decoding: encoded bytes become PIL images and pixel masks.

Whatever a decoder raises is the failure of that image, reported in one line that names it. What Pillow reads of a file
is decided in `formats`, what 16 bits and floating-point numbers mean in `depths`.
"""

import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ImageSourceError
from actcache.preprocess import MAX_PIXELS, Preprocess
from actcache.sources.depths import find_levels, read_depth, reduce_depth
from actcache.sources.files import read_file
from actcache.sources.formats import FORMATS, open_image
from actcache.sources.resizing import find_crop, is_strip, resize_crop, resize_strip

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")

MIN_SIDE = 4
"""A shorter side counts as this many pixels: Pillow keeps a pointer of 8 bytes for each row, however short it is."""

_ORIENTATION = 274
_WITHOUT_WARNINGS = threading.Lock()
"""Held while the filters of warnings are changed, which are the whole process's."""

_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA", "P": "RGBA", "PA": "RGBA"}
"""Modes that become RGB by way of another; `convert` warns about palettes whose transparency is given as bytes."""


def decode_image(
    image: str | Path | bytes,
    *,
    name: str | None = None,
    max_pixels: int | None = MAX_PIXELS,
    preprocess: Preprocess | None = None,
) -> "Image.Image":
    """Read one image as upright RGB.

    The EXIF orientation is applied; grayscale, palette, CMYK and alpha become RGB as `PIL.Image.convert` does
    (alpha is dropped, as CLIP's own preprocessing drops it). Of 16 bits the upper 8 are kept; see `depths` for images
    whose file says that fewer bits are used, and for those that are refused.

    Args:
        image: a file, or its bytes.
        name: how messages call it; the file's own name when None.
        max_pixels: an image with more pixels is refused before it is decoded; None for no limit.
        preprocess: how the image will be resized. With it a strip, for which resizing would take gigabytes, is returned
            resized to `Preprocess.scale`, so that the model's transform only crops it; other images are not changed.

    Raises:
        ImageSourceError: the file is missing, damaged, not an image, too large, or does not say what its values mean.
    """

    def convert(opened: Any, data: bytes) -> "Image.Image":
        depth = read_depth(opened, data)
        upright = _load_upright(opened)
        levels = find_levels(upright, depth)
        size, crop = upright.size, None
        if preprocess is not None and (crop := find_crop(*size, preprocess)) is not None:
            upright = upright.crop(crop)  # before its mode is converted, which takes memory too
        if levels is not None:
            upright = reduce_depth(upright, depth, levels)
        elif upright.mode in _PREMULTIPLIED:
            upright = upright.convert(_PREMULTIPLIED[upright.mode])
        rgb = upright.convert("RGB")
        if crop is not None and preprocess is not None:
            return resize_crop(rgb, crop, size, preprocess)
        return resize_strip(rgb, preprocess) if preprocess is not None and is_strip(*size) else rgb

    return _decode(image, name, convert, FORMATS, max_pixels)


def decode_mask(mask: str | Path | bytes, *, name: str | None = None) -> NDArray[np.uint8]:
    """Read a pixel mask, a PNG of class or object numbers [H, W]: palette indices or gray values, never scaled.

    Raises:
        ImageSourceError: it cannot be read, is not a PNG, is in color, or holds numbers above 255.
    """

    def convert(opened: Any, data: bytes) -> NDArray[np.uint8]:
        if opened.format != "PNG" or opened.mode not in ("1", "L", "P", "I", "I;16"):
            raise ValueError(f"a mask must be a palette or gray PNG, but this is {opened.format} {opened.mode}")
        opened.load()
        values = np.asarray(opened)
        if values.max(initial=0) > 255:
            raise ValueError(f"a mask must hold numbers up to 255, but this one has {values.max()}")
        # PIL scales 2 and 4 bits of gray to 0..255; byte 24 of the header holds the number of bits.
        depth = data[24] if len(data) > 24 else 8
        stretch = {2: 85, 4: 17}.get(depth, 1) if opened.mode == "L" else 1
        return (values // stretch).astype(np.uint8)

    return _decode(mask, name, convert, FORMATS, MAX_PIXELS)


def _load_upright(opened: Any) -> "Image.Image":
    """Load the pixels and turn them as the EXIF orientation says. Unreadable EXIF is ignored; none is rewritten."""
    from PIL import Image

    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    number: Any = None
    if opened.format == "TIFF":
        number = _ignore_errors(lambda: opened.tag_v2.get(_ORIENTATION))
        opened.load_end = lambda: None  # Pillow's own would read all EXIF, turn the image, and write EXIF again
    opened.load()
    if opened.format != "TIFF":  # a PNG may have its EXIF behind the pixels
        number = _ignore_errors(lambda: opened.getexif().get(_ORIENTATION))
    turn = turns.get(number) if isinstance(number, int) else None
    upright: Image.Image = opened if turn is None else opened.transpose(turn)
    return upright


def _ignore_errors(read: Callable[[], T]) -> T | None:
    try:
        return read()
    except Exception:  # EXIF is written by so many programs that every class of error occurs
        return None


def _decode(
    image: str | Path | bytes,
    name: str | None,
    convert: Callable[[Any, bytes], T],
    formats: tuple[str, ...],
    max_pixels: int | None,
) -> T:
    """Open an image and convert it; whatever fails becomes one line that names the image without its folder."""
    name = name or ("image" if isinstance(image, bytes) else Path(image).name)
    data = image if isinstance(image, bytes) else read_file(image, name)

    def open_and_convert() -> T:
        with open_image(data, formats) as opened:
            _check_size(*opened.size, max_pixels)
            return convert(opened, data)

    try:
        try:
            return open_and_convert()
        except Warning:  # it was raised because the process treats warnings as errors; the pixels may be fine
            with _WITHOUT_WARNINGS, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return open_and_convert()
    except Exception as error:  # decoders raise struct.error, TypeError, RuntimeError, MemoryError and many others
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageSourceError(f"{name} cannot be read: {reason.rstrip('.')}.") from error


def _check_size(width: int, height: int, max_pixels: int | None) -> None:
    n_pixels = max(width, MIN_SIDE) * max(height, MIN_SIDE)
    if max_pixels is not None and n_pixels > max_pixels:
        counted = "" if min(width, height) >= MIN_SIDE else f", which take the memory of {n_pixels:,}"
        raise ValueError(
            f"it has {width:,} x {height:,} pixels{counted}, and the limit is {max_pixels:,}. "
            "Make it smaller, or raise the limit with `extract --max-pixels`"
        )


def describe_failures(failed: Sequence[tuple[str, str]], limit: int = 10) -> str:
    """`a.jpg (truncated), b.jpg (...) and 3 more` for (uri, reason) pairs."""
    shown = "; ".join(reason for _, reason in failed[:limit])
    more = f"; and {len(failed) - limit} more" if len(failed) > limit else ""
    return shown + more
