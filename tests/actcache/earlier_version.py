"""Artifacts as an earlier version wrote them: without the hashes of their images."""

import json
from pathlib import Path

from actcache.artifacts import ARTIFACT_FILE, digest, encode_json, open_artifact, read_manifest
from actcache.store import seal_store


def forget_hashes(store: Path, shards: list[int] | None = None) -> Path:
    """Take the hashes out of a store, of all shards or of some; and the record of the shots, if it has one."""
    for record in sorted((store / "commits").iterdir()):
        fields = json.loads(record.read_text())
        if shards is None or fields["shard"] in shards:
            del fields["content"], fields["digest"]
            record.write_bytes(encode_json({**fields, "digest": digest(fields)}))
    body = json.loads((store / ARTIFACT_FILE).read_text())
    body["provenance"].pop("shots", None)
    (store / ARTIFACT_FILE).write_bytes(encode_json(body))
    (store / "content.bin").unlink()
    (store / "manifest.json").unlink()
    seal_store(store)
    return store


def forget_learned(artifact: Path, *files: str) -> Path:
    """Take files of an artifact (a run's learned.bin, a code store's seen.bin and content.bin) out of its seal too."""
    summary = dict(read_manifest(open_artifact(artifact)))
    for name in files:
        (artifact / name).unlink(missing_ok=True)
        summary["files"].pop(name, None)
    (artifact / "manifest.json").write_bytes(encode_json({**summary, "digest": digest(summary)}))
    return artifact
