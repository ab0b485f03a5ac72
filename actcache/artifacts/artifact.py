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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from actcache.artifacts.commits import COMMITS, committed_shards, read_records
from actcache.artifacts.files import (
    artifact_path,
    digest,
    encode_json,
    file_digest,
    fsync_directory,
    fsync_tree,
    is_remote,
    read_json,
    read_signed,
    remove_litter,
    storage_errors,
    temporary_path,
    write_atomic,
    write_json,
)
from actcache.errors import (
    ArtifactNotFoundError,
    CorruptError,
    IncompleteError,
    ParentMismatchError,
    SchemaError,
    SettingsError,
    StorageError,
)

SCHEMA = 1
"""Major version of docs/reference/format.md. A reader refuses a newer one."""

ARTIFACT_FILE = "artifact.json"
MANIFEST_FILE = "manifest.json"
UNSEALED_FOLDERS = ("notes",)
"""What people write beside the seal (names, notes); the manifest does not cover it."""

_NAMES = {
    "acts": "an activation store (x.acts)",
    "prompts": "an adapted model (x.prompts)",
    "run": "a run",
    "codes": "a code store (x.codes)",
    "concepts": "a concept table (x.concepts)",
}
"""How messages name each kind."""

_REMAKE = "Make the artifact again, with --overwrite."

Kind = Literal["acts", "prompts", "run", "codes", "concepts"]


@dataclass(frozen=True)
class Parent:
    """An artifact from which this one was made: its id, and its path relative to the child's directory."""

    id: str
    path: str


@dataclass(frozen=True)
class Artifact:
    """The contents of `artifact.json`, and whether the artifact is sealed.

    `settings` are the fields that change the bytes; they are hashed into `id` together with the parents' ids.
    """

    path: Path
    kind: Kind
    id: str
    settings: Mapping[str, Any]
    parents: Mapping[str, Parent]
    provenance: Mapping[str, Any]
    complete: bool

    def parent_path(self, name: str) -> Path:
        """Where parent `name` should be now. It may have moved, so the caller has to check."""
        recorded = self.parents[name].path
        if "://" in recorded or is_remote(self.path):
            return artifact_path(recorded)
        return Path(os.path.normpath(self.path.absolute() / recorded))


def artifact_id(kind: str, settings: Mapping[str, Any], parents: Mapping[str, Parent], schema: int = SCHEMA) -> str:
    return digest(
        {
            "kind": kind,
            "schema": schema,
            "settings": settings,
            "parents": {name: parent.id for name, parent in parents.items()},
        }
    )


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
        with storage_errors(path):
            _create(path, body, prepare)
    artifact = open_artifact(path, kind)
    same = artifact.settings == settings and {name: parent.id for name, parent in artifact.parents.items()} == {
        name: parent.id for name, parent in relative.items()
    }  # 1 equals 1.0, which hash differently: older versions stored a float as the whole number that was given
    if artifact.id != identity and not same:
        raise SettingsError(_differences(artifact, settings, relative))
    return artifact


def _create(path: Path, body: Mapping[str, Any], prepare: Callable[[Path], None]) -> None:
    """Make the directory and everything that never changes. Several workers may try; one succeeds, and all go on."""
    if is_remote(path):  # folders cannot be renamed there: artifact.json is written last and makes this an artifact
        with tempfile.TemporaryDirectory() as scratch:
            prepare(Path(scratch))
            for name in list_files(Path(scratch)):
                write_atomic(path / name, (Path(scratch) / name).read_bytes())
        write_json(path / ARTIFACT_FILE, body)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_litter(path)
    temporary = temporary_path(path)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        (temporary / COMMITS).mkdir(parents=True)
        prepare(temporary)
        (temporary / ARTIFACT_FILE).write_bytes(encode_json(body))
        fsync_tree(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        lost_race = isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST)
        if not lost_race:  # another worker's directory is there already
            raise
    fsync_directory(path.parent)


def relative_path(where: Path, child: Path) -> str:
    """The path of a parent as an artifact at `child` records it: relative, or a URL across file systems."""
    if is_remote(where) or is_remote(child):
        return str(where)
    return os.path.relpath(where.absolute(), child.absolute())


def open_artifact(path: str | Path, kind: Kind | None = None, *, complete: bool = False) -> Artifact:
    """Read `artifact.json` and check whether the artifact is sealed.

    Raises:
        ArtifactNotFoundError, SchemaError, CorruptError; IncompleteError when `complete` is required and it is not.
    """
    path = artifact_path(path)
    wanted = _NAMES[kind] if kind else "an artifact"
    advice = "check the path"
    try:
        there = (path / ARTIFACT_FILE).is_file()
        reason = "has no artifact.json" if path.exists() else "does not exist"
        advice = advice if there else _advice(path)
    except StorageError:  # an object store that cannot be reached
        raise
    except OSError as error:  # no permission, or a name that is too long
        there, reason = False, f"cannot be opened ({error.strerror})"
    if not there:
        raise ArtifactNotFoundError(f"{path} {reason}. Expected {wanted}; {advice}.")
    value = read_json(path / ARTIFACT_FILE, _REMAKE)
    try:
        schema = int(value["schema"])
        if schema > SCHEMA:
            raise SchemaError(
                f"{path} has schema {schema}; this version reads up to {SCHEMA}. Install a newer patchsae."
            )
        artifact = Artifact(
            path=path,
            kind=value["kind"],
            id=value["id"],
            settings=value["settings"],
            parents={name: Parent(p["id"], p["path"]) for name, p in value["parents"].items()},
            provenance=value["provenance"],
            complete=(path / MANIFEST_FILE).is_file(),
        )
        _check_types(artifact)
        identity = artifact_id(artifact.kind, artifact.settings, artifact.parents, schema)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, SchemaError):
            raise
        raise CorruptError(f"{path / ARTIFACT_FILE} has a missing or malformed field: {error}. {_REMAKE}") from error
    if kind is not None and artifact.kind != kind:
        actual = _NAMES.get(artifact.kind, f"a {artifact.kind} artifact")
        raise SchemaError(f"{path} is {actual}. Expected {wanted}; check the order of the arguments.")
    if identity != artifact.id:
        raise CorruptError(
            f"{path / ARTIFACT_FILE} was changed: its fields hash to {identity}, it records {artifact.id}. {_REMAKE}"
        )
    if complete and not artifact.complete:
        raise IncompleteError(f"{path} is not complete. Run the command that started it again: it resumes.")
    return artifact


def _advice(path: Path) -> str:
    """Advice for a path that is not an artifact; a folder of artifacts, such as a sweep, gets their first names."""
    if is_remote(path) or not path.is_dir():
        return "check the path"
    inside = sorted(str(file.parent) for file in path.glob(f"*/{ARTIFACT_FILE}"))
    more = ", ..." if len(inside) > 3 else ""
    return f"it contains {', '.join(inside[:3])}{more}: name one of them" if inside else "check the path"


def _check_types(artifact: Artifact) -> None:
    """Raise TypeError unless the fields have the types that docs/reference/format.md gives."""
    texts = {"kind": artifact.kind, "id": artifact.id}
    for name, parent in artifact.parents.items():
        texts |= {f"the id of parent {name}": parent.id, f"the path of parent {name}": parent.path}
    for name, value in texts.items():
        if not isinstance(value, str) or "\0" in value:
            raise TypeError(f"{name}, which is {value!r:.80}")
    for name, fields in (("settings", artifact.settings), ("provenance", artifact.provenance)):
        if not isinstance(fields, dict):
            raise TypeError(f"{name}, which is {fields!r:.80}")


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


def read_manifest(artifact: Artifact) -> Mapping[str, Any]:
    """Read the seal. Raises CorruptError when it differs from what was written."""
    return read_signed(
        artifact.path / MANIFEST_FILE,
        "Delete it and run the command that made the artifact again: it seals what is complete.",
    )


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


def find_parent(child: Artifact, name: str, given: str | Path | None = None) -> Path:
    """Where parent `name` of an artifact lies now: at `given`, by default at the recorded path; its id is checked.

    Raises:
        ArtifactNotFoundError: it is not there.
        ParentMismatchError: another artifact is there.
        SchemaError, CorruptError: as `open_artifact`.
    """
    path = artifact_path(given) if given is not None else child.parent_path(name)
    kinds: dict[str, Kind] = {"store": "acts", "run": "run", "codes": "codes"}
    word = name.split()[0]  # `store 2` is a store, too
    try:
        check_parent(child, name, open_artifact(path, kinds.get(word)))
    except ArtifactNotFoundError as error:
        if given is not None:
            raise
        raise ArtifactNotFoundError(
            f"{error} {child.path} was made from it; name its new path with --{word}."
        ) from error
    return path


def check_parent(child: Artifact, name: str, parent: Artifact) -> None:
    """Raise ParentMismatchError unless `child` was made from `parent`."""
    expected = child.parents[name]
    if expected.id != parent.id:
        raise ParentMismatchError(
            f"{child.path} was made from {name} {expected.id} (recorded at {expected.path}), but {parent.path} is "
            f"{parent.id}. Give the {name} that it was made from."
        )


def list_files(path: Path) -> Iterator[str]:
    """Relative names of an artifact's files, without temporary files and without what people wrote beside the seal.

    Links are listed like files and never followed.
    """
    if is_remote(path):
        for entry in path.rglob("*"):
            if entry.is_file():
                yield str(entry.relative_to(path))
        return
    for folder, folders, names in os.walk(path):
        relative = os.path.relpath(folder, path)
        names += [name for name in folders if os.path.islink(os.path.join(folder, name))]
        folders[:] = [name for name in folders if not name.endswith(".tmp")]
        if relative == ".":
            folders[:] = [name for name in folders if name not in UNSEALED_FOLDERS]
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
