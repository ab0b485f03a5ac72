"""Resizing: the rectangle of an image that the model sees, at the model's size.

Images of usual shapes are resized and then cropped, pixel for pixel as the transform of open_clip or timm does. A strip
is cropped first, because its resized form would need gigabytes: 30,000 x 2 pixels become 3,360,000 x 224. What is
returned of a strip has the size `Preprocess.scale`, so that the library's transform does no more than crop it.
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
for a 336-pixel model takes 14 MB. A strip may differ from the library's transform in rounding, since Pillow chooses by
the size of an image whether it resizes rows or columns first."""


def is_strip(width: int, height: int) -> bool:
    return max(width, height) > STRIP_RATIO * min(width, height)


def find_crop(width: int, height: int, preprocess: Preprocess) -> tuple[int, int, int, int] | None:
    """The part (left, top, right, bottom) of a strip that has an influence on what the model sees; None if it is all
    of the image, or no strip."""
    if not is_strip(width, height) or preprocess.fit in ("squash", "longest"):
        return None
    rows, columns = preprocess.scale
    box = _seen_box(width, height, preprocess)
    # A bicubic or Lanczos filter reaches at most 3 output pixels beyond the box.
    reach = [3 * max(1.0, (box[2] - box[0]) / columns), 3 * max(1.0, (box[3] - box[1]) / rows)]
    return (
        max(0, math.floor(box[0] - reach[0]) - 1),
        max(0, math.floor(box[1] - reach[1]) - 1),
        min(width, math.ceil(box[2] + reach[0]) + 1),
        min(height, math.ceil(box[3] + reach[1]) + 1),
    )


def _seen_box(width: int, height: int, preprocess: Preprocess) -> tuple[float, float, float, float]:
    """The center of size `scale` of an image whose shorter side is resized, in the image's own pixels."""
    scaled = _scaled_size(width, height, preprocess)
    left, top, right, bottom = _center(scaled, preprocess.scale)
    across, down = width / scaled[0], height / scaled[1]
    return left * across, top * down, right * across, bottom * down


def _center(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int, int, int]:
    """The central rectangle (left, top, right, bottom) of an image of size (width, height). target: (rows, columns)."""
    rows, columns = target
    left, top = round((size[0] - columns) / 2), round((size[1] - rows) / 2)
    return left, top, left + columns, top + rows


def _scaled_size(width: int, height: int, preprocess: Preprocess) -> tuple[int, int]:
    rows, columns = preprocess.scale
    if rows == columns:
        short = min(width, height)
        return int(columns * width / short), int(rows * height / short)
    ratio = min(width / columns, height / rows)  # as both libraries have it for models whose input is not square
    return round(width / ratio), round(height / ratio)


def resize_image(image: "Image.Image", preprocess: Preprocess) -> "Image.Image":
    """Crop an image to the rectangle that the model sees, pixel for pixel as the library's transform does.

    See `STRIP_RATIO` for the exception.
    """
    return _resize(image, preprocess, preprocess.size)


def resize_strip(image: "Image.Image", preprocess: Preprocess) -> "Image.Image":
    """A strip at the size `scale`, of which the library's transform then crops the center."""
    return _resize(image, preprocess, preprocess.scale)


def _resize(image: "Image.Image", preprocess: Preprocess, target: tuple[int, int]) -> "Image.Image":
    """Fit an image to `scale`, then crop its center to `target` or pad it. target: (rows, columns)."""
    from PIL import Image

    height, width = preprocess.scale
    method = Image.Resampling[preprocess.interpolation.upper()]
    if preprocess.fit == "squash":
        if is_strip(*image.size):  # Pillow resizes rows first, which a tall strip has too many of
            image = image.resize((image.width, height), method)
        return _cut(image.resize((width, height), method), target)
    if preprocess.fit == "longest":
        ratio = max(image.width / width, image.height / height)
        small = (max(1, round(image.width / ratio)), max(1, round(image.height / ratio)))
        if is_strip(*image.size):
            image = image.resize((image.width, small[1]), method)
        image = image.resize(small, method)
        canvas = Image.new("RGB", (target[1], target[0]), preprocess.fill)
        canvas.paste(image, (_place(image.width, target[1]), _place(image.height, target[0])))
        return canvas
    crop = find_crop(*image.size, preprocess)
    if crop is not None:
        return _cut(resize_crop(image.crop(crop), crop, image.size, preprocess), target)
    return _cut(image.resize(_scaled_size(*image.size, preprocess), method), target)


def _cut(image: "Image.Image", target: tuple[int, int]) -> "Image.Image":
    return image if image.size == target[::-1] else image.crop(_center(image.size, target))


def _place(side: int, target: int) -> int:
    """Where a side of an image begins in a canvas: centered, half a pixel towards the beginning where it is odd."""
    return (target - side) // 2 if side <= target else -round((side - target) / 2)


def resize_crop(
    part: "Image.Image", crop: tuple[int, int, int, int], size: tuple[int, int], preprocess: Preprocess
) -> "Image.Image":
    """Resize the part of a strip that `find_crop` returned. size: width and height of the whole image."""
    from PIL import Image

    box = _seen_box(*size, preprocess)
    within = (
        max(0.0, box[0] - crop[0]),
        max(0.0, box[1] - crop[1]),
        min(float(part.width), box[2] - crop[0]),
        min(float(part.height), box[3] - crop[1]),
    )
    method = Image.Resampling[preprocess.interpolation.upper()]
    return part.resize((preprocess.scale[1], preprocess.scale[0]), method, within)


def resize_mask(mask: NDArray[np.uint8], preprocess: Preprocess) -> NDArray[np.uint8]:
    """Crop a pixel mask [H, W] as the model's image, [height, width]; numbers are never mixed, and padding is 0."""
    from PIL import Image

    unpadded = replace(preprocess, interpolation="nearest", fill_color=0, mean=(0.0, 0.0, 0.0))  # timm pads by the mean
    cut = resize_image(Image.fromarray(mask), unpadded)
    pixels = np.asarray(cut)
    return pixels if pixels.ndim == 2 else pixels[..., 0]
