"""plan_extraction(): which images, which tower, which layout, how many bytes; nothing is written.

In: what `extract` is given. Out: an `ExtractionPlan`, and from it an `ExtractionEstimate` (the dry run).
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torchvision

from actcache.artifacts import artifact_path, is_remote, missing_shards, open_artifact
from actcache.errors import PipelineError, SettingsError, StorageError
from actcache.hook_point import HookPoint
from actcache.models import VisionTower, compile_tower, load_clip, make_vision_tower
from actcache.prompts import open_prompts, prompt_vision
from actcache.sources import ImagePlan, ImageSource, decode_image, open_source
from actcache.store import (
    ActivationStore,
    StoreLayout,
    check_codec,
    check_dtype,
    choose_shape,
    layout_of,
    read_images,
    remember_paths,
)
from actcache.workers import find_worker

DEFAULTS: dict[str, Any] = {
    "prompts": None,
    "sites": ("resid_post",),
    "dtype": "float16",
    "precision": "auto",
    "codec": "raw",
    "shard_images": None,
    "limit": None,
    "seed": 0,
    "not_in": (),
    "masks": None,
    "device": "auto",
    "compile": False,
}
"""Of `extract`; a test holds them equal."""

SAMPLE_IMAGES = 32
"""Images whose decoding and forward pass the dry run times."""


@dataclass(frozen=True)
class ExtractionPlan:
    """All that is known before the first image is read."""

    source: ImageSource
    images: ImagePlan
    tower: VisionTower
    hooks: tuple[HookPoint, ...]
    layout: StoreLayout
    settings: dict[str, Any]
    provenance: dict[str, Any]

    def shard_bytes(self, shards: Sequence[int]) -> int:
        """Bytes these shards take when stored raw; compressed ones take less."""
        arrays = self.layout.arrays()
        return len(self.hooks) * sum(self.layout.shard_bytes(array, shard) for shard in shards for array in arrays)


@dataclass(frozen=True)
class ExtractionEstimate:
    """What `extract` would do. `seconds` from one batch, on this machine, for this worker's share."""

    n_images: int
    n_tokens: int
    n_bytes: int
    n_shards: int
    n_missing_shards: int
    missing_bytes: int
    free_bytes: int | None  # None: not known, as on an object store
    images_per_s: float
    seconds: float
    settings: dict[str, Any]

    @property
    def fits(self) -> bool:
        return self.free_bytes is None or self.missing_bytes <= self.free_bytes


def plan_extraction(
    images: ImageSource | str | Path,
    store: str | Path,
    *,
    model: str,
    pretrained: str,
    prompts: str | Path | None,
    layers: Sequence[int],
    sites: Sequence[str],
    dtype: str,
    precision: str,
    codec: str,
    shard_images: int | None,
    limit: int | None,
    seed: int,
    not_in: Sequence[str | Path],
    masks: str | Path | None,
    device: str,
    compile: bool,
) -> ExtractionPlan:
    """List the images, load the tower, fix the layout. Arguments and errors as `extract`."""
    source = open_source(images, masks=masks)
    check_dtype(dtype)
    check_codec(codec)
    hooks = tuple(sorted({HookPoint(layer, site) for layer in layers for site in sites}))
    held = {uri for other in not_in for uri in ActivationStore.open(other).images["uri"].to_pylist()}
    plan = source.plan(limit=limit, seed=seed, exclude=held)
    clip = load_clip(model, pretrained)
    adapted = None if prompts is None else open_prompts(prompts, clip)
    tower = prompt_vision(make_vision_tower(clip, precision=precision, device=device), adapted)
    tower = compile_tower(tower) if compile else tower
    _check_layers(hooks, tower, model)
    chunk_images, shard_images = choose_shape(plan.n_images, shard_images)
    settings = {
        "model_id": tower.model_id,
        "rows_id": plan.rows_id,
        "hook_points": [str(hook) for hook in hooks],
        "dtype": dtype,
        "precision": tower.precision,
        "codec": codec,
        "n_images": plan.n_images,
        "grid": list(tower.grid),
        "patch_size": list(tower.patch_size),
        "d_model": tower.d_model,
        "n_extra": tower.n_extra,
        "chunk_images": chunk_images,
        "shard_images": shard_images,
        "seed": seed,
        "limit": limit,
        "preprocess": tower.preprocess,
        **({"compile": True} if compile else {}),  # the lowest bits are others
        **({"prompts": adapted.description} if adapted else {}),
    }
    provenance = {
        "model": Path(model).name,
        "pretrained": Path(pretrained).name,
        **({"prompts": Path(prompts).name} if prompts else {}),
        "images": source.path.name,
        "open_clip": open_clip.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "paths": remember_paths(
            artifact_path(store), model=model, pretrained=pretrained, prompts=prompts, masks=masks, not_in=not_in
        ),
    }
    _explain_more_images(source, plan, artifact_path(store), settings)
    return ExtractionPlan(source, plan, tower, hooks, layout_of(settings), settings, provenance)


def estimate(
    images: ImageSource | str | Path, store: str | Path, *, batch_size: int = 32, **options: Any
) -> ExtractionEstimate:
    """What `extract` would do with the same arguments: time one batch of real images, decoding included, and add up.

    Nothing is written.

    Args:
        options: as `extract` takes them; model, pretrained and layers must be there.
    """
    worker = find_worker()
    plan = plan_extraction(images, store, **DEFAULTS | options)
    path = artifact_path(store)
    shards = range(plan.layout.n_shards)
    missing = missing_shards(path, len(shards)) if path.is_dir() else list(shards)
    uris = plan.images.table["uri"].slice(0, min(SAMPLE_IMAGES, batch_size)).to_pylist()
    pixels, started = [], time.perf_counter()
    for uri in uris:
        try:
            pixels.append(plan.tower.transform(decode_image(plan.source.read(uri), name=uri)))
        except PipelineError:
            continue  # the run itself lists what cannot be read
    decoding = (time.perf_counter() - started) / max(torch.get_num_threads(), 1)
    with torch.no_grad():
        if pixels:
            plan.tower.run(torch.stack(pixels[:2]), plan.hooks)  # warm
            started = time.perf_counter()
            streams = plan.tower.run(torch.stack(pixels), plan.hooks)
            _ = [float(x.flatten()[0]) for x in streams.values()]  # waits for the device
    rate = len(uris) / (time.perf_counter() - started + decoding)
    own = [shard for shard in missing if worker.owns(shard)]
    return ExtractionEstimate(
        n_images=plan.layout.n_images,
        n_tokens=plan.layout.n_images * plan.layout.n_tokens,
        n_bytes=plan.shard_bytes(shards),
        n_shards=len(shards),
        n_missing_shards=len(missing),
        missing_bytes=plan.shard_bytes(missing),
        free_bytes=free_bytes(path),
        images_per_s=rate,
        seconds=sum(len(plan.layout.shard_range(shard)) for shard in own) / rate,
        settings=plan.settings,
    )


def free_bytes(path: Path) -> int | None:
    """Free bytes where `path` is or would be; None on an object store."""
    if is_remote(path):
        return None
    while not path.exists():
        path = path.absolute().parent
    return shutil.disk_usage(path).free


def check_space(plan: ExtractionPlan, path: Path, shards: Sequence[int]) -> None:
    """Raise StorageError when the disk cannot hold the shards that are still to be written."""
    free, needed = free_bytes(path), plan.shard_bytes(shards)
    if free is not None and plan.settings["codec"] == "raw" and needed > free:
        raise StorageError(
            f"{path} needs {needed / 1e9:,.2f} GB more and the disk has {free / 1e9:,.2f} GB free. "
            "Free space, choose another disk, or store fewer layers or images."
        )


def _check_layers(hooks: Sequence[HookPoint], tower: VisionTower, model: str) -> None:
    if not hooks:
        raise SettingsError("Name at least one layer with --layer.")
    for hook in hooks:
        if hook.layer >= tower.n_layers:
            raise SettingsError(
                f"{Path(model).name} has no layer {hook.layer}: its blocks are 0..{tower.n_layers - 1}. "
                f"Choose --layer within that range."
            )


def _explain_more_images(source: ImageSource, plan: ImagePlan, store: Path, settings: dict[str, Any]) -> None:
    """Where the source grew since the store was made, say how the new images get into a store of their own."""
    try:
        found = open_artifact(store, "acts")
        if found.settings["rows_id"] == plan.rows_id or found.settings["model_id"] != settings["model_id"]:
            return
        held = set(read_images(store)["uri"].to_pylist())
    except (PipelineError, KeyError):
        return
    new = set(plan.table["uri"].to_pylist()) - held
    if new and plan.n_images == len(held) + len(new):
        raise SettingsError(
            f"{source.path} holds {len(new):,} images more than {store}. A store is not changed: extract them into a "
            f"further one with --not-in {store}; train, encode and analyze take several stores."
        )
