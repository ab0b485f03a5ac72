"""Beginning an artifact: what becomes of the thing that is at its path, and who may write it.

In: settings, parents, and a path where there may be nothing, the same artifact, another one, or what is left of one.
Out: the artifact, begun or complete, with the lock held if there is something to write. Promises: nothing that was
finished is replaced without --overwrite; whatever a killed command left can be taken over by the same command.
"""

import errno
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from actcache.artifacts.advice import storage_errors
from actcache.artifacts.artifact import OVERWRITING, forget_overwriting, list_files
from actcache.artifacts.commits import COMMITS, committed_shards, read_records
from actcache.artifacts.files import (
    artifact_path,
    build_folder,
    check_place,
    encode_json,
    is_remote,
    remove_folder,
    write_atomic,
    write_json,
    write_new,
)
from actcache.artifacts.litter import remove_litter
from actcache.artifacts.locks import SHARED_WAIT_S, OutputLock, remove_stale_lock
from actcache.artifacts.opening import (
    ARTIFACT_FILE,
    MANIFEST_FILE,
    Artifact,
    Kind,
    Parent,
    artifact_id,
    open_artifact,
)
from actcache.artifacts.places import PLACES_FILE, list_places, relative_path
from actcache.errors import ArtifactNotFoundError, CorruptError, PipelineError, SettingsError, StorageError

_OUR_FILES = {
    ARTIFACT_FILE, MANIFEST_FILE, PLACES_FILE, COMMITS, OVERWRITING, "images.parquet", "activations.zarr", "codes.zarr",
    "sae.safetensors", "metrics.jsonl", "checkpoints", "prompts.safetensors", "checkpoint.safetensors",
    "concepts.parquet", "top_images.parquet", "top_patches.parquet", "class_counts.parquet", "gallery.parquet",
    "gallery", "histogram.npy", "histogram_edges.npy", "position_map.npy", "nearest.npy", "nearest_cosine.npy",
    "image_embeddings.npy",
}  # fmt: skip
"""What lies directly in our artifacts, without `notes/`."""


def begin_artifact(
    path: str | Path,
    kind: Kind,
    *,
    settings: Mapping[str, Any],
    parents: Mapping[str, tuple[str, Path]],
    provenance: Mapping[str, Any],
    prepare: Callable[[Path], None] = lambda folder: None,
    schema: int = 1,
    overwrite: bool = False,
    lock: OutputLock | None = None,
) -> Artifact:
    """Create the artifact, or open the one that was made with the same settings before, complete or not.

    What another command has begun, but of which nothing is finished, is replaced. So are the remains of an artifact
    that was never sealed and has lost its artifact.json.

    Args:
        settings: JSON-able fields that change the bytes.
        parents: name -> (id, current path).
        provenance: JSON-able facts that are shown but are not part of the identity.
        prepare: fills the new directory with everything that never changes; it appears in one rename.
        schema: the version of the format that the settings need.
        overwrite: replace an existing artifact of this kind, unless the same command began it and was interrupted.
        lock: it is taken unless the artifact is complete, and the caller releases it when the writing has ended.

    Raises:
        SettingsError: something else is at `path`, and the message shows the differing fields side by side; another
            process is writing it; or it would lie inside a parent or another artifact, or a parent inside it.
    """
    path = artifact_path(path)
    if not is_remote(path) and path.name in ("", ".."):  # a temporary name needs a name
        path = Path(os.path.abspath(path))
    relative = {name: Parent(parent_id, relative_path(where, path)) for name, (parent_id, where) in parents.items()}
    settings = json.loads(json.dumps(settings, allow_nan=False))
    body = {
        "kind": kind,
        "schema": schema,
        "id": artifact_id(kind, settings, relative, schema),
        "settings": settings,
        "parents": {name: {"id": p.id, "path": p.path} for name, p in relative.items()},
        "provenance": dict(provenance),
    }
    places = list_places(path, {name: where for name, (_, where) in parents.items()}, provenance)
    begun = _find_begun(path, body)
    if begun and begun.complete and (not overwrite or _is_overwriting(path)):
        remove_remnants(path)
        with suppress(OSError):
            forget_overwriting(path)
        return begun
    check_apart(path, {name: where for name, (_, where) in parents.items() if not name.startswith("images")})
    if lock is None:
        return _begin(path, body, places, prepare, overwrite)
    deadline = time.monotonic() + SHARED_WAIT_S
    while True:
        lock.acquire(SHARED_WAIT_S if lock.shared else 0)
        if lock.shared and (begun := _find_begun(path, body)):  # another worker has begun it
            if not is_remote(path):
                remove_litter(path)
            return begun
        if lock.make_exclusive():
            artifact = _begin(path, body, places, prepare, overwrite)
            lock.share()
            return artifact
        if time.monotonic() > deadline:
            raise SettingsError(lock.describe_holder())
        time.sleep(random.uniform(0.01, 0.1))


def remove_remnants(path: str | Path) -> None:
    """Delete what dead writers left of an output: temporary files and folders beside and inside it, and its lock."""
    path = artifact_path(path)
    if not is_remote(path):  # a failed PUT leaves nothing
        remove_stale_lock(path)
        remove_litter(path)


def remove_artifact(path: Path) -> None:
    """Delete an artifact that this process has begun. Raises StorageError."""
    if is_remote(path):
        path.rmdir(recursive=True)  # type: ignore[call-arg]
        return
    with storage_errors(path):
        remove_folder(Path(os.path.realpath(path)))


def _find_begun(path: Path, body: Mapping[str, Any]) -> Artifact | None:
    """The artifact at `path` if it was begun with the same settings."""
    try:
        artifact = open_artifact(path)
    except PipelineError:
        return None
    return artifact if _is_same(artifact, body) else None


def _is_same(artifact: Artifact, body: Mapping[str, Any]) -> bool:
    """Whether an artifact was made with these settings. 1 and 1.0 are the same, although their hashes differ: older
    versions stored a float as the whole number that was given for it.
    """
    parents = {name: parent["id"] for name, parent in body["parents"].items()}
    return artifact.id == body["id"] or (
        artifact.kind == body["kind"]
        and artifact.settings == body["settings"]
        and {name: parent.id for name, parent in artifact.parents.items()} == parents
    )


def _begin(
    path: Path, body: Mapping[str, Any], places: Mapping[str, Any], prepare: Callable[[Path], None], overwrite: bool
) -> Artifact:
    kind: Kind = body["kind"]
    if not is_remote(path):
        remove_litter(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        _create(path, body, places, prepare, overwrite)
        if not _is_same(begun := open_artifact(path, kind), body):  # a writer without a lock was faster
            raise SettingsError(_differences(begun, body))
        return begun
    if not path.is_dir():
        raise SettingsError(f"{path} is a file. Expected a new or empty directory; choose another path.")
    try:
        artifact = open_artifact(path, kind)
    except ArtifactNotFoundError:
        if not (_are_remains(path) and (overwrite or not (path / MANIFEST_FILE).exists())):
            raise
    except CorruptError:
        if not overwrite:
            raise
    else:
        if not _is_same(artifact, body) and not overwrite and not _is_stub(artifact):
            raise SettingsError(_differences(artifact, body))
        if _is_same(artifact, body) and (not overwrite or _is_overwriting(path)):
            return artifact
    _create(path, body, places, prepare, overwrite, replace=True)
    return open_artifact(path, kind)


def _create(
    path: Path, body: Mapping[str, Any], places: Mapping[str, Any], prepare: Callable[[Path], None], overwrite: bool,
    *, replace: bool = False,
) -> None:  # fmt: skip
    """Make the directory and everything that never changes; `replace` what is there, if it is not empty."""
    if is_remote(path):  # folders cannot be renamed there: artifact.json is written last and makes this an artifact
        if path.exists():
            path.rmdir(recursive=True)  # type: ignore[call-arg]
        with storage_errors(path), tempfile.TemporaryDirectory() as scratch:
            prepare(Path(scratch))
            for name in list_files(Path(scratch)):
                write_atomic(path / name, (Path(scratch) / name).read_bytes())
        write_json(path / PLACES_FILE, places)
        write_json(path / ARTIFACT_FILE, body)
        return
    real = Path(os.path.realpath(path))  # a link stays a link
    with storage_errors(path):
        try:
            with build_folder(real, replace=replace) as folder:
                (folder / COMMITS).mkdir()
                prepare(folder)
                write_new(folder / PLACES_FILE, encode_json(places))
                write_new(folder / ARTIFACT_FILE, encode_json(body))
                if overwrite:
                    write_new(folder / OVERWRITING, b"")
        except StorageError as error:
            reason = error.__cause__
            if not replace and isinstance(reason, OSError) and reason.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return  # another writer's directory is there
            raise reason or error from None  # the error names the link's target


def _is_overwriting(path: Path) -> bool:
    """Whether a command with --overwrite began the artifact and has not sealed it, so that the same command resumes."""
    if is_remote(path) or not (path / OVERWRITING).exists():
        return False
    try:
        return all(read_records(path))
    except CorruptError:  # it must be possible to begin again
        return False


def _is_stub(artifact: Artifact) -> bool:
    """Whether nothing of an artifact is finished: it has no commit record and no checkpoint, and was never sealed.

    At most one shard may lie there, whose writer was killed before it wrote the record. More of them are an artifact
    whose records were deleted.
    """
    path = artifact.path
    if artifact.complete or is_remote(path) or committed_shards(path):
        return False
    if any(next(path.glob(pattern), None) for pattern in ("checkpoints/*.json", "checkpoint.safetensors", "notes/*")):
        return False
    shards = {file.name for pattern in ("activations.zarr/*/*/c/*", "codes.zarr/[0-9]*") for file in path.glob(pattern)}
    return len(shards) <= 1


def _are_remains(path: Path) -> bool:
    """Whether a folder without artifact.json holds only files of ours, and nothing that a person wrote."""
    names = [] if is_remote(path) else [entry.name for entry in path.iterdir()]
    return bool(names) and all(name in _OUR_FILES or name.endswith(".tmp") for name in names)


def check_apart(path: Path, parents: Mapping[str, Path]) -> None:
    """Raise SettingsError if the artifact would lie inside an artifact or a parent, or a parent inside it."""
    check_place(path)
    if is_remote(path):
        return
    inside = Path(os.path.realpath(path))
    for name, where in parents.items():
        if is_remote(where):
            continue
        parent = Path(os.path.realpath(where))
        if inside == parent:
            raise SettingsError(f"{path} is the {name} that it would be made from. Choose another path.")
        if parent in inside.parents:
            raise SettingsError(f"{path} lies inside {where}, which it is made from. Choose a path outside it.")
        if inside in parent.parents and parent.exists():
            raise SettingsError(f"{path} contains {where}, which it is made from. Choose a path outside it.")


def _differences(existing: Artifact, body: Mapping[str, Any]) -> str:
    old = {**_flatten(existing.settings), **{f"{n} (parent)": p.id for n, p in existing.parents.items()}}
    new = {**_flatten(body["settings"]), **{f"{n} (parent)": p["id"] for n, p in body["parents"].items()}}
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
