"""What all sources share: columns, labels, sizes, pixel masks beside images, and finding a row by its uri.

In: arrow columns and file names. Out: arrow columns. A listing may have millions of rows, so arrow does the work; only
stat is called once for every file.
"""

import errno
import os
import stat
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from actcache.errors import ImageSourceError
from actcache.seen import CONTENT_HASH
from actcache.sources.arrow_types import show_name
from actcache.sources.files import NOT_REGULAR, read_file
from actcache.sources.formats import is_system_name
from actcache.sources.images import decode_mask
from actcache.sources.plan import IMAGES_SCHEMA
from actcache.text import is_utf8

RESERVED = frozenset({*IMAGES_SCHEMA.names, "mask", CONTENT_HASH})
"""Columns of images.parquet, whose names a user's own column cannot have."""

HIDDEN, SYSTEM, SPECIAL = "hidden", "of the operating system", "pipes, sockets or devices"
"""What is left out of a listing, beside files with other suffixes."""

MAX_SUFFIX = 12
"""A longer ending, after the last dot of a name, is not called a suffix."""

IRREGULAR = -(1 << 20)
"""Stands for a size: the file is a pipe, a socket or a device. Other negative sizes are error numbers."""

N_STAT_THREADS = 8
"""On a network file system stat waits for a server; on a local one, threads make little difference."""


def check_columns(names: Sequence[str], source: str, *, known: Collection[str] = ()) -> None:
    """Raise ImageSourceError when a column has no name, a reserved name, or the name of another column.

    Args:
        known: reserved names that this source uses in their intended meaning.
    """
    for name in names:
        if not name:
            raise ImageSourceError(f"{source} has a column without a name. Name it, or leave it out.")
        if names.count(name) > 1:
            raise ImageSourceError(f"{source} has two columns {name!r}. Rename one of them.")
        if name in RESERVED and name not in known:
            raise ImageSourceError(f"{source} has a column {name!r}, which is a reserved name. Rename the column.")


def encode_labels(
    label: pa.ChunkedArray | pa.Array, label_name: pa.ChunkedArray | pa.Array | None, source: str
) -> tuple[Any, Any]:
    """Labels as (int32 class index, name), with -1 and "" for images without a label.

    A text becomes its index among the sorted names. Integers stay as they are; their names are `label_name`, or the
    numbers themselves.

    Raises:
        ImageSourceError: labels are neither text nor integers, or one number has two names.
    """
    if pa.types.is_dictionary(label.type):
        label = label.cast(label.type.value_type)
    if pa.types.is_null(label.type):
        label = label.cast(pa.int32())
    if pa.types.is_boolean(label.type) and label_name is None:
        label_name = pc.if_else(label, "true", "false")
    if _is_text(label.type):
        if label_name is not None:
            raise ImageSourceError(
                f"{source} has text in 'label' and also a column 'label_name'. Leave one of them out."
            )
        names = label.cast(pa.string()).fill_null("")
        classes = pa.array(sorted(set(pc.unique(names).to_pylist()) - {""}), pa.string())
        return pc.index_in(names, value_set=classes).fill_null(-1).cast(pa.int32()), names
    try:
        if pa.types.is_floating(label.type):  # a column of whole numbers with gaps, as pandas writes it
            label = label.cast(pa.float64())
            label = pc.if_else(pc.is_nan(label), None, label)
        index = label.cast(pa.int64()).cast(pa.int32())
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise ImageSourceError(
            f"{source} has a label that is not a class: {reason}. Expected text or integers below 2,147,483,648."
        ) from error
    index = index.fill_null(-1)
    if pc.any(pc.less(index, -1)).as_py():
        raise ImageSourceError(
            f"{source} has the label {pc.min(index).as_py()}. Expected 0, 1, 2, ..., or -1 for none."
        )
    if label_name is None:
        names = index.cast(pa.string())
    elif _is_text(label_name.type) or pa.types.is_dictionary(label_name.type):
        names = label_name.cast(pa.string()).fill_null("")
        pairs = pa.table({"label": index, "name": names}).group_by("label").aggregate([("name", "count_distinct")])
        twice = pairs.filter(pc.greater(pairs["name_count_distinct"], 1))["label"].to_pylist()
        if set(twice) - {-1}:
            both = pc.unique(names.filter(pc.equal(index, max(twice)))).to_pylist()
            raise ImageSourceError(f"{source} gives label {max(twice)} two names: {sorted(both)[:2]}. Expected one.")
    else:
        raise ImageSourceError(f"{source} has {label_name.type} in 'label_name'. Expected text.")
    return index, pc.if_else(pc.equal(index, -1), "", names)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def check_text(names: Sequence[str]) -> None:
    """Raise ImageSourceError for a file name that is not UTF-8, since tables cannot hold it."""
    try:
        "/".join(names).encode()
    except UnicodeEncodeError as error:
        bad = next(name for name in names if not is_utf8(name))
        raise ImageSourceError(f"{bad!r} is not a UTF-8 file name. Rename it.") from error


def measure_files(paths: Sequence[str], names: Sequence[str] | pa.ChunkedArray, source: str) -> NDArray[np.int64]:
    """Size of every file. Raises ImageSourceError, which counts the missing files and names the first."""
    step = 4096
    cuts = [paths[first : first + step] for first in range(0, len(paths), step)]
    with ThreadPoolExecutor(N_STAT_THREADS, "stat") as pool:
        parts = list(pool.map(_measure, cuts))
    sizes = np.concatenate([np.empty(0, np.int64), *parts])
    bad = np.flatnonzero(sizes < 0)
    if len(bad):
        reason = NOT_REGULAR if sizes[bad[0]] == IRREGULAR else os.strerror(-int(sizes[bad[0]]))
        more = f", as for {len(bad) - 1:,} others of {len(paths):,}" if len(bad) > 1 else ""
        name = show_name(str(names[bad[0]]))
        raise ImageSourceError(f"{name} cannot be read: {reason}{more}. Repair it or remove it from {source}.")
    return sizes


def _measure(paths: Sequence[str]) -> NDArray[np.int64]:
    sizes = np.empty(len(paths), np.int64)
    for i, path in enumerate(paths):
        try:
            status = os.stat(path)
            if stat.S_ISREG(status.st_mode):
                sizes[i] = status.st_size
            else:
                sizes[i] = -errno.EISDIR if stat.S_ISDIR(status.st_mode) else IRREGULAR
        except OSError as error:
            sizes[i] = -(error.errno or errno.EIO)
        except ValueError:  # a zero byte in the path
            sizes[i] = -errno.ENOENT
    return sizes


class UriIndex:
    """Search in a sorted uri column: 20 µs among a million rows, where a dict would take 200 bytes per row."""

    def __init__(self, uris: pa.ChunkedArray, source: str) -> None:
        self._uris = uris.combine_chunks()
        self._source = source

    def find(self, uri: str) -> int:
        """Position of a uri. Raises ImageSourceError when it is not there."""
        low, high = 0, len(self._uris)
        while low < high:
            middle = (low + high) // 2
            if self._uris[middle].as_py() < uri:
                low = middle + 1
            else:
                high = middle
        if low == len(self._uris) or self._uris[low].as_py() != uri:
            raise ImageSourceError(f"{show_name(uri)} is not in {self._source}.")
        return low


class MaskFolder:
    """A folder of PNG pixel masks that mirrors the images: the mask of `a/b.jpg` is `a/b.png`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def match(self, *candidates: pa.ChunkedArray | pa.Array) -> Any:
        """The mask file of each image, or "" if there is none.

        Args:
            candidates: columns of image paths; for each row the first path that has a mask counts.

        Raises:
            ImageSourceError: the folder does not exist, or has no mask for any of these images.
        """
        if not self.path.is_dir():
            raise ImageSourceError(f"{self.path} is not a directory. Expected a folder of PNG masks; check --masks.")
        files = list_files(self.path, (".png",)).names
        existing = pa.array(filter(is_utf8, files), pa.string())  # an image whose mask has another name is refused
        result: Any = pa.scalar("")
        for uris in reversed(candidates):
            names = _mask_name(uris)
            result = pc.if_else(pc.is_in(names, value_set=existing), names, result)
        if not pc.any(pc.not_equal(result, "")).as_py():
            example = _mask_name(candidates[-1].slice(0, 1))[0].as_py()
            raise ImageSourceError(f"{self.path} holds no mask for these images. Expected PNG files such as {example}.")
        return result

    def read(self, *uris: str) -> NDArray[np.uint8] | None:
        """The mask of an image, given the paths that `match` tries; None if there is none."""
        for uri in uris:
            name = _mask_name(pa.array([uri]))[0].as_py()
            if (self.path / name).is_file():
                return decode_mask(read_file(self.path / name, name), name=name)
        return None


def _mask_name(uris: Any) -> Any:
    return pc.binary_join_element_wise(pc.replace_substring_regex(uris, r"\.[^./]*$", ""), "png", ".")


class Listing(NamedTuple):
    """Paths below a folder with /, sorted, and how many entries of which kind were left out."""

    names: list[str]
    left_out: dict[str, int]


def list_files(folder: Path, suffixes: tuple[str, ...]) -> Listing:
    """List the regular files below a folder with one of these suffixes.

    Hidden files and folders and those of the operating system are left out. Links are followed, except into cycles; a
    broken link is listed, so that it is reported when it is read.
    """
    names: list[str] = []
    left_out: Counter[str] = Counter()
    todo = [(str(folder), "", frozenset[str]())]
    try:
        while todo:
            path, prefix, above = todo.pop()
            real = os.path.realpath(path)
            above |= {real}
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        left_out[HIDDEN] += 1
                    elif is_system_name(entry.name):
                        left_out[SYSTEM] += 1
                    elif entry.is_dir():
                        target = os.path.realpath(entry.path)
                        if target not in above and not real.startswith(os.path.join(target, "")):
                            todo.append((entry.path, f"{prefix}{entry.name}/", above))
                    elif not entry.name.lower().endswith(suffixes):
                        left_out[_kind_of(entry.name)] += 1
                    elif entry.is_file() or not os.path.exists(entry.path):
                        names.append(prefix + entry.name)
                    else:
                        left_out[SPECIAL] += 1
    except OSError as error:
        raise ImageSourceError(
            f"{error.filename} cannot be listed: {error.strerror}. Check its permissions."
        ) from error
    return Listing(sorted(names), dict(sorted(left_out.items())))


def _kind_of(name: str) -> str:
    """`.txt files`, or `files without a suffix`."""
    suffix = os.path.splitext(name)[1].lower()
    return f"{suffix} files" if 1 < len(suffix) <= MAX_SUFFIX and suffix.isprintable() else "files without a suffix"
