"""repair(): make a damaged store whole again by computing what is damaged, and only that.

In: a store, and where its images and weights are if they moved. Out: the verification after the repair. What is not a
shard's (images.parquet, zarr metadata, the seal) is made anew from the same source and compared by identity.
"""

import shutil
from pathlib import Path

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
from actcache.extraction.config import ExtractConfig
from actcache.extraction.extraction import run_plan
from actcache.extraction.plan import plan_extraction
from actcache.progress import Progress
from actcache.store import (
    FOREIGN,
    IMAGES_FILE,
    LINK,
    StoreSettings,
    Verification,
    find_image_source,
    find_origin,
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
    settings = StoreSettings.from_json(artifact.settings)
    source = find_image_source(artifact, images)
    config = _find_config(artifact, settings, model, pretrained, prompts)
    plan = plan_extraction(source, artifact.path, config, device)
    for same, what in (
        (plan.settings.rows_id == settings.rows_id, f"{source} does not hold exactly the images of {artifact.path}. "
         "Name the right folder with --images."),
        (plan.settings.model_id == settings.model_id, f"{config.model} with {config.pretrained} is not the model of "
         f"{artifact.path}. Name the right one with --model and --pretrained."),
        (plan.settings.prompts == settings.prompts, f"{config.prompts} does not hold the prompts of {artifact.path}. "
         "Name the right ones with --prompts."),
    ):  # fmt: skip
        if not same:  # before anything is removed
            raise SettingsError(what)
    skip = _had_failures(artifact)
    with storage_errors(artifact.path):
        (artifact.path / MANIFEST_FILE).unlink(missing_ok=True)  # first: from here on the store is not complete
        for name in _damaged_files(artifact.path, settings, found):
            _remove(artifact.path / name)
    run_plan(plan, skip=skip, on_progress=on_progress)
    return verify(path)


def _damaged_files(store: Path, settings: StoreSettings, found: Verification) -> list[str]:
    """Names of what is made anew: links, damaged shards with their records, the plan, zarr metadata."""
    links = [problem.file for problem in found.problems if problem.what == LINK]
    shards = [
        name for shard in found.shards for name in (str(record_path(Path(), shard)), *settings.shard_files(shard))
    ]
    fixed = [IMAGES_FILE, *(name for name in list_files(store) if name.endswith("/zarr.json"))]
    damaged = {problem.file for problem in found.problems}
    return [*links, *shards, *(name for name in fixed if name in damaged)]


def _had_failures(artifact: Artifact) -> bool:
    """Whether images could not be read then, so that some may not be read now; True where nobody knows any more."""
    try:
        return bool(read_manifest(artifact)["failed"])
    except (CorruptError, KeyError):
        return True


def _find_config(
    artifact: Artifact, settings: StoreSettings, model: str | None, pretrained: str | None, prompts: str | None
) -> ExtractConfig:
    """What `extract` was called with, its paths made absolute again."""
    recorded = artifact.provenance.get("paths", {})
    return ExtractConfig(
        model=find_origin(artifact, "model", model),
        pretrained=find_origin(artifact, "pretrained", pretrained),
        layers=[hook.layer for hook in settings.hook_points],
        sites=[hook.site for hook in settings.hook_points],
        prompts=find_origin(artifact, "prompts", prompts) if settings.prompts is not None else None,
        dtype=settings.dtype,
        precision=settings.precision,
        codec=settings.codec,
        shard_images=settings.layout.shard_images,
        limit=settings.limit,
        seed=settings.seed,
        not_in=[whole_path(artifact, "not-in", value) for value in recorded.get("not_in", [])],
        masks=find_origin(artifact, "masks") if "masks" in recorded else None,
        compile=settings.compile,
    )


def _remove(path: Path) -> None:
    if not is_remote(path) and path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
