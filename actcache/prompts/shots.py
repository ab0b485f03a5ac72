"""The shots: the images that prompts were trained on, and which test images are among them.

In: an x.prompts artifact, or a store that was extracted with prompts. Out: LearnedImages. Artifacts record their shots,
and stores copy the record; for older ones the shots are drawn again from the folder that they came from.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from actcache.artifacts import ARTIFACT_FILE, Artifact, open_artifact, read_manifest
from actcache.errors import PipelineError, SettingsError
from actcache.prompts.config import PromptConfig
from actcache.prompts.few_shot import choose_shots
from actcache.seen import CONTENT_HASH, LearnedImages, Seen, SeenImages, hash_content
from actcache.sources import ImageFolder, ImageSource, open_source
from actcache.store import ActivationStore, find_origin

Shots = Mapping[str, Sequence[str]]
"""`uri` and `content_hash` of every shot, as an artifact records them."""


def list_shots(source: ImageSource, uris: Sequence[str]) -> Shots:
    """The record of the shots. They are read once more, which is nothing beside training. Raises ImageSourceError."""
    return {"uri": list(uris), CONTENT_HASH: [hash_content(source.read(uri)) for uri in uris]}


def recorded_shots(path: str | Path) -> Shots | None:
    """The shots of prompts; None for a checkpoint, or where the images of older prompts are gone or have changed."""
    if Path(path).is_file() and Path(path).name != ARTIFACT_FILE:
        return None
    try:
        artifact = open_artifact(path, "prompts", complete=True)
        shots: Shots | None = read_manifest(artifact).get("shots")
        return _draw_again(artifact) if shots is None else shots
    except (PipelineError, KeyError, TypeError, ValueError):
        return None


def _draw_again(artifact: Artifact) -> Shots | None:
    source = open_source(artifact.parent_path("images"))
    if isinstance(source, ImageFolder):  # older versions took the first folder as the class
        source = ImageFolder(source.path, class_level=1)
    plan = source.plan()
    if plan.rows_id != artifact.parents["images"].id:
        return None
    uris, labels = (plan.table[name].to_pylist() for name in ("uri", "label_name"))
    config = artifact.settings["config"]
    rows = choose_shots(uris, labels, artifact.settings["classes"], int(config["shots"]), int(config["seed"]))
    return list_shots(source, [uris[row] for row in rows.tolist()])


def learned_by_model(store: ActivationStore) -> LearnedImages | None:
    """The shots of the prompts that a store was extracted with; None for a plain model."""
    if store.settings.prompts is None:
        return None
    by = f"prompts {store.artifact.provenance.get('prompts', '')}".strip()
    shots = store.artifact.provenance.get("shots")
    if shots is None:
        try:
            shots = recorded_shots(find_origin(store.artifact, "prompts"))
        except SettingsError:  # they have moved
            shots = None
    return LearnedImages.unknown(by) if shots is None else LearnedImages.listed(by, shots[CONTENT_HASH], shots["uri"])


def leave_out_shots(
    table: pa.Table, source: ImageSource, shots: Shots, shot_bytes: Sequence[int], config: PromptConfig
) -> tuple[pa.Table, SeenImages]:
    """The test images without those that are shots, whatever they are called, and how many these are.

    Only a file that has the size of a shot is read to compare it.

    Raises:
        SettingsError: nothing is left. ImageSourceError: a file cannot be read.
    """
    sizes, uris = table["bytes"].to_numpy(), table["uri"]
    alike = np.isin(sizes, [*shot_bytes, -1]) if -1 not in shot_bytes else np.ones(len(sizes), dtype=bool)
    known = set(shots[CONTENT_HASH])
    seen = np.zeros(len(sizes), dtype=bool)
    for row in np.flatnonzero(alike).tolist():
        seen[row] = hash_content(source.read(uris[row].as_py())) in known
    judged, counted = Seen(seen, ("shots",)).judge(np.arange(len(seen)), config, f"{source.path}")
    return table.take(pa.array(judged)), counted
