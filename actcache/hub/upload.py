"""Uploading a folder as one commit."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from actcache.errors import HubError, SettingsError
from actcache.hub.address import HubAddress
from actcache.hub.client import Api, use_client
from actcache.progress import Progress

COMMIT_S = 120.0
"""Longest wait for the hub to store a commit."""
PART_FILES, PART_BYTES = 100, 1 << 25
"""How much is sent between two calls of `on_progress`, unless a file is larger."""


def upload_folder(
    folder: str | Path, address: HubAddress, *, message: str, parent: str | None = None,
    on_progress: Progress | None = None,
) -> str:  # fmt: skip
    """Upload all files of a folder to the folder of an address, in one commit, and return the commit.

    The repository is created if there is none. Files that it has already, unchanged, are not sent; what else it holds
    stays. Compare what is there afterwards with `fetch_files(replace(address, revision=commit), names)`.

    Args:
        message: the first line of the commit's message.
        parent: the commit that the branch must still be at, or else nothing is changed; by default any will do.
        on_progress: called with bytes.

    Raises:
        HubError: the hub cannot be reached or does not let the user write.
        SettingsError: there is nothing to upload, or the address names a commit, which cannot change.
    """
    root = Path(folder)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    if not files:
        raise SettingsError(f"{root} holds no files. Give the folder to upload.")
    if address.is_pinned:
        raise SettingsError(f"{address} names a commit, which cannot change. Name a branch, or leave out @REVISION.")
    sizes = {path: path.stat().st_size for path in files}
    api, prefix = Api(), f"{address.folder}/" if address.folder else ""
    with use_client(address, COMMIT_S):
        _create(api, address)
        operations: list[huggingface_hub.CommitOperationAdd] = []
        done = 0
        for part in _split(sizes):
            additions = [
                huggingface_hub.CommitOperationAdd(
                    path_in_repo=prefix + path.relative_to(root).as_posix(), path_or_fileobj=path
                )
                for path in part
            ]
            api.preupload_lfs_files(
                address.repo, additions=additions, repo_type=address.kind, revision=address.revision, free_memory=False
            )
            operations += additions
            done += sum(sizes[path] for path in part)
            if on_progress is not None:
                on_progress(done, sum(sizes.values()))
        commit = api.create_commit(
            address.repo, operations=operations, commit_message=message, repo_type=address.kind,
            revision=address.revision, parent_commit=parent,
        )  # fmt: skip
    if not replace(address, revision=commit.oid).is_pinned:
        raise HubError(f"{address}: the hub did not say which commit it made. Look at its page.")
    return str(commit.oid)


def _split(sizes: Mapping[Path, int]) -> Iterator[list[Path]]:
    """The files in parts, of which each takes a call or two, and after which progress is told."""
    part: list[Path] = []
    for path, size in sizes.items():
        if part and (len(part) == PART_FILES or sum(sizes[each] for each in part) + size > PART_BYTES):
            yield part
            part = []
        part.append(path)
    yield part


def _create(api: Api, address: HubAddress) -> None:
    """Create the repository unless it is there. Called within `use_client`."""
    try:
        api.repo_info(address.repo, repo_type=address.kind)
    except errors.GatedRepoError:
        raise
    except errors.RepositoryNotFoundError:
        api.create_repo(address.repo, repo_type=address.kind, exist_ok=True)
