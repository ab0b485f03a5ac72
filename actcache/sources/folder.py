"""A folder of images, flat or in class folders.

In: a directory of images. Out: a plan whose uris are paths relative to it. The plan depends on file names and sizes,
never on the place of the folder or the order in which the disk lists it.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from actcache.errors import ImageSourceError
from actcache.sources.files import read_file
from actcache.sources.formats import SUFFIXES
from actcache.sources.listing import MaskFolder, check_text, encode_labels, list_files, measure_files
from actcache.sources.plan import ImagePlan, plan_images

SPLITS = frozenset({
    "train", "training", "val", "valid", "validate", "validation", "dev", "test", "testing", "eval", "evaluation",
    "holdout", "held_out", "unlabeled",
})  # fmt: skip
"""Names, in lower case, of folders that hold a part of a data set rather than a class."""

EARLIER_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
"""What versions before the list of formats took for images."""


@dataclass(frozen=True)
class ImageFolder:
    """A directory of images, in which folders are classes.

    By default the first folder of a path is the class of the image. Where all first folders are named after parts of
    a data set (`SPLITS`) and hold further folders, they become the column `split`, and the second folder is the class.

    Hidden files, files of the operating system, and files with other suffixes are left out. With `masks`, the pixel
    mask of `a/b.jpg` is `a/b.png` in that folder.

    Attributes:
        class_level: which folder of a path is the class: 1 for the first, 2 for the second ..., -1 for the one that
            holds the image, -2 for the one above ..., 0 for no classes; None to decide as above.
        suffixes: how the names of images end, in lower case.
    """

    path: Path
    masks: Path | None = None
    class_level: int | None = None
    suffixes: tuple[str, ...] = SUFFIXES

    def __init__(
        self, path: str | Path, *, masks: str | Path | None = None, class_level: int | None = None,
        suffixes: tuple[str, ...] = SUFFIXES,
    ) -> None:  # fmt: skip
        object.__setattr__(self, "path", Path(path))
        object.__setattr__(self, "masks", None if masks is None else Path(masks))
        object.__setattr__(self, "class_level", class_level)
        object.__setattr__(self, "suffixes", suffixes)

    def listed_earlier(self) -> "ImageFolder":
        """The same folder as versions listed it that knew fewer suffixes; their stores are resumed and repaired."""
        return replace(self, suffixes=EARLIER_SUFFIXES)

    def plan(self, *, limit: int | None = None, seed: int = 0, exclude: Collection[str] = ()) -> ImagePlan:
        """List the images in a seeded order. Arguments as `plan_images`.

        Raises:
            ImageSourceError: the directory does not exist or has no images, no image has a folder at `class_level`, or
                a name is a broken link or not UTF-8.
            SettingsError: `limit` is below 1 or `seed` below 0.
        """
        if not self.path.is_dir():
            raise ImageSourceError(f"{self.path} is not a directory. Expected a folder of images; check the path.")
        names, left_out = list_files(self.path, self.suffixes)
        if not names:
            raise ImageSourceError(
                f"{self.path} holds no images{_describe(left_out)}. Expected files ending in "
                f"{', '.join(self.suffixes)}, "
                "in the folder itself or in one folder per class."
            )
        check_text(names)
        sizes = measure_files([f"{self.path}{os.sep}{name}" for name in names], names, self.path.name)
        uris = pa.array(names, pa.string())
        first = _folder_at(uris, 1)
        has_splits = self.class_level != 1 and _are_splits(first, uris)
        level = self.class_level if self.class_level is not None else 2 if has_splits else 1
        classes = _folder_at(uris, level)
        if self.class_level and not pc.any(pc.not_equal(classes, "")).as_py():
            raise ImageSourceError(
                f"No image of {self.path.name} has a folder at --class-level {level}, such as {names[0]}. "
                "Expected a level that the paths have."
            )
        label, label_name = encode_labels(classes, None, self.path.name)
        listing = pa.table({"uri": uris, "label": label, "label_name": label_name, "bytes": sizes})
        if self.masks is not None:
            listing = listing.append_column("mask", MaskFolder(self.masks).match(uris))
        if has_splits:
            listing = listing.append_column("split", first)
        return plan_images(listing, limit=limit, seed=seed, exclude=exclude, left_out=left_out)

    def read(self, uri: str) -> bytes:
        """The file of an image. Raises ImageSourceError."""
        return read_file(self.path / uri, uri)

    def read_mask(self, uri: str) -> NDArray[np.uint8] | None:
        """Pixel mask [H, W], or None if there is none. Raises ImageSourceError."""
        return None if self.masks is None else MaskFolder(self.masks).read(uri)


def _describe(left_out: dict[str, int]) -> str:
    return f" (left out: {', '.join(f'{n:,} {kind}' for kind, n in left_out.items())})" if left_out else ""


def _folder_at(uris: Any, level: int) -> Any:
    """The folder of each path at a level (see `ImageFolder.class_level`); "" where a path has none there."""
    if level == 0:
        return pa.repeat("", len(uris))
    between = f"(?:[^/]*/){{{abs(level) - 1}}}"
    ahead, behind = (between, ".*") if level > 0 else ("(?:.*/)?", f"{between}[^/]*")
    found = pc.extract_regex(uris, f"(?s)^{ahead}(?P<folder>[^/]*)/{behind}$")
    return pc.fill_null(pc.struct_field(found, "folder"), "")


def _are_splits(first: Any, uris: Any) -> bool:
    """Whether all first folders are named after parts of a data set, and one of them has folders in it."""
    names = pc.unique(first).to_pylist()
    if not all(name.lower() in SPLITS for name in names):
        return False
    return bool(pc.any(pc.not_equal(_folder_at(uris, 2), "")).as_py())
