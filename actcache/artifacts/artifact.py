"""What all artifacts share: identity, parents, atomic writes, commit records, the seal.

An artifact is a directory with `artifact.json` (kind, schema, id, settings, parents, provenance),
`commits/` (one record for each finished shard), and, once complete, `manifest.json` (size and checksum of every file).

Promises: a file appears under its final name whole and flushed, or not at all; an artifact's id depends on its
settings and its parents' ids only, never on a path, a host or the time; a sealed artifact is never edited.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actcache.artifacts.advice import storage_errors
from actcache.artifacts.commits import committed_shards, read_records
from actcache.artifacts.files import digest, file_digest, is_remote, write_json
from actcache.artifacts.opening import ARTIFACT_FILE, MANIFEST_FILE, Artifact
from actcache.artifacts.places import PLACES_FILE
from actcache.errors import IncompleteError, StorageError

UNSEALED_FOLDERS = ("notes",)
"""What people write beside the seal (names, notes); the manifest does not cover it."""
UNSEALED_FILES = (PLACES_FILE,)
"""What holds on one machine only; the manifest does not cover it either."""

OVERWRITING = ".overwrite.tmp"
"""A file that marks what a command with --overwrite has begun and not sealed yet."""


def seal_artifact(path: Path, **summary: Any) -> None:
    """Write `manifest.json`: a digest of every file (of shards through their records), `summary`, and its own digest.

    Idempotent: sealing twice writes the same bytes.

    Raises:
        StorageError: the artifact was removed while it was written, or a file cannot be written.
    """
    if not (path / ARTIFACT_FILE).is_file():
        raise StorageError(f"{path} cannot be sealed: its {ARTIFACT_FILE} was removed. Run the same command again.")
    recorded = {name for record in read_records(path) for name in record["files"]}
    files = {}
    for name in sorted(list_files(path)):
        if name in recorded or name == MANIFEST_FILE:
            continue
        files[name] = file_digest(path / name)
    body = json.loads(json.dumps({"files": files, **summary}, allow_nan=False))
    write_json(path / MANIFEST_FILE, {**body, "digest": digest(body)})
    with storage_errors(path):
        forget_overwriting(path)


def forget_overwriting(path: Path) -> None:
    """Remove the mark of an artifact that a command with --overwrite has sealed."""
    if not is_remote(path):
        (path / OVERWRITING).unlink(missing_ok=True)


def list_files(path: Path) -> Iterator[str]:
    """Relative names of the files that a seal covers: not temporary files, nor what lies beside the seal.

    Links are listed like files and never followed.
    """
    if is_remote(path):
        for entry in path.rglob("*"):
            name = str(entry.relative_to(path))
            if entry.is_file() and name not in UNSEALED_FILES:
                yield name
        return
    for folder, folders, names in os.walk(path):
        relative = os.path.relpath(folder, path)
        names += [name for name in folders if os.path.islink(os.path.join(folder, name))]
        folders[:] = [name for name in folders if not name.endswith(".tmp")]
        if relative == ".":
            folders[:] = [name for name in folders if name not in UNSEALED_FOLDERS]
            names = [name for name in names if name not in UNSEALED_FILES]
        for name in names:
            if not name.endswith(".tmp"):
                yield os.path.normpath(os.path.join(relative, name))


def require_complete(artifact: Artifact, n_shards: int) -> None:
    """Raise IncompleteError with the number of missing shards unless the artifact is sealed."""
    if not artifact.complete:
        missing = n_shards - sum(shard < n_shards for shard in committed_shards(artifact.path))
        raise IncompleteError(
            f"{artifact.path} is not complete: {missing} of {n_shards} shards are missing. "
            f"Finish it by running {artifact.maker} again: it resumes."
        )
