"""Files that appear whole or not at all, and their checksums, for local paths and for URLs through fsspec.

Every file of every verb is written here: under a temporary name (`litter.py`), flushed and renamed, and then its
directory is flushed. A failed write leaves nothing behind, and its error names the output and says what to do. On an
object store a single PUT does all of this.
"""

import errno
import hashlib
import itertools
import json
import os
import shutil
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypedDict, TypeGuard

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from actcache.artifacts.advice import storage_errors
from actcache.artifacts.litter import old_path, remove_litter, temporary_path
from actcache.artifacts.object_store import BUCKETS, check_url, register_s3
from actcache.cache_lines import empty_at_line
from actcache.errors import CorruptError, SettingsError

_PIECE_BYTES = 1 << 24  # a file without chunks of its own gets one checksum per 16 MiB piece
_CHECK_BYTES = 1 << 23


class FileDigest(TypedDict):
    """Size of a file, and (n_bytes, crc32c) of each of its pieces."""

    bytes: int
    pieces: list[list[int]]


# ---------------------------------------------------------------------------------------------------------------------
# Paths


def artifact_path(path: str | Path) -> Path:
    """A local Path, or, for a URL such as s3://bucket/val.acts, an fsspec path that behaves like one.

    Raises:
        SettingsError: the package for the URL's file system is not installed, or an S3 URL names no folder in a bucket.
    """
    if not isinstance(path, str) or "://" not in path:
        return Path(path) if isinstance(path, str) else path
    check_url(path)
    try:
        from upath import UPath  # an optional dependency

        if path.startswith(tuple(f"{scheme}://" for scheme in BUCKETS)):
            register_s3()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "UPath .* not explicitly implemented", UserWarning)
            remote: Any = UPath(path)
        assert remote.fs is not None  # this imports the file system's package
    except (ImportError, ValueError) as error:
        raise SettingsError(f"{path} cannot be reached: {error}. For S3, run: pip install 'patchsae[s3]'.") from error
    return remote  # type: ignore[no-any-return]


def is_remote(path: Path) -> bool:
    """Whether a path from artifact_path() is a URL."""
    return not isinstance(path, Path)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_atomic(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Write `data` under `path`: temporary file, fsync, rename, fsync of the directory. Raises StorageError.

    Args:
        replace: False leaves an existing file as it is.
    """
    if is_remote(path):
        with storage_errors(path):
            path.write_bytes(data)
        return
    with open_atomic(path, replace=replace) as file:
        file.write(data)


@contextmanager
def open_atomic(path: Path, *, replace: bool = True) -> Iterator[IO[bytes]]:
    """Open a temporary file that becomes `path`, flushed, when the block ends without an error. Raises StorageError."""
    temporary = temporary_path(path)
    with storage_errors(path):
        try:
            temporary.unlink(missing_ok=True)  # a killed process with our number may have linked it to a final name
            with open(temporary, "xb") as file:  # closing it reports errors, too
                yield file
                file.flush()
                os.fsync(file.fileno())
            if replace:
                os.replace(temporary, path)
                fsync_directory(path.parent)
            else:
                publish(temporary, path)
        except BaseException:  # a full disk, Ctrl-C
            with suppress(OSError):  # the first error matters more
                temporary.unlink(missing_ok=True)
            raise


def write_output(out: str | Path, data: bytes) -> Path:
    """Write an output that is one file, such as a result or a page, make the folders above it, and return its path.

    Raises:
        SettingsError: `out` is a folder, or lies inside an artifact.
        StorageError: it cannot be written.
    """
    path = Path(out)
    check_place(path)
    if path.is_dir():
        raise SettingsError(f"{path} is a folder. Expected the name of a file; choose another path.")
    remove_litter(path)
    with storage_errors(path):
        make_folders(path.parent)
    write_atomic(path, data)
    return path


def write_new(path: Path, data: bytes | memoryview) -> None:
    """Write a file in a folder of `build_folder`, which flushes it and names the output in errors."""
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True)
    with open(path, "xb") as file:
        file.write(data)


def append_line(path: Path, line: str) -> None:
    """Append a line to a log. It is not flushed: a reader leaves out a last line that is cut. Raises StorageError."""
    with storage_errors(path), open(path, "ab") as file:
        file.write(f"{line}\n".encode())


def create_temporary(path: Path) -> tuple[Path, int]:
    """A new file under the temporary name of `path`, as (its name, its descriptor)."""
    temporary = temporary_path(path)
    temporary.unlink(missing_ok=True)  # a killed process with our number may have linked it to the final name
    return temporary, os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)


@contextmanager
def build_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder under a temporary name that takes the name `path` when the block ends, whole and flushed.

    Args:
        replace: put aside what has the name, and delete it once the new folder has taken the name. Otherwise only an
            empty folder may have it.

    Raises:
        StorageError: nothing has changed at `path`.
    """
    temporary, old = temporary_path(path), old_path(path)
    with storage_errors(path):
        try:
            make_folders(path.parent)
            for left in (temporary, old):
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            fsync_tree(temporary)
            if replace and os.path.lexists(path):
                os.replace(path, old)
            os.replace(temporary, path)
            fsync_directory(path.parent)
        except BaseException:
            if os.path.lexists(old) and not os.path.lexists(path):
                with suppress(OSError):  # the first error matters more
                    os.replace(old, path)
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            if os.path.lexists(path):
                shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder under another name, so that it is gone at once; the next command deletes what is left of it."""
    old = old_path(path)
    os.replace(path, old)
    shutil.rmtree(old)


def check_place(out: Path) -> None:
    """Raise SettingsError if an output would lie inside an artifact, which is sealed and holds its own files only.

    What people write beside the seal, `notes/`, is the exception.
    """
    if is_remote(out):
        return
    inside = Path(os.path.realpath(out))
    for folder in inside.parents:
        if (folder / "artifact.json").is_file() and inside.relative_to(folder).parts[0] != "notes":
            raise SettingsError(
                f"{out} lies inside the artifact {folder}, which holds its own files only. Choose a path outside it."
            )


def write_json(path: Path, value: Any, *, replace: bool = True) -> None:
    write_atomic(path, encode_json(value), replace=replace)


def encode_json(value: Any) -> bytes:
    """The one format of this project's JSON objects: one line per field (full indentation takes 20 times longer)."""
    lines = [f" {json.dumps(name)}: {json.dumps(field, allow_nan=False)}" for name, field in value.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def publish(temporary: Path, path: Path) -> bool:
    """Give a flushed file its final name unless that name is taken: the first writer wins and nothing is replaced.

    Returns:
        False when `path` existed. The temporary name is gone either way.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        temporary.unlink(missing_ok=True)
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        os.replace(temporary, path)  # a file system without hard links
    else:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)
    return True


def make_folders(path: Path, *, within: Path | None = None) -> None:
    """`mkdir -p` that flushes the name of each new folder: a file is only as safe as the folders above it.

    Args:
        within: an artifact, which is not made again if it was removed while it was written.
    """
    if not path.is_dir():
        if path != within:
            make_folders(path.parent, within=within)
            path.mkdir(exist_ok=True)
            fsync_directory(path.parent)
        else:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def fsync_directory(path: Path) -> None:
    """Flush the names in a folder, on file systems that can: some network disks flush files only."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(fd)


def fsync_tree(path: Path) -> None:
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            fd = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        fsync_directory(Path(folder))


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_json(path: Path, advice: str = "Make the artifact again.") -> Any:
    """Parse a JSON file. Raises CorruptError when it is missing, is not a plain file or does not parse."""
    try:
        with open_plain(path) as file:
            return json.loads(file.read(), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise CorruptError(f"{path} is missing. {advice}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptError(f"{path} is not readable JSON ({error}). {advice}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it contains {name}")


def read_signed(path: Path, advice: str) -> Mapping[str, Any]:
    """A JSON object, without its field `digest`, which must be that of the others. Raises CorruptError."""
    fields = read_json(path, advice)
    try:
        sound = isinstance(fields, dict) and fields.pop("digest", None) == digest(fields)
    except (ValueError, RecursionError):  # an infinity, or deep nesting
        sound = False
    if not sound:
        raise CorruptError(f"{path} differs from what was written. {advice}")
    return dict(fields)


def digest(fields: Any) -> str:
    """First 16 hex digits of the sha256 of canonical JSON. Equal fields have equal digests."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def crc32c(data: bytes | NDArray[Any]) -> int:
    """CRC-32C (Castagnoli) of contiguous bytes: 14 GB/s per core, without a copy of the array."""
    if isinstance(data, np.ndarray):
        return int(google_crc32c.value(data.reshape(-1).view(np.uint8)))
    return int(google_crc32c.value(data))


def check_file(path: Path, digest: Mapping[str, Any]) -> str | None:
    """None when the file's size and pieces agree with its digest, otherwise a description of what differs.

    The windows fit the processor's cache, and each releases the interpreter lock once: two threads reach 26 GB/s where
    memcpy reaches 35; with windows of 0.5 MB they reach 12.
    """
    window = empty_at_line((min(_CHECK_BYTES, digest["bytes"] + 1),), np.uint8)
    pieces = iter([*digest["pieces"], (0, None)])
    try:
        with open_plain(path) as file:
            size = file.seek(0, os.SEEK_END)
            if size != digest["bytes"]:
                return f"has {size:,} bytes, expected {digest['bytes']:,}"
            file.seek(0)
            start, actual = 0, 0
            left, checksum = next(pieces)
            offset = 0
            while n_read := file.readinto(window):
                position = 0
                while position < n_read:
                    part = window[position : min(position + left, n_read)]
                    actual = google_crc32c.extend(actual, part)
                    position, offset, left = position + len(part), offset + len(part), left - len(part)
                    if left == 0:
                        if actual != checksum:
                            return f"differs from what was written in bytes {start:,} to {offset:,}"
                        start, actual = offset, 0
                        left, checksum = next(pieces)
            if offset != size:
                return f"ended after {offset:,} of {size:,} bytes"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return None


def open_plain(path: Path) -> Any:
    """Open for reading without a buffer; a link, a pipe or a folder raises OSError."""
    if is_remote(path):
        return path.open("rb")
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # opening a pipe would block forever
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a plain file")
    return open(fd, "rb", buffering=0)


def is_digest(value: Any) -> TypeGuard[FileDigest]:
    """Whether a value read from JSON is a digest: sizes and checksums that are integers, the sizes adding up."""
    try:
        pieces = [(n_bytes, checksum) for n_bytes, checksum in value["pieces"]]
        numbers = [value["bytes"], *itertools.chain.from_iterable(pieces)]
        whole = all(type(number) is int and number >= 0 for number in numbers)
        return whole and value["bytes"] == sum(n_bytes for n_bytes, _ in pieces)
    except (KeyError, TypeError, ValueError):
        return False


def file_digest(path: Path) -> FileDigest:
    """Digest of a file, in 16 MiB pieces. Raises CorruptError."""
    pieces = []
    try:
        with open_plain(path) as file:
            while data := file.read(_PIECE_BYTES):
                pieces.append([len(data), crc32c(data)])
    except OSError as error:
        raise CorruptError(
            f"{path} cannot be read ({error.strerror or error}). Remove it and run the command again."
        ) from error
    return {"bytes": sum(n for n, _ in pieces), "pieces": pieces}
