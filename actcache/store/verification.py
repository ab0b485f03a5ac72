"""verify(): are the bytes of an artifact those that were written?

In: any artifact, complete or not. Out: a list of problems, each with the name of the file. Every file is read once and
compared with its digest in the manifest or, for shards, in the commit records (which the manifest covers in turn).
"""

import itertools
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actcache.artifacts import (
    ARTIFACT_FILE,
    COMMITS,
    MANIFEST_FILE,
    Artifact,
    check_file,
    committed_shards,
    is_digest,
    is_remote,
    list_files,
    open_artifact,
    read_manifest,
    read_record,
    record_path,
)
from actcache.errors import CorruptError
from actcache.machine import count_processors
from actcache.options import check_number
from actcache.progress import Progress
from actcache.store.beside_seal import Problem, check_beside, check_spelling, remedies
from actcache.store.image_table import IMAGES_FILE, read_images
from actcache.store.layout import StoreLayout
from actcache.store.settings import StoreSettings

LINK, FOREIGN = "is a link", "was not written by this artifact"
"""Problems of a file that repair() removes, and of a file that it does not touch."""

_SHOWN = 100
"""Maximum number of missing shards that are listed: a store may claim any number."""


@dataclass(frozen=True)
class Verification:
    """The result of `verify`. `ok` when the artifact is complete and there is no problem."""

    path: Path
    kind: str
    complete: bool
    n_files: int
    n_bytes: int
    problems: tuple[Problem, ...]
    remedies: tuple[str, ...] = ()
    """How each damaged file is made again, in the order of the problems."""

    @property
    def ok(self) -> bool:
        return self.complete and not self.problems

    @property
    def shards(self) -> tuple[int, ...]:
        """Shards that have a problem."""
        return tuple(sorted({problem.shard for problem in self.problems if problem.shard is not None}))

    def to_json(self) -> dict[str, object]:
        return {
            "path": str(self.path), "kind": self.kind, "ok": self.ok, "complete": self.complete,
            "n_files": self.n_files, "n_bytes": self.n_bytes, "problems": list(map(str, self.problems)),
            "shards": self.shards, "remedies": self.remedies,
        }  # fmt: skip

    def __str__(self) -> str:
        """The state in words, and how much was read."""
        state = "is whole" if self.ok else "is damaged" if self.problems else "is not complete, but undamaged so far"
        return f"{state}: {self.n_files:,} files, {self.n_bytes / 1e6:,.1f} MB checked"


def verify(path: str | Path, *, n_threads: int | None = None, on_progress: Progress | None = None) -> Verification:
    """Read every file of an artifact and compare sizes and checksums.

    Args:
        on_progress: called with (bytes done, bytes in all).

    Raises:
        ArtifactNotFoundError, SchemaError, CorruptError: when `artifact.json` itself cannot be trusted.
    """
    n_threads = None if n_threads is None else check_number("n_threads", n_threads, int, at_least=1)
    artifact = open_artifact(path)
    settings, problems = None, []
    if artifact.kind == "acts":
        try:
            settings = StoreSettings.of(artifact)
        except CorruptError as error:
            problems.append(Problem(ARTIFACT_FILE, str(error)))
    expected, damaged = _expected_files(artifact, settings)
    problems += damaged
    if settings:
        problems += _check_store(artifact, settings.layout)
    beside, n_beside, beside_bytes = check_beside(artifact.path)
    problems += beside
    present_files = set(list_files(artifact.path))
    linked = {name for name in present_files if not is_remote(artifact.path) and os.path.islink(artifact.path / name)}
    problems += [Problem(name, LINK, expected.get(name, _NOTHING).shard) for name in sorted(linked)]
    problems += [Problem(name, "is missing", expected[name].shard) for name in sorted(set(expected) - present_files)]
    if artifact.complete and not any(problem.file == MANIFEST_FILE for problem in problems):
        known = {*expected, *linked, ARTIFACT_FILE, MANIFEST_FILE, *(problem.file for problem in problems)}
        for shard in {problem.shard for problem in problems} - {None}:  # files whose record is damaged
            if settings and shard is not None:
                known |= settings.shard_files(shard).keys()
        problems += [Problem(name, FOREIGN) for name in sorted(present_files - known)]
    present = sorted(set(expected) & present_files - linked)
    total = sum(expected[name].digest["bytes"] for name in present)
    done = 0
    with ThreadPoolExecutor(n_threads or count_processors()) as pool:
        checks = pool.map(lambda name: check_file(artifact.path / name, expected[name].digest), present)
        for name, problem in zip(present, checks, strict=True):
            if problem:
                problems.append(Problem(name, problem, expected[name].shard))
            done += expected[name].digest["bytes"]
            if on_progress:
                on_progress(done, total)
    return Verification(
        artifact.path, artifact.kind, artifact.complete, len(present) + n_beside, total + beside_bytes,
        tuple(dict.fromkeys(problems)), remedies(artifact, problems),
    )  # fmt: skip


@dataclass(frozen=True)
class _Expected:
    digest: Mapping[str, Any]
    shard: int | None


_NOTHING = _Expected({}, None)


def _expected_files(artifact: Artifact, settings: StoreSettings | None) -> tuple[dict[str, _Expected], list[Problem]]:
    """Digest of every file that should exist, and the problems of the records themselves."""
    files: dict[str, _Expected] = {}
    problems: list[Problem] = []
    try:
        shards = committed_shards(artifact.path)
    except CorruptError:  # a link, which is reported elsewhere
        shards = set()
    records = {str(record_path(Path(), shard)): shard for shard in shards}
    if artifact.complete:
        try:
            problems += check_spelling(artifact.path, MANIFEST_FILE, None)
            listed = read_manifest(artifact)["files"]
            records |= {name: int(Path(name).stem) for name in listed if name.startswith(f"{COMMITS}/")}
            problems += [Problem(n, "is not in the manifest", s) for n, s in sorted(records.items()) if n not in listed]
            for name, digest in listed.items():
                problems += _add(files, name, digest, records.get(name))
        except (CorruptError, KeyError, TypeError, AttributeError, ValueError) as error:
            problems.append(Problem(MANIFEST_FILE, f"{error}"))
    for shard in sorted(shards):
        name = str(record_path(Path(), shard))
        try:
            if name not in files:  # no manifest holds its checksum
                problems += check_spelling(artifact.path, name, shard)
            record = read_record(artifact.path, shard)
            for file, digest in record["files"].items():
                problems += _add(files, file, digest, shard)
        except CorruptError as error:
            problems.append(Problem(name, f"{error}", shard))
            continue
        if settings:
            problems += [Problem(name, what, shard) for what in _check_record(settings, shard, record)]
    return files, problems


def _add(files: dict[str, _Expected], name: str, digest: Any, shard: int | None) -> list[Problem]:
    """Expect a file, unless its name leads out of the artifact or its digest is malformed."""
    if os.path.isabs(name) or os.path.normpath(name) != name or name.split("/")[0] == "..":
        return [Problem(name, "leads out of the artifact", shard)]
    if not is_digest(digest):
        return [Problem(name, "its recorded digest is malformed", shard)]
    files[name] = _Expected(digest, shard)
    return []


def _check_store(artifact: Artifact, layout: StoreLayout) -> Iterator[Problem]:
    """Problems of an activation store beyond the files that its records and its manifest name."""
    if artifact.complete:
        with suppress(CorruptError):
            there = committed_shards(artifact.path)
            absent = itertools.islice((shard for shard in range(layout.n_shards) if shard not in there), _SHOWN)
            yield from (Problem(str(record_path(Path(), shard)), "is missing", shard) for shard in absent)
    else:  # no manifest holds the checksum of the table yet
        try:
            n_rows = read_images(artifact.path).num_rows
            if n_rows != layout.n_images:
                yield Problem(IMAGES_FILE, f"has {n_rows:,} rows, expected {layout.n_images:,}")
        except CorruptError as error:
            yield Problem(IMAGES_FILE, str(error))


def _check_record(settings: StoreSettings, shard: int, record: Mapping[str, Any]) -> Iterator[str]:
    """Problems of the contents of an activation store's record."""
    layout, expected = settings.layout, settings.shard_files(shard)
    if shard >= layout.n_shards:
        yield f"is the record of shard {shard}, but there are {layout.n_shards} shards"
    elif set(record["files"]) != set(expected):
        yield "does not list the files of its shard"
    elif settings.codec == "raw" and any(
        is_digest(record["files"][name]) and record["files"][name]["bytes"] != n_bytes
        for name, n_bytes in expected.items()
    ):
        yield "lists file sizes that do not follow from the settings"
    elif any(
        is_digest(record["files"][name])
        and len(record["files"][name]["pieces"]) != layout.n_blocks(shard) * layout.n_rows(name.split("/")[2]) + 1
        for name in expected
    ):
        yield "lists files that lack chunks"
    images = layout.shard_range(shard)
    if record.get("images") != [images.start, images.stop]:
        yield f"names images {record.get('images')}, expected {[images.start, images.stop]}"
