"""open_source(): the image source at a path.

In: a path, or a source that is already open. Out: an object with `path`, `plan`, `read` and `read_mask`. File names
alone decide the kind of source; an ambiguous folder is an error.
"""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ImageSourceError, SettingsError
from actcache.sources.folder import ImageFolder
from actcache.sources.formats import is_image, is_system_name
from actcache.sources.hugging_face import HuggingFaceDataset
from actcache.sources.plan import ImagePlan
from actcache.sources.table import TABLE_SUFFIXES, ImageTable
from actcache.sources.tars import ImageTars


@runtime_checkable
class ImageSource(Protocol):
    """Where images come from. A source of your own needs these four members."""

    @property
    def path(self) -> Path:
        """Its path, which is recorded as the store's parent."""

    def plan(self, *, limit: int | None = None, seed: int = 0, exclude: Collection[str] = ()) -> ImagePlan:
        """List the images in a seeded order, without reading any. See `plan_images`."""

    def read(self, uri: str) -> bytes:
        """The encoded image. Called from many threads. Raises ImageSourceError, which names the image."""

    def read_mask(self, uri: str) -> NDArray[np.uint8] | None:
        """Pixel mask [H, W] of class or object numbers; None if the image has none. Raises ImageSourceError."""


def open_source(
    images: str | Path | ImageSource, *, masks: str | Path | None = None, class_level: int | None = None
) -> ImageSource:
    """Open the image source at a path.

    - a directory written by `datasets.Dataset.save_to_disk` -> HuggingFaceDataset
    - a `.csv`, `.tsv` or `.parquet` file -> ImageTable
    - a `.tar` file, or a directory of them -> ImageTars
    - any other directory -> ImageFolder

    Args:
        images: the path; a source that is already open is returned unchanged.
        masks: a folder of PNG pixel masks; each kind of source documents how files are matched with images.
        class_level: which folder of a path is the class, see `ImageFolder`; only a folder of images has one.

    Raises:
        ImageSourceError: there is nothing, nothing of a known kind, or two kinds at once.
        SettingsError: `class_level` for a source that is no folder of images.
    """
    source = _open(images, masks, class_level)
    if class_level is not None and getattr(source, "class_level", None) != class_level:
        raise SettingsError(
            f"--class-level {class_level} is for folders of images, but {source.path.name} is another kind of source, "
            "which has labels of its own. Leave the flag out."
        )
    return source


def _open(images: str | Path | ImageSource, masks: str | Path | None, class_level: int | None) -> ImageSource:
    if not isinstance(images, (str, Path)):
        if masks is not None:
            raise ImageSourceError("--masks needs a path as the source. Pass the masks when you create the source.")
        return images
    path = Path(images)
    if path.is_dir():
        return _open_directory(path, masks, class_level)
    if not path.exists():
        raise ImageSourceError(f"{path} does not exist. Expected {EXPECTED}; check the path.")
    suffix = path.suffix.lower()
    if suffix in TABLE_SUFFIXES:
        return ImageTable(path, masks=masks)
    if suffix == ".tar":
        return ImageTars(path, masks=masks)
    raise ImageSourceError(f"{path.name} is not a source of images. Expected {EXPECTED}.{_advice(path.name.lower())}")


EXPECTED = "a folder of images, a .csv, .tsv or .parquet table of paths, .tar files, or a saved Hugging Face dataset"


def _advice(name: str) -> str:
    if name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")):
        return " Unpack it first: images inside a compressed archive cannot be read one at a time."
    if is_image(name):
        return " Give the folder that contains the image."
    return ""


def _open_directory(path: Path, masks: str | Path | None, class_level: int | None) -> ImageSource:
    names = {entry.name for entry in os.scandir(path)}
    if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= names:
        if masks is not None:
            raise ImageSourceError(
                "--masks does not apply to Hugging Face datasets, whose masks are the image column 'mask'."
            )
        return HuggingFaceDataset(path)
    if any(name.lower().endswith(".tar") and not name.startswith(".") for name in names):
        if _has_images(path):
            raise ImageSourceError(
                f"{path} holds both .tar files and images. Move one kind elsewhere, or give one .tar file."
            )
        return ImageTars(path, masks=masks)
    return ImageFolder(path, masks=masks, class_level=class_level)


def _has_images(path: Path) -> bool:
    """Whether a folder or one of its direct subfolders contains an image. Stops at the first."""
    folders = [str(path)]
    with os.scandir(path) as entries:
        folders += [
            entry.path
            for entry in entries
            if not entry.name.startswith(".") and not is_system_name(entry.name) and entry.is_dir()
        ]
    for folder in folders:
        with os.scandir(folder) as entries:
            if any(is_image(entry.name) for entry in entries):
                return True
    return False
