"""Images in: a folder becomes an ordered plan, a file becomes pixels.

In: a directory of JPEG, PNG or WebP files, flat or in class folders. Out: `ImagePlan` (the rows of images.parquet
in stored order) and decoded PIL images. The plan depends on file names, file sizes, seed and limit only; no pixel
is read for it.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from actcache.artifact import (
    digest,
)
from actcache.errors import ImageSourceError, SettingsError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

IMAGES_SCHEMA = pa.schema(
    [
        ("source_index", pa.int64()),  # position in the sorted listing
        ("uri", pa.string()),  # path relative to the source, with /
        ("label", pa.int32()),  # index into the sorted class names; -1 without class folders
        ("label_name", pa.string()),  # class folder; "" without
        ("bytes", pa.int64()),  # file size
    ]
)


@dataclass(frozen=True)
class ImagePlan:
    """Which images, in which stored order. `rows_id` names both: equal ids join row by row."""

    table: pa.Table
    rows_id: str
    seed: int

    @property
    def n_images(self) -> int:
        return int(self.table.num_rows)


@dataclass(frozen=True)
class ImageFolder:
    """A directory of images. With subfolders, the first folder of a path is the image's class.

    Hidden files, and files with other suffixes, are not images.
    """

    path: Path

    def __init__(self, path: str | Path) -> None:
        object.__setattr__(self, "path", Path(path))

    def plan(self, *, limit: int | None = None, seed: int = 0) -> ImagePlan:
        """List the images and put them in a seeded random order (folder order is class order).

        Args:
            limit: keep only the first `limit` images of that order: a random sample.

        Raises:
            ImageSourceError: no such directory, no image in it, or a name that leads nowhere or is not UTF-8.
            SettingsError: `limit` is below 1 or `seed` below 0.
        """
        if limit is not None and limit < 1:
            raise SettingsError(f"--limit must be at least 1, got {limit}.")
        if seed < 0:
            raise SettingsError(f"--seed must not be negative, got {seed}.")
        names = self._list()
        sizes = [_size(self.path, name) for name in names]
        folders = [name.split("/")[0] if "/" in name else "" for name in names]
        classes = sorted({folder for folder in folders if folder})
        index = {folder: i for i, folder in enumerate(classes)}
        order = np.random.Generator(np.random.Philox(seed)).permutation(len(names))[:limit]
        table = pa.table(
            {
                "source_index": order.astype(np.int64),
                "uri": [names[i] for i in order],
                "label": np.array([index.get(folders[i], -1) for i in order], dtype=np.int32),
                "label_name": [folders[i] for i in order],
                "bytes": np.array([sizes[i] for i in order], dtype=np.int64),
            },
            schema=IMAGES_SCHEMA,
        )
        listing = [[name, size] for name, size in zip(names, sizes, strict=True)]
        return ImagePlan(table, digest({"images": listing, "seed": seed, "limit": limit}), seed)

    def _list(self) -> list[str]:
        if not self.path.is_dir():
            raise ImageSourceError(f"{self.path} is not a directory. Expected a folder of images; check the path.")
        names = []
        for folder, folders, files in os.walk(self.path, followlinks=True):
            above = {os.path.realpath(folder), *_parents(os.path.realpath(folder))}
            folders[:] = sorted(
                name
                for name in folders
                if not name.startswith(".") and os.path.realpath(os.path.join(folder, name)) not in above  # a loop
            )
            names += [
                os.path.relpath(os.path.join(folder, name), self.path).replace(os.sep, "/")
                for name in files
                if name.lower().endswith(SUFFIXES) and not name.startswith(".")
            ]
        if not names:
            raise ImageSourceError(
                f"{self.path} holds no images. Expected files ending in {', '.join(SUFFIXES)}, "
                "in the folder itself or in one folder a class."
            )
        return sorted(names)


def _parents(path: str) -> set[str]:
    return {str(parent) for parent in Path(path).parents}


def _size(folder: Path, name: str) -> int:
    """Bytes of a listed file. Raises ImageSourceError where a plan could not name it."""
    try:
        name.encode()
        return os.stat(folder / name).st_size
    except UnicodeEncodeError as error:
        raise ImageSourceError(f"{name!r} is not a UTF-8 file name. Rename it.") from error
    except OSError as error:
        raise ImageSourceError(f"{name} cannot be read: {error.strerror}. Repair or remove it.") from error


def decode_image(path: str | Path) -> "Image.Image":
    """Read one image as upright RGB.

    The EXIF orientation is applied; grayscale, palette, CMYK and alpha become RGB as `PIL.Image.convert` does
    (alpha is dropped, as CLIP's own preprocessing drops it). Of 16-bit gray the upper byte is kept, as PIL does for
    16-bit color; its own `convert` would make everything above 255 white.

    Raises:
        ImageSourceError: the file is missing, truncated, not an image, or has more pixels than PIL allows.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode == "P":  # convert() warns of palettes whose transparency is given as bytes
                upright = upright.convert("RGBA")
            elif upright.mode.startswith("I"):
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return upright.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).replace(str(path), Path(path).name) or type(error).__name__
        raise ImageSourceError(f"{Path(path).name} cannot be read: {reason}.") from error


def resize_image(image: "Image.Image", preprocess: dict[str, Any]) -> "Image.Image":
    """Cut an image to the square (or rectangle) the model sees, pixel for pixel as open_clip's transform does.

    Args:
        preprocess: open_clip's fields: size, resize_mode (shortest | squash | longest), interpolation, fill_color.
    """
    from PIL import Image

    size = preprocess["size"]
    height, width = (size, size) if isinstance(size, int) else size
    method = Image.Resampling[preprocess["interpolation"].upper()]
    if preprocess["resize_mode"] == "squash":
        return image.resize((width, height), method)
    if preprocess["resize_mode"] == "longest":
        ratio = max(image.width / width, image.height / height)
        small = image.resize((round(image.width / ratio), round(image.height / ratio)), method)
        canvas = Image.new("RGB", (width, height), (preprocess["fill_color"],) * 3)
        canvas.paste(small, ((width - small.width) // 2, (height - small.height) // 2))
        return canvas
    short = min(image.size)
    scaled = (int(width * image.width / short), int(width * image.height / short))
    resized = image.resize(scaled, method)
    left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
    return resized.crop((left, top, left + width, top + height))


def describe_failures(failed: Sequence[tuple[str, str]], limit: int = 10) -> str:
    """`a.jpg (truncated), b.jpg (...) and 3 more` for (uri, reason) pairs."""
    shown = "; ".join(reason for _, reason in failed[:limit])
    more = f"; and {len(failed) - limit} more" if len(failed) > limit else ""
    return shown + more
