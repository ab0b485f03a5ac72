"""repair(): make a damaged store whole again by computing what is damaged, and only that.

In: a store, and where its images and weights are if they moved. Out: the verification after the repair. What is not a
shard's (images.parquet, zarr metadata, the seal) is made anew from the same source and compared by identity.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actcache.artifacts import (
    MANIFEST_FILE,
    Artifact,
    is_remote,
    list_files,
    open_artifact,
    read_manifest,
    record_path,
    storage_errors,
)
from actcache.errors import CorruptError, SettingsError
from actcache.extraction.extraction import extract
from actcache.extraction.plan import plan_extraction
from actcache.progress import Progress
from actcache.store import (
    FOREIGN,
    IMAGES_FILE,
    LINK,
    Verification,
    expected_files,
    find_image_source,
    find_origin,
    hook_points_of,
    verify,
    whole_path,
)


def repair(
    path: str | Path,
    *,
    images: str | Path | None = None,
    model: str | None = None,
    pretrained: str | None = None,
    prompts: str | None = None,
    device: str = "auto",
    on_progress: Progress | None = None,
) -> Verification:
    """Verify an activation store, remove what is damaged, extract these shards again, seal, and verify.

    Args:
        images, model, pretrained, prompts: as `extract` was given them; by default what the store remembers.
        on_progress: called with (images done, images in all).

    Raises:
        SettingsError: not a store; images or weights are not where they were; or they are no longer the same.
    """
    found = verify(path)
    if found.ok:
        return found
    artifact = open_artifact(path, "acts")
    if foreign := [problem.file for problem in found.problems if problem.what == FOREIGN]:
        shown = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
        raise SettingsError(f"{artifact.path} holds files that it did not write ({shown}). Move them elsewhere first.")
    arguments = {**_arguments(artifact, images, model, pretrained, prompts), **_settings(artifact), "device": device}
    _check_sources(artifact, arguments)  # before anything is removed
    on_error = "skip" if _had_failures(artifact) else "stop"
    with storage_errors(artifact.path):
        (artifact.path / MANIFEST_FILE).unlink(missing_ok=True)  # first: from here on the store is not complete
        for name in _damaged_files(artifact, found):
            _remove(artifact.path / name)
    extract(**arguments, store=artifact.path, on_error=on_error, on_progress=on_progress)
    return verify(path)


def _damaged_files(artifact: Artifact, found: Verification) -> list[str]:
    """Names of what is made anew: links, damaged shards with their records, the plan, zarr metadata."""
    links = [problem.file for problem in found.problems if problem.what == LINK]
    shards = [
        name
        for shard in found.shards
        for name in (str(record_path(Path(), shard)), *expected_files(artifact.settings, shard))
    ]
    fixed = [IMAGES_FILE, *(name for name in list_files(artifact.path) if name.endswith("/zarr.json"))]
    damaged = {problem.file for problem in found.problems}
    return [*links, *shards, *(name for name in fixed if name in damaged)]


def _had_failures(artifact: Artifact) -> bool:
    """Whether images could not be read then, so that some may not be read now; True where nobody knows any more."""
    try:
        return bool(read_manifest(artifact)["failed"])
    except (CorruptError, KeyError):
        return True


def _check_sources(artifact: Artifact, arguments: Mapping[str, Any]) -> None:
    """Raise SettingsError unless images and weights are those the store was made from."""
    found = plan_extraction(store=artifact.path, **arguments).settings
    if found["rows_id"] != artifact.settings.get("rows_id"):
        raise SettingsError(
            f"{arguments['images']} does not hold the images of {artifact.path}, or not only these. "
            "Say with --images where they are."
        )
    if found["model_id"] != artifact.settings.get("model_id"):
        raise SettingsError(
            f"{arguments['model']} with {arguments['pretrained']} is not the model of {artifact.path}. "
            "Say with --model and --pretrained which one was."
        )
    if found.get("prompts") != artifact.settings.get("prompts"):
        raise SettingsError(
            f"{arguments['prompts']} are not the prompts of {artifact.path}. Say with --prompts which were."
        )


def _arguments(
    artifact: Artifact, images: str | Path | None, model: str | None, pretrained: str | None, prompts: str | None
) -> dict[str, Any]:
    """What `extract` was called with, paths made whole again."""
    recorded = artifact.provenance.get("paths", {})
    return {
        "images": find_image_source(artifact, images),
        "model": find_origin(artifact, "model", model),
        "pretrained": find_origin(artifact, "pretrained", pretrained),
        "prompts": find_origin(artifact, "prompts", prompts) if "prompts" in artifact.settings else None,
        "masks": find_origin(artifact, "masks") if "masks" in recorded else None,
        "not_in": [whole_path(artifact, "not-in", value) for value in recorded.get("not_in", [])],
    }


def _settings(artifact: Artifact) -> dict[str, Any]:
    """The settings of `extract` that a store was made with."""
    hooks = hook_points_of(artifact.settings)
    names = ("dtype", "precision", "codec", "shard_images", "limit", "seed")
    return {
        "layers": sorted({hook.layer for hook in hooks}),
        "sites": sorted({hook.site for hook in hooks}),
        **{name: artifact.settings[name] for name in names},
        "compile": artifact.settings.get("compile", False),
    }


def _remove(path: Path) -> None:
    if not is_remote(path) and path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
