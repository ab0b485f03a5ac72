"""Opening an artifact: `artifact.json`, the seal, and whether both are what was written.

In: a path that may hold anything. Out: an `Artifact`, whose fields have the types of docs/reference/format.md. The
settings and the summary of each kind are checked by the reader of that kind, with `read_settings` and `read_summary`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from actcache.artifacts.files import artifact_path, digest, is_remote, read_json, read_signed
from actcache.artifacts.places import exists, recorded_places
from actcache.errors import ArtifactNotFoundError, CorruptError, IncompleteError, SchemaError, StorageError
from actcache.schema import parse

SCHEMA = 2
"""Newest major version of docs/reference/format.md."""

ARTIFACT_FILE = "artifact.json"
MANIFEST_FILE = "manifest.json"

Kind = Literal["acts", "prompts", "run", "codes", "concepts"]
T = TypeVar("T")

_NEWEST: Mapping[Kind, int] = {"acts": SCHEMA}
"""The newest version of each kind, of which a reader refuses a newer one; 1 for the kinds that are not listed."""

_NAMES: Mapping[Kind, str] = {
    "acts": "an activation store (x.acts)",
    "prompts": "an adapted model (x.prompts)",
    "run": "a run",
    "codes": "a code store (x.codes)",
    "concepts": "a concept table (x.concepts)",
}
"""How messages name each kind."""

_VERBS: Mapping[Kind, str] = {
    "acts": "extract", "prompts": "adapt", "run": "train", "codes": "encode", "concepts": "analyze",
}  # fmt: skip
"""The verb that writes each kind."""

WRITTEN = "written"
"""The format of an imported store that a program has written through `StoreWriter`."""

_REMAKE = "Make the artifact again, with --overwrite."


@dataclass(frozen=True)
class Parent:
    """An artifact from which this one was made: its id, and its path relative to the child's directory."""

    id: str
    path: str = field(metadata={"any_text": True})


@dataclass(frozen=True)
class Artifact:
    """The contents of `artifact.json`, and whether the artifact is sealed.

    `settings` are the fields that change the bytes; they are hashed into `id` together with the parents' ids.
    `schema` is the version of the format that the artifact has.
    """

    path: Path
    kind: Kind
    id: str
    settings: Mapping[str, Any]
    parents: Mapping[str, Parent]
    provenance: Mapping[str, Any]
    complete: bool
    schema: int = 1

    def parent(self, name: str) -> Parent:
        """What is recorded of a parent. Raises CorruptError if there is none of this name."""
        if name not in self.parents:
            raise CorruptError(f"{self.path / ARTIFACT_FILE} records no parent {name}. {self.remedy}")
        return self.parents[name]

    def parent_path(self, name: str) -> Path:
        """Where parent `name` lies now, or else where it was recorded. The caller checks that it is the right one."""
        recorded = self.parent(name).path
        places = recorded_places(self.path, "parents", name, recorded)
        return next((place for place in places if exists(place)), places[0] if places else artifact_path(recorded))

    @property
    def remedy(self) -> str:
        """What to do about a damaged file of this artifact, as the last sentence of a message."""
        if self.kind != "acts":
            return f"Run `{_VERBS[self.kind]}` again with --overwrite."
        if self.imported is None:
            return f"Run `verify {self.path} --repair`."
        return f"Run {self.maker} again with {'overwrite=True' if self.imported == WRITTEN else '--overwrite'}."

    @property
    def maker(self) -> str:
        """What is run again to finish this artifact, as a part of a sentence."""
        if self.imported == WRITTEN:
            return "the program that wrote it"
        return f"the same `{_VERBS[self.kind] if self.imported is None else 'import'}` command"

    @property
    def imported(self) -> str | None:
        """The format that an activation store was imported from, or WRITTEN; None if no import made it."""
        fields = self.settings.get("imported") if self.kind == "acts" else None
        return str(fields.get("format")) if isinstance(fields, dict) else None


@dataclass(frozen=True)
class _Fields:
    """What artifact.json holds."""

    kind: Kind
    id: str
    settings: Mapping[str, object]
    parents: Mapping[str, Parent]
    provenance: Mapping[str, object]
    schema: int = field(metadata={"at_least": 1})


def artifact_id(kind: str, settings: Mapping[str, Any], parents: Mapping[str, Parent], schema: int = 1) -> str:
    return digest(
        {
            "kind": kind,
            "schema": schema,
            "settings": settings,
            "parents": {name: parent.id for name, parent in parents.items()},
        }
    )


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
    except (OSError, ValueError) as error:  # no permission, or a name that is too long or holds a zero byte
        there, reason = False, f"cannot be opened ({getattr(error, 'strerror', None) or error})"
    if not there:
        raise ArtifactNotFoundError(f"{path} {reason}. Expected {wanted}; {advice}.")
    value = read_json(path / ARTIFACT_FILE, _REMAKE)
    _check_schema(path, value)
    fields = parse(_Fields, value, path / ARTIFACT_FILE, _REMAKE)
    if kind is not None and fields.kind != kind:
        raise SchemaError(f"{path} is {_NAMES[fields.kind]}. Expected {wanted}; check the order of the arguments.")
    identity = artifact_id(fields.kind, fields.settings, fields.parents, fields.schema)
    if identity != fields.id:
        raise CorruptError(
            f"{path / ARTIFACT_FILE} was changed: its fields hash to {identity}, it records {fields.id:.80}. {_REMAKE}"
        )
    artifact = Artifact(
        path=path,
        kind=fields.kind,
        id=fields.id,
        settings=fields.settings,
        parents=fields.parents,
        provenance=fields.provenance,
        complete=(path / MANIFEST_FILE).is_file(),
        schema=fields.schema,
    )
    if complete and not artifact.complete:
        raise IncompleteError(f"{path} is not complete. Run the command that started it again: it resumes.")
    return artifact


def _check_schema(path: Path, value: Any) -> None:
    """Raise SchemaError for a newer artifact before its fields are read, because they may mean something else."""
    schema, kind = (value.get("schema"), value.get("kind")) if isinstance(value, dict) else (None, None)
    newest = next((version for known, version in _NEWEST.items() if known == kind), 1)
    if type(schema) is int and newest < schema < 1 << 31:
        raise SchemaError(f"{path} has schema {schema}; this version reads up to {newest}. Install a newer patchsae.")


def _advice(path: Path) -> str:
    """Advice for a path that is not an artifact; a folder of artifacts, such as a sweep, gets their first names."""
    if is_remote(path) or not path.is_dir():
        return "check the path"
    inside = sorted(str(file.parent) for file in path.glob(f"*/{ARTIFACT_FILE}"))
    more = ", ..." if len(inside) > 3 else ""
    return f"it contains {', '.join(inside[:3])}{more}: name one of them" if inside else "check the path"


def read_manifest(artifact: Artifact) -> Mapping[str, Any]:
    """Read the seal, without its own digest. Raises CorruptError when it differs from what was written."""
    return read_signed(
        artifact.path / MANIFEST_FILE,
        "Delete it and run the command that made the artifact again: it seals what is complete.",
    )


def read_settings(artifact: Artifact, kind: type[T]) -> T:
    """The settings of an artifact as a record. Raises CorruptError, which names the field."""
    return parse(kind, artifact.settings, f"{artifact.path / ARTIFACT_FILE}: settings", _REMAKE)


def read_provenance(artifact: Artifact, kind: type[T]) -> T:
    """What an artifact records about its making, as a record. Raises CorruptError, which names the field."""
    return parse(kind, artifact.provenance, f"{artifact.path / ARTIFACT_FILE}: provenance", _REMAKE)
