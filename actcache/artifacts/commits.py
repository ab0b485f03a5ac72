"""Commit records: one JSON file for each finished shard, written last. A shard without a record does not exist.

A record holds the number of the shard, the digest of each of its files, statistics, failed images, and its own digest.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actcache.artifacts.advice import storage_errors
from actcache.artifacts.files import digest, is_remote, make_folders, read_signed, write_json
from actcache.errors import CorruptError
from actcache.schema import parse

COMMITS = "commits"

_REPAIR = "Run `verify {} --repair`."


@dataclass(frozen=True)
class _Fields:
    """What every record holds; readers of a kind check the rest."""

    shard: int
    files: Mapping[str, object]


def record_path(path: Path, shard: int) -> Path:
    return path / COMMITS / f"{shard:06d}.json"


def write_record(path: Path, shard: int, record: Mapping[str, Any]) -> None:
    """The last step of a shard's commit; a record is never replaced. `record["files"]`: relative name -> digest."""
    if not is_remote(path):
        with storage_errors(path):
            make_folders(path / COMMITS, within=path)
    body = json.loads(json.dumps({"shard": shard, **record}, allow_nan=False))
    write_json(record_path(path, shard), {**body, "digest": digest(body)}, replace=False)


def committed_shards(path: Path) -> set[int]:
    """Numbers of the shards that have a record. Raises CorruptError when the records' folder is a link."""
    _refuse_link(path)
    return {
        int(entry.stem) for entry in (path / COMMITS).glob("*.json") if entry.stem.isascii() and entry.stem.isdigit()
    }


def _refuse_link(path: Path) -> None:
    if not is_remote(path) and (path / COMMITS).is_symlink():
        raise CorruptError(f"{path / COMMITS} is a link, but an artifact contains no links. {_REPAIR.format(path)}")


def read_record(path: Path, shard: int) -> Mapping[str, Any]:
    """Raises CorruptError when the record differs from what was written, or is another shard's."""
    _refuse_link(path)
    record = read_signed(record_path(path, shard), _REPAIR.format(path))
    if parse(_Fields, record, record_path(path, shard), _REPAIR.format(path)).shard != shard:
        raise CorruptError(f"{record_path(path, shard)} is not the record of shard {shard}. {_REPAIR.format(path)}")
    return record


def read_records(path: Path) -> Iterator[Mapping[str, Any]]:
    for shard in sorted(committed_shards(path)):
        yield read_record(path, shard)


def missing_shards(path: Path, n_shards: int) -> list[int]:
    done = committed_shards(path)
    return [shard for shard in range(n_shards) if shard not in done]
