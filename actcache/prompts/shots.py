"""The shots: the images that prompts were trained on, and which test images are among them.

In: an x.prompts artifact, or a store that was extracted with prompts. Out: LearnedImages. Artifacts record their shots,
and stores copy the record; for older ones the shots are drawn again from the folder that they came from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from actcache.artifacts import (
    ARTIFACT_FILE,
    Artifact,
    open_artifact,
    read_provenance,
    read_settings,
    read_summary,
)
from actcache.errors import PipelineError, SettingsError
from actcache.prompts.accuracy import PromptSettings, PromptsSummary, ShotList
from actcache.prompts.config import PromptConfig
from actcache.prompts.few_shot import choose_shots
from actcache.seen import LearnedImages, Seen, SeenImages, hash_content
from actcache.sources import ImageFolder, ImageSource, open_source
from actcache.store import ActivationStore, find_origin


@dataclass(frozen=True)
class _Recorded:
    """What a store records of its prompts."""

    prompts: str = ""
    shots: ShotList | None = None


def list_shots(source: ImageSource, uris: Sequence[str]) -> ShotList:
    """The record of the shots. They are read once more, which is nothing beside training. Raises ImageSourceError."""
    return ShotList(tuple(uris), tuple(hash_content(source.read(uri)) for uri in uris))


def recorded_shots(path: str | Path) -> ShotList | None:
    """The shots of prompts; None for a checkpoint, or where the images of older prompts are gone or have changed."""
    if Path(path).is_file() and Path(path).name != ARTIFACT_FILE:
        return None
    try:
        artifact = open_artifact(path, "prompts", complete=True)
        shots = read_summary(artifact, PromptsSummary).shots
        return _draw_again(artifact) if shots is None else shots
    except PipelineError:
        return None


def _draw_again(artifact: Artifact) -> ShotList | None:
    source = open_source(artifact.parent_path("images"))
    if isinstance(source, ImageFolder):  # older versions took the first folder as the class
        source = ImageFolder(source.path, class_level=1)
    plan = source.plan()
    if plan.rows_id != artifact.parents["images"].id:
        return None
    uris, labels = (plan.table[name].to_pylist() for name in ("uri", "label_name"))
    settings = read_settings(artifact, PromptSettings)
    if settings.config is None:
        return None
    rows = choose_shots(uris, labels, settings.classes, settings.config.shots, settings.config.seed)
    return list_shots(source, [uris[row] for row in rows.tolist()])


def learned_by_model(store: ActivationStore) -> LearnedImages | None:
    """The shots of the prompts that a store was extracted with; None for a plain model."""
    if store.settings.prompts is None:
        return None
    recorded = read_provenance(store.artifact, _Recorded)
    by, shots = f"prompts {recorded.prompts}".strip(), recorded.shots
    if shots is None:
        try:
            shots = recorded_shots(find_origin(store.artifact, "prompts"))
        except SettingsError:  # they have moved
            shots = None
    if shots is None:
        return LearnedImages.unknown(by)
    return LearnedImages.listed(by, [text or None for text in shots.content_hash], shots.uri)


def leave_out_shots(
    table: pa.Table, source: ImageSource, shots: ShotList, shot_bytes: Sequence[int], config: PromptConfig
) -> tuple[pa.Table, SeenImages]:
    """The test images without those that are shots, whatever they are called, and how many these are.

    Only a file that has the size of a shot is read to compare it.

    Raises:
        SettingsError: nothing is left. ImageSourceError: a file cannot be read.
    """
    sizes, uris = table["bytes"].to_numpy(), table["uri"]
    alike = np.isin(sizes, [*shot_bytes, -1]) if -1 not in shot_bytes else np.ones(len(sizes), dtype=bool)
    known = set(shots.content_hash)
    seen = np.zeros(len(sizes), dtype=bool)
    for row in np.flatnonzero(alike).tolist():
        seen[row] = hash_content(source.read(uris[row].as_py())) in known
    judged, counted = Seen(seen, ("shots",)).judge(np.arange(len(seen)), config, f"{source.path}")
    return table.take(pa.array(judged)), counted
