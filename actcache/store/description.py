"""describe(): what an artifact is, from its own JSON files alone. It works on incomplete artifacts too."""

import os
from collections.abc import Mapping
from pathlib import Path

from actcache.artifacts import Artifact, committed_shards, is_remote, list_files, open_artifact, read_manifest
from actcache.store.settings import StoreSettings


def describe(path: str | Path) -> Mapping[str, object]:
    """Facts about any artifact, JSON-able: kind, id, completeness, settings, parents and whether they are in place.

    Raises:
        ArtifactNotFoundError, SchemaError, CorruptError.
    """
    artifact = open_artifact(path)
    facts: dict[str, object] = {
        "path": str(path),
        "kind": artifact.kind,
        "id": artifact.id,
        "complete": artifact.complete,
    }
    sizes = artifact.settings.get("shard_sizes")  # a code store has these
    if artifact.kind == "acts" or isinstance(sizes, list):
        n_shards = len(sizes) if isinstance(sizes, list) else StoreSettings.from_json(artifact.settings).layout.n_shards
        facts["shards"] = f"{len(committed_shards(artifact.path))} of {n_shards}"
    facts["bytes"] = sum(_size(artifact.path / name) for name in list_files(artifact.path))
    for name, parent in artifact.parents.items():
        facts[f"made from {name}"] = f"{parent.id} ({parent.path}, {_state(artifact, name)})"
    if artifact.complete:
        manifest = read_manifest(artifact)
        if isinstance(manifest.get("failed"), dict) and manifest["failed"]:
            facts["skipped images"] = len(manifest["failed"])
        counts = ("quality", "n_entries", "n_underflowed", "n_tokens", "n_alive")
        facts |= {key: manifest[key] for key in counts if key in manifest}
    settings = {key: value for key, value in artifact.settings.items() if value is not None}
    provenance = {key: value for key, value in artifact.provenance.items() if not isinstance(value, dict)}
    return {**facts, **settings, **provenance}


def _size(path: Path) -> int:
    return int(path.stat().st_size if is_remote(path) else os.lstat(path).st_size)


def _state(artifact: Artifact, name: str) -> str:
    """Whether a parent is at the path that the artifact recorded."""
    try:
        path = artifact.parent_path(name)
        if name == "images":
            return "there" if path.is_dir() else "not there"
        parent = open_artifact(path)
    except Exception:  # the path may be anything, and file systems raise many kinds of errors
        return "not there"
    return "there" if parent.id == artifact.parents[name].id else "another artifact is there"
