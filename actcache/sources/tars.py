"""Webdataset tars: samples in .tar files, read at their byte offsets.

In: a .tar, or a directory of them. A sample consists of the members with the same key, which is the path up to the
first dot of its last part: `a/0001.jpg`, `a/0001.cls` (the class, as a number or text), `a/0001.json` (columns),
`a/0001.txt` (column `text`). Out: a plan whose uris are `<tar>/<member>`. Headers are read once (`tar_index`); an image
is one pread.
"""

import os
import resource
import threading
import weakref
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from actcache.errors import ImageSourceError
from actcache.sources.arrow_types import show_name
from actcache.sources.files import open_regular
from actcache.sources.formats import SUFFIXES
from actcache.sources.labels import label_columns
from actcache.sources.listing import MaskFolder, UriIndex, check_text
from actcache.sources.plan import ImagePlan, announce, plan_images
from actcache.sources.records import Records, parse_object
from actcache.sources.tar_index import walk_tar

N_INDEX_THREADS = 4
"""Number of tars whose headers are read at the same time, so that waits for a network file system overlap."""


@dataclass(frozen=True)
class ImageTars:
    """Images in webdataset tars.

    With `masks`, the pixel mask of `x.tar/a/b.jpg` is `x/a/b.png` in that folder, or else `a/b.png`. `label` is the
    key of the samples' .json that gives the class; by default `label`, or another of the usual names.
    """

    path: Path
    masks: Path | None = None
    label: str | None = None
    _files: "_OpenFiles" = field(default_factory=lambda: _OpenFiles(), repr=False, compare=False)

    def __init__(self, path: str | Path, *, masks: str | Path | None = None, label: str | None = None) -> None:
        object.__setattr__(self, "path", Path(path))
        object.__setattr__(self, "masks", None if masks is None else Path(masks))
        object.__setattr__(self, "label", label)
        object.__setattr__(self, "_files", _OpenFiles())

    def plan(self, *, limit: int | None = None, seed: int = 0, exclude: Collection[str] = ()) -> ImagePlan:
        """List the images in a seeded order. Arguments as `plan_images`.

        Raises:
            ImageSourceError: there is no tar or no image; a tar is damaged or truncated, has a member twice, a name
                that leads out of it, or two images in a sample; or a class or column cannot be read.
            SettingsError: `limit` is below 1 or `seed` below 0.
        """
        listing = self._listing
        if self.masks is not None:
            listing = listing.append_column("mask", MaskFolder(self.masks).match(*_mask_names(listing["uri"])))
        return plan_images(
            listing, limit=limit, seed=seed, exclude=exclude, notes=self._rows.notes, columns=self._rows.columns
        )

    def read(self, uri: str) -> bytes:
        """The member's bytes. Raises ImageSourceError."""
        row = self._index.find(uri)
        offset, size = int(self._rows.offset[row]), self._rows.listing["bytes"][row].as_py()
        try:
            data = self._files.read(self._tar_path(uri.split("/", 1)[0]), offset, size)
        except OSError as error:
            raise ImageSourceError(f"{uri} cannot be read: {error.strerror}.") from error
        if len(data) < size:
            raise ImageSourceError(f"{uri} cannot be read: the tar was truncated after it was opened.")
        return data

    def read_mask(self, uri: str) -> NDArray[np.uint8] | None:
        """Pixel mask [H, W], or None if there is none. Raises ImageSourceError."""
        if self.masks is None:
            return None
        return MaskFolder(self.masks).read(*(names[0].as_py() for names in _mask_names(pa.array([uri]))))

    def _tar_path(self, name: str) -> Path:
        return self.path / name if self.path.is_dir() else self.path

    @cached_property
    def _index(self) -> UriIndex:
        return UriIndex(self._rows.listing["uri"], self.path.name)

    @cached_property
    def _listing(self) -> pa.Table:
        """The rows of the plan. Notes are shown once, and not to those who only read images."""
        announce(self._rows.notes)
        return self._rows.listing

    @cached_property
    def _rows(self) -> "_Rows":
        """The samples of every tar."""
        paths = [self.path]
        if self.path.is_dir():
            names = sorted(name for name in os.listdir(self.path) if name.lower().endswith(".tar") and name[0] != ".")
            paths = [self.path / name for name in names]
        check_text([path.name for path in paths])
        with ThreadPoolExecutor(N_INDEX_THREADS, "index") as pool:
            shards = list(pool.map(_read_samples, paths))
        without = sum(shard.n_without_image for shard in shards)
        special = [name for shard in shards for name in shard.special]
        shards = [shard for shard in shards if shard.uri]
        if not shards:
            raise ImageSourceError(
                f"{self.path.name} holds no images{f' in {without:,} samples' if without else ''}. "
                f"Expected members ending in {', '.join(SUFFIXES)}."
            )
        source = self.path.name
        columns, notes = Records.join([(shard.columns, len(shard.uri)) for shard in shards], source)
        if without:
            are = "samples without an image are" if without > 1 else "sample without an image is"
            notes += (f"{source}: {without:,} {are} left out.",)
        if special:
            are = "members are links or devices and" if len(special) > 1 else "member is a link or device and"
            notes += (f"{source}: {len(special):,} {are} left out, such as {special[0]}.",)
        uris = pa.array([uri for shard in shards for uri in shard.uri], pa.string())
        sizes = pa.array([size for shard in shards for size in shard.size], pa.int64())
        labeled = label_columns(columns, len(uris), source, label=self.label)
        offset = np.array([offset for shard in shards for offset in shard.offset], dtype=np.int64)
        order = pc.sort_indices(uris)
        listing = pa.table({"uri": uris, "bytes": sizes} | labeled.columns).take(order).combine_chunks()
        return _Rows(listing, offset[np.asarray(order)], notes + labeled.notes, labeled.chosen)


class _Rows(NamedTuple):
    """Rows sorted by uri (uri, bytes, label, label_name, the user's columns); offset of each image in its tar."""

    listing: pa.Table
    offset: NDArray[np.int64]
    notes: tuple[str, ...]
    columns: Mapping[str, str]


def _mask_names(uris: Any) -> tuple[Any, Any]:
    """The two possible places of a mask: in a folder named after the tar, or in one for all tars."""
    return (
        pc.replace_substring_regex(uris, r"(?i)^([^/]*)\.tar/+", r"\1/"),
        pc.replace_substring_regex(uris, "^[^/]*/+", ""),
    )


@dataclass
class _Samples:
    """The samples of one tar that have an image, column by column."""

    uri: list[str]
    offset: list[int]
    size: list[int]
    columns: Records
    n_without_image: int
    special: list[str]  # names of links and devices that are named like images


def _read_samples(path: Path) -> _Samples:
    """Read the headers of one tar and group its members by key."""
    images: dict[str, tuple[str, int, int]] = {}
    extras: dict[str, dict[str, bytes]] = {}
    seen: set[str] = set()
    keys: dict[str, None] = {}
    special: list[str] = []
    for member in walk_tar(path, wanted=(".cls", ".json", ".txt"), special=True):
        folder, _, base = member.name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        if not stem or not dot:
            continue  # no suffix, or a hidden file
        if member.special:
            if f".{suffix.lower()}" in SUFFIXES:
                special.append(f"{path.name}/{member.name}")
                if member.special == "sparse file":
                    name = show_name(member.name)
                    raise ImageSourceError(
                        f"{path.name} holds {name} as a sparse file. Write the tar again without --sparse."
                    )
            continue
        if ".." in folder.split("/"):
            raise ImageSourceError(
                f"{path.name} holds {show_name(member.name)}, which leads out of the tar. Write the tar again."
            )
        if member.name in seen:
            raise ImageSourceError(
                f"{path.name} holds {show_name(member.name)} twice. Expected one; write the tar again."
            )
        seen.add(member.name)
        key = f"{folder}/{stem}" if folder else stem
        suffix = f".{suffix.lower()}"
        keys[key] = None
        if suffix in SUFFIXES:
            if key in images:
                both = f"{show_name(images[key][0])} and {show_name(member.name)}"
                raise ImageSourceError(
                    f"{path.name} has two images for sample {show_name(key)}: {both}. "
                    "Expected one; give the other a longer suffix, such as .mask.png."
                )
            images[key] = (member.name, member.offset, member.size)
        elif member.data is not None:
            extras.setdefault(key, {})[suffix] = member.data
    columns = Records()
    for row, key in enumerate(images):
        if key in extras:
            columns.add(row, _fields(extras[key], f"{path.name}/{key}"))
    names = [f"{path.name}/{name}" for name, _, _ in images.values()]
    return _Samples(
        names,
        [offset for _, offset, _ in images.values()],
        [size for _, _, size in images.values()],
        columns,
        len(keys) - len(images),
        special,
    )


def _fields(extras: Mapping[str, bytes], sample: str) -> dict[str, object]:
    """Columns of one sample. Raises ImageSourceError, which names the sample."""
    fields: dict[str, object] = {}
    try:
        if ".json" in extras:
            fields |= parse_object(extras[".json"], "its .json")
        if ".txt" in extras:
            if "text" in fields:
                raise ValueError("both its .json and a separate file give 'text'")
            fields["text"] = extras[".txt"].decode()
        if ".cls" in extras:
            _add_class(fields, extras[".cls"])
    except UnicodeDecodeError as error:
        raise ImageSourceError(
            f"Sample {show_name(sample)} cannot be read: it is not UTF-8. Repair it, or remove it."
        ) from error
    except ValueError as error:  # from JSON
        reason = str(error).splitlines()[0]
        raise ImageSourceError(
            f"Sample {show_name(sample)} cannot be read: {reason}. Repair it, or remove it."
        ) from error
    return fields


def _add_class(fields: dict[str, object], data: bytes) -> None:
    """Add the class of a .cls file: a number if it is written as one, otherwise a name. Its .json may say it too."""
    text = data.decode().strip()
    label: object = int(text) if len(text) < 19 and text.lstrip("-").isdecimal() and str(int(text)) == text else text
    given = fields.get("label")
    if isinstance(label, int) and isinstance(given, str) and given != text and "label_name" not in fields:
        fields["label_name"] = given
    elif given is not None and str(given) != text:
        raise ValueError("both its .json and a separate file give 'label'")
    fields["label"] = label


class _OpenFiles:
    """Files kept open for pread, at most half of the process's limit; further ones are opened for every read."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = 4096 if allowed == resource.RLIM_INFINITY else allowed // 2
        weakref.finalize(self, _close, self._open)

    def read(self, path: Path, offset: int, size: int) -> bytes:
        descriptor = self._open.get(path)
        if descriptor is not None:
            return _pread(descriptor, offset, size)
        with self._lock:
            if path not in self._open and len(self._open) < self._most:
                self._open[path] = open_regular(path)
            descriptor = self._open.get(path)
        if descriptor is not None:
            return _pread(descriptor, offset, size)
        with open(open_regular(path), "rb", buffering=0) as file:
            return _pread(file.fileno(), offset, size)


def _pread(descriptor: int, offset: int, size: int) -> bytes:
    """Up to `size` bytes; Linux returns at most 2 GiB per call."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data


def _close(files: Mapping[Path, int]) -> None:
    for descriptor in files.values():
        os.close(descriptor)
