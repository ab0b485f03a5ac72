"""repair(): make a damaged store whole again by computing what is damaged, and only that.

In: a store, and where its images and weights are if they moved. Out: the verification after the repair. What is not a
shard's (images.parquet, zarr metadata, the seal) is made anew from the same source and compared by identity.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from actcache.artifact import MANIFEST_FILE, Artifact, list_files, open_artifact
from actcache.commits import record_path
from actcache.errors import SettingsError
from actcache.extraction import extract
from actcache.files import is_remote, write_atomic
from actcache.hook_point import HookPoint
from actcache.sources import open_source
from actcache.store import ActivationStore, expected_files
from actcache.verification import Verification, verify
from actcache.writer import write_fixed_files


def repair(
    path: str | Path,
    *,
    images: str | Path | None = None,
    model: str | None = None,
    pretrained: str | None = None,
    device: str = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Verify an activation store, remove its damaged shards, extract these again, seal, and verify.

    Args:
        images, model, pretrained: as `extract` was given them; by default what the store remembers.
        on_progress: called with (images done, images in all).

    Raises:
        SettingsError: not a store; images or weights are not where they were; or they are no longer the same.
    """
    found = verify(path)
    if found.ok:
        return found
    artifact = open_artifact(path, "acts")
    arguments = _arguments(artifact, images, model, pretrained)
    (artifact.path / MANIFEST_FILE).unlink(missing_ok=True)  # first: from here on the store is not complete
    for shard in found.shards:
        record_path(artifact.path, shard).unlink(missing_ok=True)
        for name in expected_files(artifact.settings, shard):
            _remove(artifact.path / name)
    for problem in found.problems:
        if problem.what == "is a link":
            _remove(artifact.path / problem.file)
    if any(problem.shard is None and problem.file != MANIFEST_FILE for problem in found.problems):
        _rewrite_fixed_files(artifact, arguments)
    extract(
        **arguments,
        store=artifact.path,
        **_settings(artifact),
        device=device,
        on_error="skip",  # what could not be read then cannot be read now
        on_progress=on_progress,
    )
    return verify(path)


def _rewrite_fixed_files(artifact: Artifact, arguments: Mapping[str, Any]) -> None:
    source = open_source(arguments["images"], masks=arguments["masks"])
    held = {uri for other in arguments["not_in"] for uri in ActivationStore.open(other).images["uri"].to_pylist()}
    plan = source.plan(limit=artifact.settings["limit"], seed=artifact.settings["seed"], exclude=held)
    if plan.rows_id != artifact.settings["rows_id"]:
        raise SettingsError(
            f"{source.path} no longer holds the images of {artifact.path}. Say with --images where they are."
        )
    with TemporaryDirectory() as scratch:
        write_fixed_files(Path(scratch), plan, artifact.settings)
        for name in list_files(Path(scratch)):
            if not is_remote(artifact.path):
                (artifact.path / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(artifact.path / name, (Path(scratch) / name).read_bytes())


def _arguments(
    artifact: Artifact, images: str | Path | None, model: str | None, pretrained: str | None
) -> dict[str, Any]:
    """What `extract` was called with, paths made whole again."""
    recorded = artifact.provenance.get("paths", {})

    def find(name: str, value: str) -> str:
        if not value.startswith(".."):
            return value
        place = os.path.normpath(artifact.path.absolute() / value)
        if not os.path.exists(place):
            raise SettingsError(f"{place} is not there any more. Say with --{name} what the store was extracted with.")
        return place

    source = images or artifact.parent_path("images")
    if not os.path.exists(source):
        raise SettingsError(f"{source} is not there any more. Say with --images where the images are.")
    return {
        "images": source,
        "model": model or find("model", recorded["model"]),
        "pretrained": pretrained or find("pretrained", recorded["pretrained"]),
        "masks": find("masks", recorded["masks"]) if "masks" in recorded else None,
        "not_in": [find("not-in", value) for value in recorded.get("not_in", [])],
    }


def _settings(artifact: Artifact) -> dict[str, Any]:
    """The settings of `extract` that a store was made with."""
    hooks = [HookPoint.parse(text) for text in artifact.settings["hook_points"]]
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
