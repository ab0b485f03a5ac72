"""Pictures: what the model saw of an image, as a small JPEG, and a heat map as a transparent PNG."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from actcache import ParentMismatchError, decode_image, resize_image

THUMBNAIL_PIXELS = 160


def make_thumbnail(folder: Path, uri: str, n_bytes: int, preprocess: dict[str, Any]) -> bytes:
    """JPEG of the part of an image that the model sees, at most 160 pixels wide.

    Raises:
        ParentMismatchError: the file is missing, or has another size than the one that was extracted.
        ImageSourceError: it cannot be read.
    """
    path = folder / uri
    if not path.is_file() or path.stat().st_size != n_bytes:
        found = f"has {path.stat().st_size:,} bytes" if path.is_file() else "is missing"
        raise ParentMismatchError(
            f"{uri} {found} in {folder}; the codes were made from a file of {n_bytes:,} bytes. "
            "Give the folder of the extracted images with --images."
        )
    image = resize_image(decode_image(path), preprocess)
    if image.width > THUMBNAIL_PIXELS:
        image = image.resize((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS * image.height // image.width))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    return buffer.getvalue()


def draw_heat_map(heat: NDArray[np.floating[Any]], maximum: float) -> bytes:
    """PNG [rows, columns], one pixel a patch: black where the latent is silent, clear where it is strongest.

    Laid over the image it darkens everything the latent does not see.
    """
    share = np.clip(heat / max(maximum, 1e-12), 0, 1)
    pixels = np.zeros((*heat.shape, 4), dtype=np.uint8)
    pixels[..., 3] = np.round(215 * (1 - np.sqrt(share)))
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, format="PNG")
    return buffer.getvalue()
