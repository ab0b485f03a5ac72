"""Result files: what a study measured, as one JSON file that names what it was made from.

    {"kind", "schema", "id", "settings", "parents": {name: {"id", "path"}}, ...}

A result is small, has no shards and nothing is made from it, so it is a file rather than an artifact (decision 15). It
has an identity like an artifact's, and running the same command twice is as safe. Each kind has its own module here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from actcache import SchemaError, SettingsError
from actcache.artifacts import Artifact, check_place, digest, read_json, read_signed, write_output
from actcache.schema import parse
from analysis.results.result import Head, Result, ResultParent

SCHEMA = 1
R = TypeVar("R", bound=Result)

_EXPECTED = (
    "Expected the JSON file of evaluate, intervene, attribute, steer, probe, inspect, localize, rules, compare or "
    "benchmark."
)


def describe_result(record: type[Result], settings: Mapping[str, object], parents: Mapping[str, Artifact]) -> Head:
    """The head of a result of a kind."""
    settings = json.loads(json.dumps(settings, allow_nan=False))
    ids = {name: parent.id for name, parent in parents.items()}
    identity = digest({"kind": record.KIND, "schema": SCHEMA, "settings": settings, "parents": ids})
    named = {name: ResultParent(parent.id, parent.path.name) for name, parent in parents.items()}
    return Head(record.KIND, SCHEMA, identity, settings, named)


def find_result(record: type[R], out: str | Path | None, head: Head, *, overwrite: bool = False) -> R | None:
    """The result that the same command wrote before; None if there is none, or it is to be replaced.

    Raises:
        SettingsError: something else is there; the message shows the fields that differ side by side.
        CorruptError: the file is malformed.
    """
    if out is None:
        return None
    out = Path(out)
    check_place(out)
    if out.is_dir():
        raise SettingsError(f"{out} is a folder. Expected a file such as {out / 'result.json'}.")
    if overwrite or not out.exists():
        return None
    content = _read(out, "Choose another path, or pass --overwrite to replace it.")
    if not isinstance(content, dict) or "kind" not in content:
        raise SettingsError(f"{out} is not a result file. Choose another path, or pass --overwrite to replace it.")
    if content.get("id") != head.id:
        advice = "Choose another path, or pass --overwrite to replace it."
        earlier = parse(_Earlier, content, out, advice)
        old = _compared_fields(earlier.kind, earlier.settings, {n: {"id": p.id} for n, p in earlier.parents.items()})
        new = _compared_fields(head.kind, head.settings, {n: {"id": p.id} for n, p in head.parents.items()})
        rows = [
            f"{name}: {old.get(name, 'absent')} there, {new.get(name, 'absent')} asked for"
            for name in sorted({*old, *new})
            if old.get(name) != new.get(name)
        ]
        raise SettingsError(
            f"{out} was made with other settings ({'; '.join(rows)}). "
            "Choose another path, or pass --overwrite to replace it."
        )
    return record.from_json(content, str(out))


def finish_result(out: str | Path | None, result: R) -> R:
    """Write a result if a path is given. Returns what reading the file gives: NaN and infinity become None."""
    content = result.to_json()
    text = json.dumps(content, allow_nan=False, indent=1) + "\n"
    if out is not None:
        signed = {**content, "digest": digest(content)}
        write_output(out, (json.dumps(signed, indent=1) + "\n").encode())
    return type(result).from_json(json.loads(text), str(out or "the result"))


def read_result(path: str | Path, *records: type[R]) -> R:
    """Read a result file of one of some kinds. Raises SchemaError for another kind or a newer schema, CorruptError."""
    path = Path(path)
    if not path.is_file():
        raise SettingsError(f"{path} does not exist. {_EXPECTED}")
    content = _read(path, "Run the command that made it again, with --overwrite.")
    if not isinstance(content, dict) or type(content.get("schema")) is not int:
        raise SchemaError(f"{path} is not a result file. {_EXPECTED}")
    if content["schema"] > SCHEMA:
        raise SchemaError(f"{path} has schema {content['schema']}; this program reads schemas up to {SCHEMA}.")
    kinds = {record.KIND: record for record in records}
    if not isinstance(content.get("kind"), str) or content["kind"] not in kinds:
        raise SchemaError(f"{path} holds {str(content.get('kind'))[:40]}, expected {' or '.join(kinds)}.")
    return kinds[content["kind"]].from_json(content, str(path))


def _read(path: Path, advice: str) -> Any:
    """What a result file holds, compared with its digest; files of older versions have none. Raises CorruptError."""
    content = read_json(path, advice)
    if isinstance(content, dict) and "digest" in content:
        return dict(read_signed(path, advice))
    return content


@dataclass(frozen=True)
class _Earlier:
    """What is compared of a result that is there already."""

    kind: str
    settings: Mapping[str, object] = field(default_factory=dict)
    parents: Mapping[str, ResultParent] = field(default_factory=dict)


def _compared_fields(
    kind: str, settings: Mapping[str, object], parents: Mapping[str, Mapping[str, object]]
) -> dict[str, object]:
    return {"kind": kind, **settings, **{f"{name} (parent)": parent["id"] for name, parent in parents.items()}}
