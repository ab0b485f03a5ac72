"""A folder of images, flat or in class folders.

In: a directory of JPEG, PNG or WebP files. Out: a plan whose uris are paths relative to it. The plan depends on file
names and sizes, never on the place of the folder or the order in which the disk lists it.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from actcache.errors import ImageSourceError
from actcache.sources.listing import MaskFolder, check_text, encode_labels, list_files, measure_files, read_file
from actcache.sources.plan import ImagePlan, plan_images

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def is_image(name: str) -> bool:
    """Whether a file name is that of an image."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


@dataclass(frozen=True)
class ImageFolder:
    """A directory of images. If there are subfolders, the first folder of a path is the image's class.

    Hidden files, and files with other suffixes, are not images. With `masks`, the pixel mask of `a/b.jpg` is
    `a/b.png` in that folder.
    """

    path: Path
    masks: Path | None = None

    def __init__(self, path: str | Path, *, masks: str | Path | None = None) -> None:
        object.__setattr__(self, "path", Path(path))
        object.__setattr__(self, "masks", None if masks is None else Path(masks))

    def plan(self, *, limit: int | None = None, seed: int = 0, exclude: Collection[str] = ()) -> ImagePlan:
        """List the images in a seeded order. Arguments as `plan_images`.

        Raises:
            ImageSourceError: the directory does not exist or has no images, or a name is a broken link or not UTF-8.
            SettingsError: `limit` is below 1 or `seed` below 0.
        """
        if not self.path.is_dir():
            raise ImageSourceError(f"{self.path} is not a directory. Expected a folder of images; check the path.")
        names = list_files(self.path, SUFFIXES)
        if not names:
            raise ImageSourceError(
                f"{self.path} holds no images. Expected files ending in {', '.join(SUFFIXES)}, "
                "in the folder itself or in one folder per class."
            )
        check_text(names)
        sizes = measure_files([f"{self.path}{os.sep}{name}" for name in names], names, self.path.name)
        uris = pa.array(names, pa.string())
        folders = pc.if_else(pc.match_substring(uris, "/"), pc.replace_substring_regex(uris, "(?s)/.*", ""), "")
        label, label_name = encode_labels(folders, None, self.path.name)
        listing = pa.table({"uri": uris, "label": label, "label_name": label_name, "bytes": sizes})
        if self.masks is not None:
            listing = listing.append_column("mask", MaskFolder(self.masks).match(uris))
        return plan_images(listing, limit=limit, seed=seed, exclude=exclude)

    def read(self, uri: str) -> bytes:
        """The file of an image. Raises ImageSourceError."""
        return read_file(self.path / uri, uri)

    def read_mask(self, uri: str) -> NDArray[np.uint8] | None:
        """Pixel mask [H, W], or None if there is none. Raises ImageSourceError."""
        return None if self.masks is None else MaskFolder(self.masks).read(uri)
