"""Damage for artifacts: every field of their JSON removed or replaced, every file with changed bytes; and readers.

Checksums and ids are made right again after a change of a field, so that it is the schema that has to refuse it.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from actcache import PipelineError
from actcache.artifacts import digest, file_digest
from actcache.artifacts.files import encode_json
from actcache.artifacts.opening import Parent, artifact_id

Answer = list[Any]
"""What a reader returns, for comparison."""

REMOVED = object()
DEEP: Any = "end"
for _ in range(300):
    DEEP = [DEEP]
VALUES: list[Any] = [
    REMOVED, None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**400, 0.5, -0.5, 1e308, "", "x", "x" * 100_000, "\0",
    "\ud800", "../../..", [], {}, [[1]], [-1], {"a": None}, {"0": 1}, DEEP, float("nan"), float("inf"),
]  # fmt: skip
"""What a field is replaced by."""

ARTIFACTS = ("a.acts", "b.acts", "adapted.acts", "a.prompts", "run", "runs/variantgated", "a.codes", "a.concepts")
RESULTS = (
    "evaluate", "evaluate-runs", "intervene", "intervene-set", "attribute", "steer", "rules", "compare",
)  # fmt: skip


def json_files(artifact: Path) -> list[Path]:
    return [artifact / "artifact.json", artifact / "manifest.json", *sorted((artifact / "commits").glob("*.json"))[:1]]


def spots(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every field, at any depth; of long lists and large objects the first and the last entry."""
    if place:
        yield place
    keys: list[Any] = list(value) if isinstance(value, dict) else []
    if isinstance(value, list):
        keys = [0, len(value) - 1] if len(value) > 2 else list(range(len(value)))
    for key in keys if len(keys) <= 24 else [*keys[:2], keys[-1]]:
        yield from spots(value[key], (*place, key))


def replace(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """A copy of a JSON value with one field replaced, or removed."""
    if not place:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(place) == 1 and new is REMOVED:
        del copy[place[0]]
    else:
        copy[place[0]] = replace(copy[place[0]], place[1:], new)
    return copy


def reseal(artifact: Path, changed: Path, value: Any) -> None:
    """Write a JSON file of an artifact with another content, and make ids, digests and checksums right again."""
    if changed.name == "artifact.json":
        try:
            parents = {name: Parent(parent["id"], parent["path"]) for name, parent in value["parents"].items()}
            value = {**value, "id": artifact_id(value["kind"], value["settings"], parents, value["schema"])}
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
            pass  # such fields have no hash
    elif isinstance(value, dict):
        value = _signed(value)
    changed.write_text(json.dumps(value) if not isinstance(value, dict) else _encode(value))
    manifest = artifact / "manifest.json"
    if changed != manifest and manifest.exists():
        seal = json.loads(manifest.read_text())
        seal["files"][str(changed.relative_to(artifact))] = file_digest(changed)
        manifest.write_bytes(encode_json(_signed(seal)))


def _signed(value: dict[str, Any]) -> dict[str, Any]:
    fields = {name: field for name, field in value.items() if name != "digest"}
    try:
        return {**fields, "digest": digest(fields)}
    except (ValueError, RecursionError):
        return value


def _encode(value: dict[str, Any]) -> str:
    try:
        return encode_json(value).decode()
    except ValueError:  # NaN
        return json.dumps(value)


# ---------------------------------------------------------------------------------------------------------------------
# Readers


def use_store(path: Path) -> Answer:
    from actcache import ActivationStore

    store = ActivationStore.open(path)
    numbers = [store.read(images=[0, 17, 47], check=True).tobytes(), store.statistics(None).variance.tobytes()]
    return [repr(store), *numbers, store.images.to_pydict(), store.valid.tolist()]


def use_run(path: Path) -> Answer:
    from saetrain import Run

    run = Run.open(path)
    return [repr(run), run.curves(), {name: value.tolist() for name, value in run.sae().state_dict().items()}]


def use_prompts(path: Path) -> Answer:
    from actcache import Adaptation
    from analysis.report.sections import show_adaptation

    adaptation = Adaptation.open(path)
    prompts = {name: value.tolist() for name, value in adaptation.prompts().tensors.items()}
    return [repr(adaptation), adaptation.loss, prompts, show_adaptation(path)]


def use_codes(path: Path) -> Answer:
    from analysis import find_images, query_image, query_latent
    from saetrain import CodeStore

    codes = CodeStore.open(path)
    shards = [codes.read_shard(shard) for shard in range(codes.n_shards)]
    arrays = [array.tobytes() for shard in shards for array in (shard.indptr, shard.latent, shard.value)]
    by_latent = [array.tobytes() for array in vars(codes.read_by_latent(1)).values()]
    tables = [query_latent(codes, 19).to_pydict(), query_image(codes, 3).to_pydict(), codes.images.to_pydict()]
    find_images(codes)
    return [repr(codes), *arrays, *by_latent, *tables, codes.valid.tolist(), repr(codes.preprocess)]


def use_concepts(path: Path) -> Answer:
    from analysis import ConceptTable, read_names
    from analysis.concepts import find_codes

    concepts = ConceptTable.open(path)
    facts = repr((concepts.config, concepts.quality, concepts.sae, concepts.source, concepts.left_out))
    tables = [concepts.table, concepts.top_images, concepts.top_patches, concepts.class_counts, concepts.gallery]
    arrays = [concepts.histogram.counts, concepts.histogram.edges, concepts.position_map, concepts.image_embeddings]
    pictures = [concepts.thumbnail(image) for image in sorted(set(concepts.gallery["image"].to_pylist()))]
    find_codes(concepts)
    return [
        repr(concepts), facts, [str(table.to_pydict()) for table in tables], [array.tobytes() for array in arrays],
        pictures, concepts.nearest(19), read_names(concepts), concepts.images.to_pydict(),
    ]  # fmt: skip


def use_any(path: Path) -> Answer:
    from actcache import describe, verify

    return [str(describe(path)), verify(path, n_threads=1).ok]


USES: dict[str, Callable[[Path], Answer]] = {
    "a.acts": use_store, "b.acts": use_store, "adapted.acts": use_store, "a.prompts": use_prompts, "run": use_run,
    "runs/variantgated": use_run, "a.codes": use_codes, "a.concepts": use_concepts,
}  # fmt: skip
"""What reads each golden artifact in the library."""


def attempt(use: Callable[[Path], Answer], path: Path) -> Answer | str:
    """Read an artifact. Returns what was read, or the message of our error; raises anything else."""
    try:
        return use(path)
    except PipelineError as error:
        message = str(error)
    assert "\n" not in message.strip(), message
    assert len(message) < 2_000, message[:200]
    return message


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip a bit, cut, or replace a piece."""
    if not data:
        return b"\1"
    changed, place = bytearray(data), rng.randrange(len(data))
    kind = rng.randrange(4)
    if kind <= 1:
        changed[place] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del changed[place:]
    else:
        changed[place : place + 8] = rng.randbytes(8)
    return bytes(changed)


def sign_shard(artifact: Path, shard: int) -> None:
    """Make the checksums of a shard's files, its record and the manifest right again."""
    record = artifact / "commits" / f"{shard:06d}.json"
    value = json.loads(record.read_text())
    value["files"] = {name: file_digest(artifact / name) for name in value["files"]}
    reseal(artifact, record, value)


def sign_file(artifact: Path, name: str) -> None:
    """Make the checksum of a file in the manifest right again."""
    manifest = artifact / "manifest.json"
    seal = json.loads(manifest.read_text())
    seal["files"][name] = file_digest(artifact / name)
    reseal(artifact, manifest, seal)
