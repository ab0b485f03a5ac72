"""What a repository holds: the names and sizes of its files at one commit, from the hub or from the client's cache.

A branch is resolved to its commit once, and everything after uses the commit. What is known of a commit never changes,
so a listing that is in the cache is not asked for again.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors

from actcache.errors import CorruptError, HubError
from actcache.hub.address import HubAddress, is_safe_name
from actcache.hub.client import Api, use_client

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubFile:
    """A file of a repository: its name relative to the folder of the listing, with `/`, and its size in bytes."""

    name: str
    size: int


@dataclass(frozen=True)
class HubListing:
    """The files in a folder of a repository at one commit, in the order of their names.

    Attributes:
        address: the folder, with the commit as its revision. Where a file was named, the folder that it lies in.
        files: all files below the folder.
        named: the name of the file in the folder, where a file was named.
    """

    address: HubAddress
    files: tuple[HubFile, ...]
    named: str | None = None

    @property
    def repo(self) -> str:
        return self.address.repo

    @property
    def commit(self) -> str:
        return self.address.revision

    def sizes(self) -> dict[str, int]:
        """Bytes of each file by name."""
        return {file.name: file.size for file in self.files}


def list_files(address: HubAddress) -> HubListing:
    """List the files of an address: one call for a branch, one for a listing that is not in the cache, or none.

    Where the hub cannot be reached, the commit and the listing of the cache are used, and a warning names the commit.

    Raises:
        HubError: the repository, the revision or the folder does not exist or cannot be read.
        CorruptError: the answer is not the hub's, or a name in it leaves its folder.
    """
    with use_client(address):
        pinned = replace(address, revision=_resolve(address))
        entries = _list_all(pinned, resolved=not address.is_pinned)
    for name in entries:
        if not is_safe_name(name):
            raise CorruptError(
                f"{address} lists a file whose name leaves its folder: {name[:80]!r}. Nothing was downloaded. Do not "
                "use this repository."
            )
    named = None
    if pinned.folder in entries:
        parent, _, named = pinned.folder.rpartition("/")
        pinned = replace(pinned, folder=parent)
    prefix = f"{pinned.folder}/" if pinned.folder else ""
    inside = {name.removeprefix(prefix): size for name, size in entries.items() if name.startswith(prefix)}
    if not inside:
        raise HubError(f"{address} holds no files.{_near(entries) if prefix else ' Check the name.'}")
    return HubListing(pinned, tuple(HubFile(name, inside[name]) for name in sorted(inside)), named)


def list_repository(address: HubAddress) -> HubListing | None:
    """All files of a repository that may not be there yet; None if it is not, or if it holds no files.

    One that is private and closed to the user looks as if it were not there. Raises as `list_files`.
    """
    whole = replace(address, folder="")
    with use_client(whole):
        try:
            pinned = replace(whole, revision=_resolve(whole))
        except errors.RepositoryNotFoundError as error:
            if isinstance(error, errors.GatedRepoError):
                raise
            return None
        if not _list_all(pinned, resolved=not whole.is_pinned):
            return None
    return list_files(pinned)


def _resolve(address: HubAddress) -> str:
    """The commit of a revision, from the hub or else from the cache. Called within `use_client`."""
    if address.is_pinned:
        return address.revision
    api = Api()
    resolved = api.resolve_revision(address.repo, repo_type=address.kind, revision=address.revision).resolved
    if api.unreachable is not None and not isinstance(api.unreachable, errors.OfflineModeIsEnabled):
        logger.warning(
            "The Hugging Face hub could not be reached. Of %s, commit %s is used, which is in the cache.",
            address, resolved,
        )  # fmt: skip
    return str(resolved)


def _list_all(address: HubAddress, *, resolved: bool = True) -> dict[str, int]:
    """Name in the repository -> bytes, of all files at a commit. Called within `use_client`.

    Args:
        resolved: the hub was asked for the commit.
    """
    where: Any = {"repo_id": address.repo, "repo_type": address.kind, "revision": address.revision}
    try:
        return {file.path: file.size for file in huggingface_hub.get_cached_repo_tree(**where)}
    except errors.CachedRepoTreeNotFoundError:
        pass
    try:
        api = Api()
        if not resolved:  # the call below asks for half a minute where there is no network
            api.repo_info(**where)
        tree = api.list_repo_tree(**where, recursive=True)
        return {file.path: file.size for file in tree if isinstance(file, huggingface_hub.RepoFile)}
    except Exception:  # then what others downloaded of this commit, if anything, is all that there is
        try:
            folder = Path(huggingface_hub.snapshot_download(**where, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            folder = None
        if folder is None:
            raise
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _near(entries: dict[str, int]) -> str:
    """The folders that there are, as the last sentence of a message."""
    folders = sorted({name.partition("/")[0] for name in entries if "/" in name})
    more = f" and {len(folders) - 5} more" if len(folders) > 5 else ""
    return f" The repository has the folders {', '.join(folders[:5])}{more}." if folders else " It has no folders."
