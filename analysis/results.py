"""Result files: what a study found, as one JSON file that says what it was made from.

    {"kind", "schema", "id", "settings", "parents": {name: {"id", "path"}}, ...}

A result is small, has no shards and nothing is made from it, so it is a file and no artifact (decision 15); it has an
artifact's identity, and the same command twice is as safe.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actcache import SchemaError, SettingsError
from actcache.artifacts import Artifact, digest, read_json, write_atomic

SCHEMA = 1


def describe_result(kind: str, settings: Mapping[str, Any], parents: Mapping[str, Artifact]) -> dict[str, Any]:
    """The head of a result. `id` is the hash of kind, schema, settings and the parents' ids."""
    settings = json.loads(json.dumps(settings, allow_nan=False))
    ids = {name: parent.id for name, parent in parents.items()}
    identity = digest({"kind": kind, "schema": SCHEMA, "settings": settings, "parents": ids})
    named = {name: {"id": parent.id, "path": parent.path.name} for name, parent in parents.items()}
    return {"kind": kind, "schema": SCHEMA, "id": identity, "settings": settings, "parents": named}


def find_result(out: str | Path | None, head: Mapping[str, Any], *, overwrite: bool = False) -> dict[str, Any] | None:
    """The result that the same command wrote before; None when there is none, or it is to be replaced.

    Raises:
        SettingsError: something else is there; the fields that differ are shown side by side.
    """
    if out is None:
        return None
    out = Path(out)
    if out.is_dir():
        raise SettingsError(f"{out} is a folder. Expected a file such as {out / 'result.json'}.")
    if overwrite or not out.exists():
        return None
    found = read_json(out, "Choose another path, or pass --overwrite to replace it.")
    if not isinstance(found, dict) or "kind" not in found:
        raise SettingsError(f"{out} is not a result of ours. Choose another path, or pass --overwrite to replace it.")
    if found.get("id") != head["id"]:
        old, new = _fields(found), _fields(head)
        rows = [
            f"{name}: {old.get(name, 'absent')} there, {new.get(name, 'absent')} asked for"
            for name in sorted({*old, *new})
            if old.get(name) != new.get(name)
        ]
        raise SettingsError(
            f"{out} was made with other settings ({'; '.join(rows)}). "
            "Choose another path, or pass --overwrite to replace it."
        )
    return found


_WRITERS = "evaluate, intervene, attribute, steer, rules or compare"


def finish_result(out: str | Path | None, head: Mapping[str, Any], body: Mapping[str, Any]) -> dict[str, Any]:
    """Head and body, written where there is a path to; NaN and infinity become None."""
    whole: dict[str, Any] = _plain({**head, **body})
    if out is None:
        return whole
    out = Path(out)
    write_atomic(out, (json.dumps(whole, allow_nan=False, indent=1) + "\n").encode(), parents=True)
    return whole


def read_result(path: str | Path, kind: str | None = None) -> dict[str, Any]:
    """Read a result file. Raises SchemaError for another kind or a newer schema, CorruptError, SettingsError."""
    path = Path(path)
    if not path.is_file():
        raise SettingsError(f"{path} does not exist. Expected a result: the JSON file of {_WRITERS}.")
    found = read_json(path, "Run the command that made it again, with --overwrite.")
    if not isinstance(found, dict) or not isinstance(found.get("schema"), int):
        raise SchemaError(f"{path} is not a result file. Expected the JSON file of {_WRITERS}.")
    if found["schema"] > SCHEMA:
        raise SchemaError(f"{path} has schema {found['schema']}; this program reads up to {SCHEMA}.")
    if kind is not None and found.get("kind") != kind:
        raise SchemaError(f"{path} holds {found.get('kind')}, expected {kind}.")
    return found


def _fields(result: Mapping[str, Any]) -> dict[str, Any]:
    parents = {f"{name} (parent)": parent["id"] for name, parent in result.get("parents", {}).items()}
    return {"kind": result["kind"], **result.get("settings", {}), **parents}


def _plain(value: Any) -> Any:
    """JSON has no NaN: null stands for a number that does not exist."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return None
    return value
