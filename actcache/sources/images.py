"""Decoding and resizing: encoded bytes become PIL images and pixel masks, as the model sees them."""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ImageSourceError
from actcache.preprocess import Preprocess

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")


def decode_image(image: str | Path | bytes, *, name: str | None = None) -> "Image.Image":
    """Read one image as upright RGB.

    The EXIF orientation is applied; grayscale, palette, CMYK and alpha become RGB as `PIL.Image.convert` does
    (alpha is dropped, as CLIP's own preprocessing drops it). For 16-bit gray the upper byte is kept, as PIL does
    for 16-bit color; PIL's `convert` would make everything above 255 white.

    Args:
        image: a file, or its bytes.
        name: how messages call it; the file's own name when None.

    Raises:
        ImageSourceError: the file is missing, truncated, not an image, or has more pixels than PIL allows.
    """
    from PIL import Image, ImageOps

    def convert(opened: "Image.Image") -> "Image.Image":
        upright = ImageOps.exif_transpose(opened)
        if upright.mode == "P":  # convert() warns about palettes whose transparency is given as bytes
            upright = upright.convert("RGBA")
        elif upright.mode.startswith("I"):
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        return upright.convert("RGB")

    return _decode(image, name, convert)


def decode_mask(mask: str | Path | bytes, *, name: str | None = None) -> NDArray[np.uint8]:
    """Read a pixel mask, a PNG of class or object numbers [H, W]: palette indices or gray values, never scaled.

    Raises:
        ImageSourceError: it cannot be read, is not a PNG, is in color, or holds numbers above 255.
    """

    def convert(opened: "Image.Image") -> NDArray[np.uint8]:
        if opened.format != "PNG" or opened.mode not in ("1", "L", "P", "I", "I;16"):
            raise ValueError(f"a mask must be a palette or gray PNG, but this is {opened.format} {opened.mode}")
        values = np.asarray(opened)
        if values.max(initial=0) > 255:
            raise ValueError(f"a mask must hold numbers up to 255, but this one has {values.max()}")
        # PIL scales 2 and 4 bits of gray to 0..255; byte 24 of the header holds the number of bits.
        stretch = {2: 85, 4: 17}.get(depth, 1) if opened.mode == "L" else 1
        return (values // stretch).astype(np.uint8)

    if not isinstance(mask, bytes):
        name = name or Path(mask).name
        mask = _read(Path(mask), name)
    depth = mask[24] if len(mask) > 24 else 8
    return _decode(mask, name, convert)


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageSourceError(f"{name} cannot be read: {error.strerror}.") from error


def _decode(image: str | Path | bytes, name: str | None, convert: "Callable[[Image.Image], T]") -> T:
    """Load an image and convert it; PIL's errors become one line that names the image without its folder."""
    from PIL import Image, UnidentifiedImageError

    name = name or ("image" if isinstance(image, bytes) else Path(image).name)
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            opened.load()
            return convert(opened)
    except UnidentifiedImageError as error:
        raise ImageSourceError(
            f"{name} cannot be read: it is not an image, or PIL does not know its format."
        ) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).replace(str(image), name) if not isinstance(image, bytes) else str(error)
        raise ImageSourceError(f"{name} cannot be read: {reason or type(error).__name__}.") from error


def resize_image(image: "Image.Image", preprocess: Preprocess) -> "Image.Image":
    """Crop an image to the rectangle that the model sees, pixel for pixel as open_clip's transform does."""
    from PIL import Image

    height, width = preprocess.size
    method = Image.Resampling[preprocess.interpolation.upper()]
    if preprocess.resize_mode == "squash":
        return image.resize((width, height), method)
    if preprocess.resize_mode == "longest":
        ratio = max(image.width / width, image.height / height)
        small = image.resize((round(image.width / ratio), round(image.height / ratio)), method)
        canvas = Image.new("RGB", (width, height), (preprocess.fill_color,) * 3)
        canvas.paste(small, ((width - small.width) // 2, (height - small.height) // 2))
        return canvas
    short = min(image.size)
    scaled = (int(width * image.width / short), int(width * image.height / short))
    resized = image.resize(scaled, method)
    left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
    return resized.crop((left, top, left + width, top + height))


def resize_mask(mask: NDArray[np.uint8], preprocess: Preprocess) -> NDArray[np.uint8]:
    """Crop a pixel mask [H, W] as the model's image, [height, width]; numbers are never mixed, and padding is 0."""
    from PIL import Image

    cut = resize_image(Image.fromarray(mask), replace(preprocess, interpolation="nearest", fill_color=0))
    pixels = np.asarray(cut)
    return pixels if pixels.ndim == 2 else pixels[..., 0]


def describe_failures(failed: Sequence[tuple[str, str]], limit: int = 10) -> str:
    """`a.jpg (truncated), b.jpg (...) and 3 more` for (uri, reason) pairs."""
    shown = "; ".join(reason for _, reason in failed[:limit])
    more = f"; and {len(failed) - limit} more" if len(failed) > limit else ""
    return shown + more
