"""verify(): are an artifact's bytes the bytes that were written?

In: any artifact, complete or not. Out: a list of problems, each naming the file. Every file is read once and compared
with the digest in the manifest or, for shards, in their commit records (which the manifest covers in turn).
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actcache.artifact import (
    ARTIFACT_FILE,
    COMMITS,
    MANIFEST_FILE,
    Artifact,
    list_files,
    open_artifact,
    read_manifest,
    read_record,
)
from actcache.errors import CorruptError
from actcache.files import (
    crc32c,
)


@dataclass(frozen=True)
class Verification:
    """What `verify` found. `ok` when the artifact is complete and nothing is wrong."""

    path: Path
    kind: str
    complete: bool
    n_files: int
    n_bytes: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return self.complete and not self.problems


def verify(
    path: str | Path, *, n_threads: int | None = None, on_progress: Callable[[int, int], None] | None = None
) -> Verification:
    """Read every file of an artifact and compare sizes and checksums.

    Args:
        on_progress: called with (bytes done, bytes in all).

    Raises:
        ArtifactNotFoundError, SchemaError, CorruptError: when `artifact.json` itself cannot be trusted.
    """
    artifact = open_artifact(path)
    expected, problems = _expected_files(artifact)
    found = set(list_files(artifact.path))
    known = {*expected, ARTIFACT_FILE, MANIFEST_FILE}
    problems += [f"{name}: is missing" for name in sorted(set(expected) - found)]
    if artifact.complete:
        problems += [f"{name}: was not written by this artifact" for name in sorted(found - known)]
    present = sorted(set(expected) & found)
    total = sum(expected[name]["bytes"] for name in present)
    done = 0
    with ThreadPoolExecutor(n_threads or os.cpu_count() or 1) as pool:
        checks = pool.map(lambda name: check_file(artifact.path / name, expected[name]), present)
        for name, problem in zip(present, checks, strict=True):
            if problem:
                problems.append(f"{name}: {problem}")
            done += expected[name]["bytes"]
            if on_progress:
                on_progress(done, total)
    return Verification(artifact.path, artifact.kind, artifact.complete, len(present), total, tuple(problems))


def _expected_files(artifact: Artifact) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """Digest of every file that should be there, and what is wrong with the records themselves."""
    files: dict[str, Mapping[str, Any]] = {}
    problems: list[str] = []
    if artifact.complete:
        try:
            files.update(read_manifest(artifact)["files"])
        except CorruptError as error:
            problems.append(f"{MANIFEST_FILE}: {error}")
    for entry in sorted((artifact.path / COMMITS).glob("[0-9]*.json")):
        try:
            files.update(read_record(artifact.path, int(entry.stem))["files"])
        except (CorruptError, ValueError) as error:
            problems.append(f"{os.path.relpath(entry, artifact.path)}: {error}")
    for name in [name for name, value in files.items() if not is_digest(value)]:
        problems.append(f"{name}: its recorded digest is garbled")
        del files[name]
    if artifact.complete:
        listed = {name for name in files if name.startswith(f"{COMMITS}/")}
        present = {os.path.relpath(p, artifact.path) for p in (artifact.path / COMMITS).glob("[0-9]*.json")}
        problems += [f"{name}: is not in the manifest" for name in sorted(present - listed)]
    return files, problems


def is_digest(value: Any) -> bool:
    try:
        return bool(int(value["bytes"]) == sum(n_bytes for n_bytes, _ in value["pieces"]))
    except (KeyError, TypeError, ValueError):
        return False


def check_file(path: Path, digest: Mapping[str, Any]) -> str | None:
    """None when the file's size and pieces agree with its digest, else what differs."""
    size = path.stat().st_size
    if size != digest["bytes"]:
        return f"has {size:,} bytes, expected {digest['bytes']:,}"
    with open(path, "rb") as file:
        offset = 0
        for n_bytes, checksum in digest["pieces"]:
            if crc32c(file.read(n_bytes)) != checksum:
                return f"differs from what was written in bytes {offset:,} to {offset + n_bytes:,}"
            offset += n_bytes
    return None
