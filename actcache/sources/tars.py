"""Webdataset tars: samples in .tar files, read at their byte offsets.

In: a .tar, or a directory of them. A sample consists of the members with the same key, which is the path up to the
first dot of its last part: `a/0001.jpg`, `a/0001.cls` (class index), `a/0001.json` (columns), `a/0001.txt` (column
`text`). Out: a plan whose uris are `<tar>/<member>`. Headers are read once (`tar_index`); an image is one pread.
"""

import json
import logging
import os
import resource
import threading
import weakref
from collections.abc import Collection, Mapping, Sequence
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
from actcache.sources.files import open_regular
from actcache.sources.formats import SUFFIXES
from actcache.sources.listing import MaskFolder, UriIndex, check_columns, check_text, encode_labels
from actcache.sources.plan import ImagePlan, plan_images
from actcache.sources.tar_index import walk_tar

N_INDEX_THREADS = 4
"""Number of tars whose headers are read at the same time, so that waits for a network file system overlap."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageTars:
    """Images in webdataset tars.

    With `masks`, the pixel mask of `x.tar/a/b.jpg` is `x/a/b.png` in that folder, or else `a/b.png`.
    """

    path: Path
    masks: Path | None = None
    _files: "_OpenFiles" = field(default_factory=lambda: _OpenFiles(), repr=False, compare=False)

    def __init__(self, path: str | Path, *, masks: str | Path | None = None) -> None:
        object.__setattr__(self, "path", Path(path))
        object.__setattr__(self, "masks", None if masks is None else Path(masks))
        object.__setattr__(self, "_files", _OpenFiles())

    def plan(self, *, limit: int | None = None, seed: int = 0, exclude: Collection[str] = ()) -> ImagePlan:
        """List the images in a seeded order. Arguments as `plan_images`.

        Raises:
            ImageSourceError: there is no tar or no image; a tar is damaged or truncated, has a member twice, or two
                images in a sample; or a class or column cannot be read.
            SettingsError: `limit` is below 1 or `seed` below 0.
        """
        listing = self._rows.listing
        if self.masks is not None:
            listing = listing.append_column("mask", MaskFolder(self.masks).match(*_mask_names(listing["uri"])))
        return plan_images(listing, limit=limit, seed=seed, exclude=exclude)

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
    def _rows(self) -> "_Rows":
        """The samples of every tar."""
        paths = [self.path]
        if self.path.is_dir():
            names = sorted(name for name in os.listdir(self.path) if name.lower().endswith(".tar") and name[0] != ".")
            check_text(names)
            paths = [self.path / name for name in names]
        with ThreadPoolExecutor(N_INDEX_THREADS, "index") as pool:
            shards = list(pool.map(_read_samples, paths))
        if without := sum(shard.n_without_image for shard in shards):
            log.warning("%s: %d samples without an image are left out", self.path.name, without)
        shards = [shard for shard in shards if shard.uri]
        if not shards:
            raise ImageSourceError(
                f"{self.path.name} holds no images{f' in {without:,} samples' if without else ''}. "
                f"Expected members ending in {', '.join(SUFFIXES)}."
            )
        fields = [name for shard in shards for name in shard.columns]
        columns = {name: _column([shard.column(name) for shard in shards]) for name in dict.fromkeys(fields)}
        columns |= {
            "uri": pa.array([uri for shard in shards for uri in shard.uri], pa.string()),
            "bytes": pa.array([size for shard in shards for size in shard.size], pa.int64()),
        }
        none = pa.nulls(len(columns["uri"]), pa.int32())
        columns["label"], columns["label_name"] = encode_labels(
            columns.get("label", none), columns.get("label_name"), self.path.name
        )
        offset = np.array([offset for shard in shards for offset in shard.offset], dtype=np.int64)
        order = pc.sort_indices(columns["uri"])
        return _Rows(pa.table(columns).take(order).combine_chunks(), offset[np.asarray(order)])


class _Rows(NamedTuple):
    """Rows sorted by uri (uri, bytes, label, label_name, the user's columns); offset of each image in its tar."""

    listing: pa.Table
    offset: NDArray[np.int64]


def _mask_names(uris: Any) -> tuple[Any, Any]:
    """The two possible places of a mask: in a folder named after the tar, or in one for all tars."""
    return (
        pc.replace_substring_regex(uris, r"(?i)^([^/]*)\.tar/", r"\1/"),
        pc.replace_substring_regex(uris, "^[^/]*/", ""),
    )


def _column(parts: Sequence[list[Any]]) -> pa.Array:
    """Python values in the type that arrow infers; as JSON text if they are nested or have different types."""
    values = [value for part in parts for value in part]
    if not any(isinstance(value, (dict, list)) for value in values):
        try:
            return pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            pass  # different types, or an integer beyond 64 bits
    texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    return pa.array(texts, pa.string())


@dataclass
class _Samples:
    """The samples of one tar that have an image, column by column."""

    uri: list[str]
    offset: list[int]
    size: list[int]
    columns: dict[str, list[Any]]
    n_without_image: int

    def column(self, name: str) -> list[Any]:
        return self.columns.get(name) or [None] * len(self.uri)


def _read_samples(path: Path) -> _Samples:
    """Read the headers of one tar and group its members by key."""
    images: dict[str, tuple[str, int, int]] = {}
    extras: dict[str, dict[str, bytes]] = {}
    seen: set[str] = set()
    keys: dict[str, None] = {}
    for member in walk_tar(path, wanted=(".cls", ".json", ".txt")):
        folder, _, base = member.name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        if not stem or not dot:
            continue  # no suffix, or a hidden file
        if member.name in seen:
            raise ImageSourceError(f"{path.name} holds {member.name} twice. Expected one; write the tar again.")
        seen.add(member.name)
        key = f"{folder}/{stem}" if folder else stem
        suffix = f".{suffix.lower()}"
        keys[key] = None
        if suffix in SUFFIXES:
            if key in images:
                raise ImageSourceError(
                    f"{path.name} has two images for sample {key}: {images[key][0]} and {member.name}. "
                    "Expected one; give the other a longer suffix, such as .mask.png."
                )
            images[key] = (member.name, member.offset, member.size)
        elif member.data is not None:
            extras.setdefault(key, {})[suffix] = member.data
    columns: dict[str, list[Any]] = {}
    for row, key in enumerate(images):
        for name, value in _fields(extras.get(key, {}), f"{path.name}/{key}").items():
            if name not in columns:
                columns[name] = [None] * len(images)
            columns[name][row] = value
    check_columns(list(columns), path.name, known=("label", "label_name"))
    names = [f"{path.name}/{name}" for name, _, _ in images.values()]
    return _Samples(
        names,
        [offset for _, offset, _ in images.values()],
        [size for _, _, size in images.values()],
        columns,
        len(keys) - len(images),
    )


def _fields(extras: Mapping[str, bytes], sample: str) -> dict[str, object]:
    """Columns of one sample. Raises ImageSourceError, which names the sample."""
    fields: dict[str, object] = {}
    try:
        if ".json" in extras:
            values = json.loads(extras[".json"])
            if not isinstance(values, dict):
                raise ValueError("its .json is not an object")
            fields |= values
        if ".txt" in extras:
            _add(fields, "text", extras[".txt"].decode())
        if ".cls" in extras:
            _add(fields, "label", int(extras[".cls"]))
    except ValueError as error:  # from JSON, UTF-8 or int()
        raise ImageSourceError(f"Sample {sample} cannot be read: {error}. Repair it, or remove it.") from error
    return fields


def _add(fields: dict[str, object], name: str, value: object) -> None:
    if name in fields:
        raise ValueError(f"both its .json and a separate file give {name!r}")
    fields[name] = value


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
