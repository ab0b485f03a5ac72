"""open_source(): the image source at a path.

In: a path, or a source that is already open. Out: an object with `path`, `plan`, `read` and `read_mask`. File names
decide the kind of source, and for Parquet the types of its columns; an ambiguous folder is an error.
"""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ImageSourceError, SettingsError
from actcache.sources.folder import ImageFolder
from actcache.sources.formats import SUFFIXES, is_image, is_system_name
from actcache.sources.hugging_face import HuggingFaceDataset
from actcache.sources.listing import list_files
from actcache.sources.parquet_images import ImageParquet, find_images
from actcache.sources.plan import ImagePlan
from actcache.sources.table import ImageTable
from actcache.sources.table_file import TABLE_SUFFIXES
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
    images: str | Path | ImageSource,
    *,
    masks: str | Path | None = None,
    class_level: int | None = None,
    path_column: str | None = None,
    label: str | None = None,
) -> ImageSource:
    """Open the image source at a path.

    - a directory written by `datasets.Dataset.save_to_disk` -> HuggingFaceDataset
    - a `.csv`, `.tsv`, `.jsonl` or `.parquet` file with a column of paths -> ImageTable
    - a `.parquet` file with a column of images, or a directory of them without other images -> ImageParquet
    - a `.tar` file, or a directory of them -> ImageTars
    - any other directory -> ImageFolder

    Args:
        images: the path; a source that is already open is returned unchanged.
        masks: a folder of PNG pixel masks; each kind of source documents how files are matched with images.
        class_level: which folder of a path is the class, see `ImageFolder`; only a folder of images has one.
        path_column, label: the columns of the images and of the labels, where they are not the usual ones.

    Raises:
        ImageSourceError: there is nothing, nothing of a known kind, two kinds at once, or a choice of columns for a
            source that has none.
        SettingsError: `class_level` for a source that is no folder of images.
    """
    given = {"masks": masks, "class_level": class_level, "path_column": path_column, "label": label}
    if not isinstance(images, (str, Path)):
        for name in ("masks", "path_column", "label"):
            if given[name] is not None:
                raise ImageSourceError(
                    f"--{name.replace('_', '-')} needs a path as the source. Pass {name} when you create the source."
                )
        source: ImageSource = images
    else:
        source = _open(Path(images), {name: value for name, value in given.items() if value is not None})
    if class_level is not None and getattr(source, "class_level", None) != class_level:
        raise SettingsError(
            f"--class-level {class_level} is for folders of images, but {source.path.name} is another kind of source, "
            "which has labels of its own. Leave the flag out."
        )
    return source


def reopen_source(path: str | Path, columns: Mapping[str, str], *, masks: str | Path | None = None) -> ImageSource:
    """Open a source to read images again. `columns`: those that were chosen when its images were listed."""
    source = open_source(path, masks=masks)
    if "path" in columns and hasattr(source, "path_column"):
        return open_source(path, masks=masks, path_column=columns["path"])
    return source


def _open(path: Path, given: Mapping[str, Any]) -> ImageSource:
    kind = _find_kind(path, given.get("path_column"))
    takes = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if "masks" in given and "masks" not in takes:
        raise ImageSourceError(
            "--masks does not apply to Hugging Face datasets, whose masks are the image column 'mask'."
        )
    for name in ("path_column", "label"):
        if name in given and name not in takes:
            what = "have no such column" if name == "path_column" else "have their labels in the names of folders"
            raise ImageSourceError(
                f"--{name.replace('_', '-')} {given[name]} is for tables, but the images of {path.name} {what}. "
                "Leave the flag out."
            )
    return kind(path, **{name: value for name, value in given.items() if name in takes})


def _find_kind(path: Path, path_column: str | None) -> Callable[..., ImageSource]:
    if path.is_dir():
        return _find_kind_of_directory(path)
    if not path.exists():
        raise ImageSourceError(f"{path} does not exist. Expected {EXPECTED}; check the path.")
    suffix = path.suffix.lower()
    if suffix in TABLE_SUFFIXES:
        return ImageParquet if suffix == ".parquet" and find_images(path, path_column) else ImageTable
    if suffix == ".tar":
        return ImageTars
    raise ImageSourceError(f"{path.name} is not a source of images. Expected {EXPECTED}.{_advice(path.name.lower())}")


EXPECTED = "a folder of images, a .csv, .tsv, .jsonl or .parquet table, .tar files, or a saved Hugging Face dataset"


def _advice(name: str) -> str:
    if name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")):
        return " Unpack it first: images inside a compressed archive cannot be read one at a time."
    if is_image(name):
        return " Give the folder that contains the image."
    return ""


def _find_kind_of_directory(path: Path) -> Callable[..., ImageSource]:
    names = {entry.name for entry in os.scandir(path)}
    if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= names:
        return HuggingFaceDataset
    has_images = _has_files(path, SUFFIXES)
    if any(name.lower().endswith(".tar") and not name.startswith(".") for name in names):
        if has_images:
            raise ImageSourceError(
                f"{path} holds both .tar files and images. Move one kind elsewhere, or give one .tar file."
            )
        return ImageTars
    if not has_images and not list_files(path, SUFFIXES).names and list_files(path, (".parquet",)).names:
        return ImageParquet
    return ImageFolder


def _has_files(path: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a folder or one of its direct subfolders contains a file with such a suffix. Stops at the first."""
    folders = [str(path)]
    with os.scandir(path) as entries:
        folders += [
            entry.path
            for entry in entries
            if not entry.name.startswith(".") and not is_system_name(entry.name) and entry.is_dir()
        ]
    for folder in folders:
        with os.scandir(folder) as entries:
            if any(entry.name.lower().endswith(suffixes) and entry.name[0] != "." for entry in entries):
                return True
    return False
