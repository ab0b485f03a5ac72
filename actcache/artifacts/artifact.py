"""What all artifacts share: identity, parents, atomic writes, commit records, the seal.

An artifact is a directory with `artifact.json` (kind, schema, id, settings, parents, provenance),
`commits/` (one record for each finished shard), and, once complete, `manifest.json` (size and checksum of every file).

Promises: a file appears under its final name whole and flushed, or not at all; an artifact's id depends on its
settings and its parents' ids only, never on a path, a host or the time; a sealed artifact is never edited.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from actcache.artifacts.commits import COMMITS, committed_shards, read_records
from actcache.artifacts.files import (
    artifact_path,
    digest,
    encode_json,
    file_digest,
    fsync_directory,
    fsync_tree,
    is_remote,
    remove_litter,
    storage_errors,
    temporary_path,
    write_atomic,
    write_json,
)
from actcache.artifacts.opening import (
    ARTIFACT_FILE,
    MANIFEST_FILE,
    SCHEMA,
    Artifact,
    Kind,
    Parent,
    artifact_id,
    open_artifact,
)
from actcache.artifacts.places import PLACES_FILE, list_places, relative_path
from actcache.errors import CorruptError, IncompleteError, SettingsError

UNSEALED_FOLDERS = ("notes",)
"""What people write beside the seal (names, notes); the manifest does not cover it."""
UNSEALED_FILES = (PLACES_FILE,)
"""What holds on one machine only; the manifest does not cover it either."""


# ---------------------------------------------------------------------------------------------------------------------
# Begin, open, seal


def begin_artifact(
    path: str | Path,
    kind: Kind,
    *,
    settings: Mapping[str, Any],
    parents: Mapping[str, tuple[str, Path]],
    provenance: Mapping[str, Any],
    prepare: Callable[[Path], None] = lambda folder: None,
    overwrite: bool = False,
) -> Artifact:
    """Create the artifact, or open the one that was made with the same settings before, complete or not.

    Args:
        settings: JSON-able fields that change the bytes.
        parents: name -> (id, current path).
        provenance: JSON-able facts that are shown but are not part of the identity.
        prepare: fills the new directory with everything that never changes; it appears in one rename.
        overwrite: remove an existing artifact of this kind first.

    Raises:
        SettingsError: something else is at `path`; the message shows the differing fields side by side.
    """
    path = artifact_path(path)
    if overwrite and path.exists():
        remove_artifact(path, kind)
    relative = {name: Parent(parent_id, relative_path(where, path)) for name, (parent_id, where) in parents.items()}
    settings = json.loads(json.dumps(settings, allow_nan=False))
    identity = artifact_id(kind, settings, relative)
    body = {
        "kind": kind,
        "schema": SCHEMA,
        "id": identity,
        "settings": settings,
        "parents": {name: {"id": p.id, "path": p.path} for name, p in relative.items()},
        "provenance": dict(provenance),
    }
    if path.exists() and not path.is_dir():
        raise SettingsError(f"{path} is a file. Expected a new or empty directory; choose another path.")
    if not (path.is_dir() and any(path.iterdir())):
        places = list_places(path, {name: where for name, (_, where) in parents.items()}, provenance)
        with storage_errors(path):
            _create(path, body, places, prepare)
    artifact = open_artifact(path, kind)
    if artifact.id != identity:
        raise SettingsError(_differences(artifact, settings, relative))
    return artifact


def _create(path: Path, body: Mapping[str, Any], places: Mapping[str, Any], prepare: Callable[[Path], None]) -> None:
    """Make the directory and everything that never changes. Several workers may try; one succeeds, and all go on."""
    if is_remote(path):  # folders cannot be renamed there: artifact.json is written last and makes this an artifact
        with tempfile.TemporaryDirectory() as scratch:
            prepare(Path(scratch))
            for name in list_files(Path(scratch)):
                write_atomic(path / name, (Path(scratch) / name).read_bytes())
        write_json(path / PLACES_FILE, places)
        write_json(path / ARTIFACT_FILE, body)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_litter(path)
    temporary = temporary_path(path)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        (temporary / COMMITS).mkdir(parents=True)
        prepare(temporary)
        (temporary / PLACES_FILE).write_bytes(encode_json(places))
        (temporary / ARTIFACT_FILE).write_bytes(encode_json(body))
        fsync_tree(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        lost_race = isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST)
        if not lost_race:  # another worker's directory is there already
            raise
    fsync_directory(path.parent)


def seal_artifact(path: Path, **summary: Any) -> None:
    """Write `manifest.json`: a digest of every file (of shards through their records), `summary`, and its own digest.

    Idempotent: sealing twice writes the same bytes.
    """
    recorded = {name for record in read_records(path) for name in record["files"]}
    files = {}
    for name in sorted(list_files(path)):
        if name in recorded or name == MANIFEST_FILE:
            continue
        files[name] = file_digest(path / name)
    body = json.loads(json.dumps({"files": files, **summary}, allow_nan=False))
    write_json(path / MANIFEST_FILE, {**body, "digest": digest(body)})


def remove_artifact(path: Path, kind: Kind) -> None:
    """Delete an artifact directory. Raises when `path` is something else, so no other folder is removed by mistake.

    A directory with a malformed artifact.json counts as an artifact.
    """
    with suppress(CorruptError):
        open_artifact(path, kind)
    if is_remote(path):
        path.rmdir(recursive=True)  # type: ignore[call-arg]
        return
    removed = temporary_path(path)
    os.replace(path, removed)
    shutil.rmtree(removed)


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


def _differences(existing: Artifact, settings: Mapping[str, Any], parents: Mapping[str, Parent]) -> str:
    old = {**_flatten(existing.settings), **{f"{n} (parent)": p.id for n, p in existing.parents.items()}}
    new = {**_flatten(settings), **{f"{n} (parent)": p.id for n, p in parents.items()}}
    rows = [
        f"{name}: {old.get(name, 'absent')} there, {new.get(name, 'absent')} asked for"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    return (
        f"{existing.path} was made with other settings ({'; '.join(rows)}). "
        "Choose another path, or pass --overwrite to replace it."
    )


def _flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def require_complete(artifact: Artifact, n_shards: int, command: str) -> None:
    """Raise IncompleteError with the number of missing shards unless the artifact is sealed."""
    if not artifact.complete:
        missing = n_shards - sum(shard < n_shards for shard in committed_shards(artifact.path))
        raise IncompleteError(
            f"{artifact.path} is not complete: {missing} of {n_shards} shards are missing. "
            f"Finish it by running the same `{command}` command again: it resumes."
        )
