"""describe(): what an artifact is, from its own JSON files alone. It works on incomplete artifacts too."""

import os
from collections.abc import Mapping
from pathlib import Path

from actcache.artifacts import (
    Artifact,
    committed_shards,
    exists,
    is_elsewhere,
    is_remote,
    list_files,
    open_artifact,
    read_seal,
    record_path,
    recorded_places,
)
from actcache.errors import PipelineError
from actcache.store.settings import StoreSettings


def describe(path: str | Path) -> Mapping[str, object]:
    """Facts about any artifact, JSON-able: kind, id, completeness, settings, parents and whether they are in place.

    `shards` is {"done", "total"}, `parents` is {name: {"id", "path", "state"}}; all numbers are numbers.

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
        n_shards = len(sizes) if isinstance(sizes, list) else StoreSettings.of(artifact).layout.n_shards
        facts["shards"] = {"done": len(committed_shards(artifact.path)), "total": n_shards}
    present = set(list_files(artifact.path))
    facts["bytes"] = sum(_size(artifact.path / name) for name in present)
    facts["parents"] = {
        name: {"id": parent.id, "path": _legible(parent.path), "state": _state(artifact, name)}
        for name, parent in artifact.parents.items()
    }
    if artifact.complete:
        manifest = read_seal(artifact)
        if missing := sorted(_expected_files(artifact, manifest) - present):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            facts |= {"complete": False, "missing": f"{missing[0]}{more}; run `verify {path}`"}
        if isinstance(manifest.get("failed"), dict) and manifest["failed"]:
            facts["skipped_images"] = len(manifest["failed"])
        counts = ("quality", "n_entries", "n_underflowed", "n_tokens", "n_alive")
        facts |= {key: manifest[key] for key in counts if key in manifest}
    settings = {key: value for key, value in artifact.settings.items() if value is not None}
    provenance = {key: value for key, value in artifact.provenance.items() if not isinstance(value, dict)}
    return {**facts, **settings, **provenance}


def _expected_files(artifact: Artifact, manifest: Mapping[str, object]) -> set[str]:
    """Names of the files that a sealed artifact has, without reading its records."""
    listed, sizes = manifest.get("files"), artifact.settings.get("shard_sizes")
    expected = set(listed) if isinstance(listed, dict) else set()
    n_there = len(committed_shards(artifact.path)) + 1  # of more shards than that, one is missing for certain
    if artifact.kind == "acts":
        settings = StoreSettings.of(artifact)
        shards = range(min(settings.layout.n_shards, n_there))
        expected |= {name for shard in shards for name in settings.shard_files(shard)}
    elif artifact.kind == "codes" and isinstance(sizes, list):
        shards = range(min(len(sizes), n_there))
        expected |= {f"codes.zarr/{shard}/{column}/c/0" for shard in shards for column in ("row", "latent")}
    else:
        return expected
    return expected | {str(record_path(Path(), shard)) for shard in shards}


def _size(path: Path) -> int:
    return int(path.stat().st_size if is_remote(path) else os.lstat(path).st_size)


def _state(artifact: Artifact, name: str) -> str:
    """Where a parent is now: at the path that the artifact recorded, at another one, or nowhere that is looked at."""
    parent = artifact.parents[name]
    if is_elsewhere(artifact.path, parent.path):
        return "on other storage, not looked for"
    places = recorded_places(artifact.path, "parents", name, parent.path)
    holds_images = "images" in name  # `images 2`, `test images`: an image source is no artifact
    state = "not there"
    for number, place in enumerate(places):
        try:
            right = exists(place) if holds_images else open_artifact(place).id == parent.id
        except PipelineError:
            continue
        if right:
            return "there" if number == 0 else f"there, at {place}"
        state = state if holds_images else "another artifact is there"
    return state


def _legible(path: str) -> str:
    """A recorded path without the surrogates that stand for bytes that are no UTF-8."""
    return path.encode(errors="backslashreplace").decode()
