"""Fetching named files of one commit into the client's cache, and the sha256 of what lies there.

Nothing else of a repository is downloaded. The client writes a file under a temporary name and checks its length; here
its content is checked, too: the cache names a file by the hash that the hub has of it.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, cast

import huggingface_hub
from huggingface_hub import constants

from actcache.artifacts import build_folder, write_new
from actcache.errors import CorruptError, HubError, SettingsError
from actcache.hub.address import HubAddress, is_safe_name
from actcache.hub.client import TIMEOUT_S, cut_off, disk_full, use_client
from actcache.hub.listing import HubListing, list_files
from actcache.progress import Progress

_MAX_RESTARTS = 2
"""How often the client may begin a file again: it goes on for ever with a server that cuts off every download."""
_MAX_EXCESS_BYTES = 1 << 26
"""How much longer than its listed size a download may get: a server that never ends would fill the disk."""
_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class HubFiles:
    """Files of one commit on this machine.

    Attributes:
        folder: the local folder that stands for the folder of the address; each file lies in it under its name. The
            files are links into the client's cache.
        address: the folder, with the commit as its revision.
        files: the sha256 of each file, as 64 hexadecimal digits, by its name in the folder.
    """

    folder: Path
    address: HubAddress
    files: dict[str, str]

    @property
    def repo(self) -> str:
        return self.address.repo

    @property
    def commit(self) -> str:
        return self.address.revision


def fetch_files(
    source: HubListing | HubAddress, names: Iterable[str], *, on_progress: Progress | None = None
) -> HubFiles:
    """Fetch files by their names in the folder of a listing or address, from the cache or the hub.

    Files of a commit that are in the cache need no call. The space on the disk is compared with what is missing before
    anything is downloaded.

    Args:
        names: names relative to the folder, with `/`.
        on_progress: called with bytes of what is missing in the cache, first with 0; never if nothing is missing.

    Raises:
        HubError: the hub cannot be reached, or there is no such file.
        StorageError: the disk of the cache is too small.
        CorruptError: what came is not what the hub has. Nothing of it is kept.
    """
    names = list(dict.fromkeys(names))
    if not names:
        raise SettingsError(f"No file of {source if isinstance(source, HubAddress) else source.address} was named.")
    address = source.address if isinstance(source, HubListing) else source
    for name in names:
        if not is_safe_name(name):
            raise HubError(f"{name[:80]!r} is not the name of a file inside {address}. Check the name.")
    cached = _find_cached(address, names) if address.is_pinned else {}
    if missing := [name for name in names if name not in cached]:
        listing = source if isinstance(source, HubListing) else list_files(source)
        address = listing.address
        if not isinstance(source, HubListing):  # a branch, or names that are not all there
            cached = _find_cached(address, names)
            missing = [name for name in names if name not in cached]
        cached |= _download(listing, missing, on_progress)
    hashes = {name: _checked_sha256(address, name, cached[name]) for name in names}
    return HubFiles(cached[names[0]].parents[names[0].count("/")], address, hashes)


def copy_files(files: HubFiles) -> Path:
    """The folder of some files as a folder of plain files, which an artifact has to be: it is not read through links.

    It lies beside the client's cache, in HF_HOME, and is made once. Raises StorageError.
    """
    address = files.address
    name = "--".join(f"{address.page}/{address.revision}/{address.folder}".strip("/").split("/"))
    folder = Path(constants.HF_HOME).expanduser() / "patchsae" / name
    if all((folder / name).is_file() for name in files.files):  # it was made as a whole
        return folder
    sizes = {name: (files.folder / name).stat().st_size for name in files.files}
    if sum(sizes.values()) > _free_bytes(folder):
        raise disk_full(address)
    with build_folder(folder, replace=True) as new:
        for name, size in sizes.items():
            with open(files.folder / name, "rb") as file:
                write_new(new / name, memoryview(mmap(file.fileno(), 0, access=ACCESS_READ)) if size else b"")
    return folder


def _find_cached(address: HubAddress, names: Iterable[str]) -> dict[str, Path]:
    """The files of a commit that are in the cache, by name."""
    found = {}
    for name in names:
        place = huggingface_hub.try_to_load_from_cache(
            address.repo, _full(address, name), revision=address.revision, repo_type=address.kind
        )
        if isinstance(place, str):
            found[name] = Path(place)
    return found


def _download(listing: HubListing, names: list[str], on_progress: Progress | None) -> dict[str, Path]:
    address, sizes = listing.address, listing.sizes()
    places: dict[str, Path] = {}
    for name in names:
        if name not in sizes:
            raise HubError(f"{address} has no file {name}. Check the name, or give another folder or revision.")
    total = sum(sizes[name] for name in names)
    _check_space(address, total)
    if on_progress is not None:
        on_progress(0, total)
    done = 0
    for name in names:
        file = replace(address, folder=_full(address, name))
        where: Any = {
            "repo_id": file.repo, "filename": file.folder, "revision": file.revision, "repo_type": file.kind,
        }  # fmt: skip
        with use_client(file):
            if not places:  # the call below asks for a minute where there is no network
                huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(**where), timeout=TIMEOUT_S)
            meter = _meter(file, sizes[name], done, total, on_progress)
            place = Path(huggingface_hub.hf_hub_download(**where, etag_timeout=TIMEOUT_S, tqdm_class=meter))
        if address.revision not in place.parts:
            raise CorruptError(
                f"{file} was asked for, but the hub gave another commit, which is not used. Run the command again; if "
                "this repeats, correct HF_ENDPOINT."
            )
        places[name] = place
        done += sizes[name]
        if on_progress is not None:
            on_progress(done, total)
    with use_client(address):  # it puts the listing into the cache, too
        huggingface_hub.snapshot_download(
            address.repo, repo_type=address.kind, revision=address.revision, max_workers=1,
            allow_patterns=[_literal(_full(address, name)) for name in names],
        )  # fmt: skip
    return places


def _check_space(address: HubAddress, n_bytes: int) -> None:
    """Raise StorageError if so many bytes do not fit on the disk of the cache."""
    free = _free_bytes(Path(constants.HF_HUB_CACHE).expanduser())
    if n_bytes > free:
        raise disk_full(address, f": it needs {n_bytes:,} bytes, and {free:,} are free")


def _free_bytes(folder: Path) -> int:
    """What is free on the disk of a folder, which need not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _meter(address: HubAddress, size: int, before: int, total: int, on_progress: Progress | None) -> Any:
    """A class that stands for the client's progress bar, shows nothing and calls `on_progress`.

    The client makes one bar for a file, or two: what came over the network, and what was written.

    Args:
        size: bytes of the file.
        before, total: bytes of the files before it, and of all.
    """
    most, bar = 0, cast(Any, huggingface_hub.utils).tqdm

    class Meter(bar):  # type: ignore[misc,valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})
            self.n_bytes, self.n_restarts = 0, 0

        def update(self, n: float | None = 1) -> None:
            nonlocal most
            self.n_bytes += int(n or 0)
            self.n_restarts += (n or 0) < 0
            if self.n_restarts > _MAX_RESTARTS or self.n_bytes > size + _MAX_EXCESS_BYTES:
                raise cut_off(address)
            if most < self.n_bytes <= size:
                most = self.n_bytes
                if on_progress is not None:
                    on_progress(before + most, total)

    return Meter


def _checked_sha256(address: HubAddress, name: str, place: Path) -> str:
    """The sha256 of a file in the cache. Raises CorruptError, and removes the file, if it is not what the hub has.

    The cache names a file by its ETag: the sha256 of a large file, and of a small one git's sha1, that of
    `blob <size>\\0` and the content (docs of huggingface_hub, hf_hub_url). Where it holds no links, nothing is known.
    """
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % place.stat().st_size, usedforsecurity=False)
    etag = os.path.basename(os.readlink(place)) if place.is_symlink() else ""
    with open(place, "rb") as file:
        while data := file.read(_READ_BYTES):
            sha256.update(data)
            if len(etag) == 40:
                sha1.update(data)
    if etag != {64: sha256.hexdigest(), 40: sha1.hexdigest()}.get(len(etag), etag):
        blob = place.parent / os.readlink(place)
        try:
            blob.unlink(missing_ok=True)
            place.unlink()
        except OSError as error:
            raise CorruptError(
                f"{name} of {address} differs from what the hub lists, and cannot be removed from the cache. Remove "
                f"{place}, then run the command again."
            ) from error
        raise CorruptError(
            f"{name} of {address} differs from what the hub lists, so it was removed from the cache. Run the command "
            "again; if this repeats, a proxy or a server between changes what is downloaded."
        )
    return sha256.hexdigest()


def _full(address: HubAddress, name: str) -> str:
    """A name in the repository."""
    return f"{address.folder}/{name}" if address.folder else name


def _literal(name: str) -> str:
    """A pattern that matches this name only."""
    return "".join(f"[{sign}]" if sign in "*?[" else sign for sign in name)
