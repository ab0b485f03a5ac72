"""Resizing: the rectangle of an image that the model sees, at the model's size.

Images of usual shapes are resized and then cropped, pixel for pixel as open_clip's transform does. A strip is cropped
first, because its resized form would need gigabytes: 30,000 x 2 pixels become 3,360,000 x 224.
"""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actcache.preprocess import Preprocess

if TYPE_CHECKING:
    from PIL import Image

STRIP_RATIO = 32
"""An image whose longer side is more than this many times its shorter one is a strip. At this ratio the resized form
for a 336-pixel model takes 14 MB. A strip may differ from open_clip's transform in rounding, since Pillow chooses by
the size of an image whether it resizes rows or columns first."""


def is_strip(width: int, height: int) -> bool:
    return max(width, height) > STRIP_RATIO * min(width, height)


def find_crop(width: int, height: int, preprocess: Preprocess) -> tuple[int, int, int, int] | None:
    """The part (left, top, right, bottom) of a strip that has an influence on what the model sees; None if it is all
    of the image, or no strip."""
    if not is_strip(width, height) or preprocess.resize_mode in ("squash", "longest"):
        return None
    box, _ = _seen_box(width, height, preprocess)
    # A bicubic or Lanczos filter reaches at most 3 output pixels beyond the box.
    reach = [3 * max(1.0, (box[2] - box[0]) / preprocess.size[1]), 3 * max(1.0, (box[3] - box[1]) / preprocess.size[0])]
    return (
        max(0, math.floor(box[0] - reach[0]) - 1),
        max(0, math.floor(box[1] - reach[1]) - 1),
        min(width, math.ceil(box[2] + reach[0]) + 1),
        min(height, math.ceil(box[3] + reach[1]) + 1),
    )


def _seen_box(
    width: int, height: int, preprocess: Preprocess
) -> tuple[tuple[float, float, float, float], tuple[int, int, int, int]]:
    """What the model sees of an image whose shorter side is resized: in its own pixels, and in resized pixels."""
    rows, columns = preprocess.size
    scaled = _scaled_size(width, height, preprocess)
    left, top = round((scaled[0] - columns) / 2), round((scaled[1] - rows) / 2)
    across, down = width / scaled[0], height / scaled[1]
    seen = (left, top, left + columns, top + rows)
    return (left * across, top * down, seen[2] * across, seen[3] * down), seen


def _scaled_size(width: int, height: int, preprocess: Preprocess) -> tuple[int, int]:
    rows, columns = preprocess.size
    if rows == columns:
        short = min(width, height)
        return int(columns * width / short), int(rows * height / short)
    ratio = min(width / columns, height / rows)  # as open_clip has it for models whose input is not square
    return round(width / ratio), round(height / ratio)


def resize_image(image: "Image.Image", preprocess: Preprocess) -> "Image.Image":
    """Crop an image to the rectangle that the model sees, pixel for pixel as open_clip's transform does.

    See `STRIP_RATIO` for the exception.
    """
    from PIL import Image

    height, width = preprocess.size
    method = Image.Resampling[preprocess.interpolation.upper()]
    if preprocess.resize_mode == "squash":
        if is_strip(*image.size):  # Pillow resizes rows first, which a tall strip has too many of
            image = image.resize((image.width, height), method)
        return image.resize((width, height), method)
    if preprocess.resize_mode == "longest":
        ratio = max(image.width / width, image.height / height)
        small = (max(1, round(image.width / ratio)), max(1, round(image.height / ratio)))
        if is_strip(*image.size):
            image = image.resize((image.width, small[1]), method)
        image = image.resize(small, method)
        canvas = Image.new("RGB", (width, height), (preprocess.fill_color,) * 3)
        canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        return canvas
    crop = find_crop(*image.size, preprocess)
    if crop is not None:
        return resize_crop(image.crop(crop), crop, image.size, preprocess)
    _, seen = _seen_box(*image.size, preprocess)
    return image.resize(_scaled_size(*image.size, preprocess), method).crop(seen)


def resize_crop(
    part: "Image.Image", crop: tuple[int, int, int, int], size: tuple[int, int], preprocess: Preprocess
) -> "Image.Image":
    """Resize the part of a strip that `find_crop` returned. size: width and height of the whole image."""
    from PIL import Image

    box, _ = _seen_box(*size, preprocess)
    within = (
        max(0.0, box[0] - crop[0]),
        max(0.0, box[1] - crop[1]),
        min(float(part.width), box[2] - crop[0]),
        min(float(part.height), box[3] - crop[1]),
    )
    method = Image.Resampling[preprocess.interpolation.upper()]
    return part.resize((preprocess.size[1], preprocess.size[0]), method, within)


def resize_mask(mask: NDArray[np.uint8], preprocess: Preprocess) -> NDArray[np.uint8]:
    """Crop a pixel mask [H, W] as the model's image, [height, width]; numbers are never mixed, and padding is 0."""
    from PIL import Image

    cut = resize_image(Image.fromarray(mask), replace(preprocess, interpolation="nearest", fill_color=0))
    pixels = np.asarray(cut)
    return pixels if pixels.ndim == 2 else pixels[..., 0]
