"""repair(): restore a damaged store by computing what is damaged, and nothing else.

In: a store, and the new places of its images and weights if they moved. Out: the verification after the repair. Files
that belong to no shard (images.parquet, zarr metadata, the seal) are made again from the same source.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from actcache.artifacts import (
    MANIFEST_FILE,
    PLACES_FILE,
    Artifact,
    OutputLock,
    is_remote,
    list_files,
    open_artifact,
    read_manifest,
    read_provenance,
    record_path,
    storage_errors,
)
from actcache.errors import CorruptError, SettingsError
from actcache.extraction.config import ExtractConfig
from actcache.extraction.extraction import run_plan
from actcache.extraction.plan import plan_extraction
from actcache.preprocess import MAX_PIXELS
from actcache.progress import Progress
from actcache.sources import ImageFolder, open_source
from actcache.store import (
    CONTENT_FILE,
    FOREIGN,
    IMAGES_FILE,
    LINK,
    StoreSettings,
    Verification,
    find_image_source,
    find_origin,
    recorded_list,
    records,
    verify,
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
    """Verify an activation store, remove damaged files, extract their shards again, seal, and verify.

    Args:
        images, model, pretrained, prompts: as they were given to `extract`; by default what the store recorded.
        on_progress: called with (images done, images in all).

    Raises:
        SettingsError: this is not a store, or its images or weights have moved or changed.
    """
    verification = verify(path)
    if verification.ok:
        return verification
    artifact = open_artifact(path, "acts")
    if artifact.imported is not None:
        raise SettingsError(f"{artifact.path} was imported, so its shards cannot be extracted again. {artifact.remedy}")
    if foreign := [problem.file for problem in verification.problems if problem.what == FOREIGN]:
        shown = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
        raise SettingsError(f"{artifact.path} holds files that it did not write ({shown}). Move them elsewhere first.")
    settings = StoreSettings.of(artifact)
    source = find_image_source(artifact, images)
    config = _find_config(artifact, settings, source, model, pretrained, prompts)
    plan = plan_extraction(source, artifact.path, config, device, preprocess=settings.preprocess)
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
    with OutputLock(artifact.path) as lock:
        lock.acquire()
        with storage_errors(artifact.path):
            (artifact.path / MANIFEST_FILE).unlink(
                missing_ok=True
            )  # first, so that the store counts as incomplete from here on
            for name in _damaged_files(artifact.path, settings, verification):
                _remove(artifact.path / name)
        run_plan(plan, lock, skip=skip, repairing=True, on_progress=on_progress)
    return verify(path)


def _damaged_files(store: Path, settings: StoreSettings, verification: Verification) -> list[str]:
    """Names of the files to be made again: links, damaged shards with their records, tables, zarr metadata."""
    links = [problem.file for problem in verification.problems if problem.what == LINK]
    shards = [
        name
        for shard in verification.shards
        for name in (str(record_path(Path(), shard)), *settings.shard_files(shard))
    ]
    tables = (IMAGES_FILE, CONTENT_FILE, PLACES_FILE)
    fixed = [*tables, *(name for name in list_files(store) if name.endswith("/zarr.json"))]
    damaged = {problem.file for problem in verification.problems}
    return [*links, *shards, *(name for name in fixed if name in damaged)]


def _had_failures(artifact: Artifact) -> bool:
    """Whether some images could not be read when the store was made; True if this is no longer known."""
    try:
        return bool(read_manifest(artifact)["failed"])
    except (CorruptError, KeyError):
        return True


def _find_config(
    artifact: Artifact, settings: StoreSettings, source: str | Path, model: str | None, pretrained: str | None,
    prompts: str | None,
) -> ExtractConfig:  # fmt: skip
    """What `extract` was called with, its paths made absolute again."""
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
        not_in=recorded_list(artifact, "not_in"),
        masks=find_origin(artifact, "masks") if records(artifact, "masks") else None,
        class_level=_find_class_level(artifact, source),
        path_column=settings.columns.get("path"),
        label=settings.columns.get("label"),
        class_names=find_origin(artifact, "class_names") if records(artifact, "class_names") else None,
        max_pixels=read_provenance(artifact, _Limits).max_pixels,
        compile=settings.compile,
    )


@dataclass(frozen=True)
class _Limits:
    """What `extract` was told about large images; older stores record nothing."""

    max_pixels: int = field(default=MAX_PIXELS, metadata={"at_least": 1})


def _find_class_level(artifact: Artifact, source: str | Path) -> int | None:
    """Stores that do not record the level are older than the choice: their classes are the first folders."""
    level = artifact.provenance.get("class_level", 1 if isinstance(open_source(source), ImageFolder) else None)
    return level if isinstance(level, int) else None


def _remove(path: Path) -> None:
    if not is_remote(path) and path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
