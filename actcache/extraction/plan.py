"""plan_extraction(): which images, which tower, which layout, how many bytes. Nothing is written.

In: the arguments of `extract`. Out: an `ExtractionPlan`, and from it an `ExtractionEstimate` (the dry run).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from actcache.artifacts import artifact_path, missing_shards, open_artifact
from actcache.errors import ModelError, PipelineError, SettingsError
from actcache.extraction.config import ExtractConfig
from actcache.models import VisionTower, compile_tower, load_clip, make_vision_tower
from actcache.options import check_number
from actcache.preprocess import MAX_PIXELS
from actcache.prompts import open_prompts, prompt_vision, read_class_names, recorded_shots
from actcache.sources import ImageFolder, ImagePlan, ImageSource, decode_image, open_source
from actcache.store import (
    ActivationStore,
    StoreLayout,
    StoreSettings,
    check_dtype,
    choose_shape,
    free_bytes,
    read_images,
    remember_paths,
    shard_bytes,
)
from actcache.workers import find_worker

SAMPLE_IMAGES = 32
"""Number of images on which the dry run measures decoding and the forward pass."""


@dataclass(frozen=True)
class ExtractionPlan:
    """Everything that is known before the first image is read."""

    path: Path  # of the store
    source: ImageSource
    images: ImagePlan
    tower: VisionTower
    settings: StoreSettings
    provenance: Mapping[str, object]
    max_pixels: int = MAX_PIXELS
    names_given: bool = False  # whether --class-level or --class-names chose the names of the classes

    def read_pixels(self, uri: str) -> Tensor:
        """An image as the tower takes it, [3, H, W] float32. Raises ImageSourceError."""
        return self.decode(self.source.read(uri), uri)

    def decode(self, data: bytes, uri: str) -> Tensor:
        """The same, of bytes that were read."""
        image = decode_image(data, name=uri, max_pixels=self.max_pixels, preprocess=self.tower.preprocess)
        return self.tower.transform(image)

    @property
    def layout(self) -> StoreLayout:
        return self.settings.layout

    def shard_bytes(self, shards: Sequence[int]) -> int:
        """Size of these shards when stored raw; compressed shards are smaller."""
        return shard_bytes(self.settings, shards)


@dataclass(frozen=True)
class ExtractionEstimate:
    """What `extract` would do. `seconds` is extrapolated from one batch on this machine, for this worker's share."""

    n_images: int
    n_tokens: int
    n_bytes: int
    n_shards: int
    n_missing_shards: int
    missing_bytes: int
    free_bytes: int | None  # None if unknown, as on an object store
    images_per_s: float
    seconds: float
    settings: StoreSettings
    classes: Sequence[str]
    left_out: Mapping[str, int]

    @property
    def fits(self) -> bool:
        return self.free_bytes is None or self.missing_bytes <= self.free_bytes

    def to_json(self) -> dict[str, object]:
        return {**vars(self), "settings": self.settings.to_json(), "fits": self.fits}


def plan_extraction(
    images: ImageSource | str | Path,
    store: str | Path,
    config: ExtractConfig,
    device: str,
    on_plan: Callable[[ImagePlan], None] | None = None,
    *,
    preprocess: Mapping[str, object] | None = None,
    overwrite: bool = False,
) -> ExtractionPlan:
    """List the images, load the tower and choose the layout. Raises the same errors as `extract`.

    Args:
        preprocess: the preprocessing that an existing store recorded; by default the model's.
        overwrite: whether an existing store is going to be replaced, so that it does not matter how it was made.
    """
    path = artifact_path(store)
    source = open_source(
        images,
        masks=config.masks,
        class_level=config.class_level,
        path_column=config.path_column,
        label=config.label,
    )
    stored = {uri for other in config.not_in for uri in ActivationStore.open(other).images["uri"].to_pylist()}
    plan = _list_images(source, None if overwrite else path, limit=config.limit, seed=config.seed, exclude=stored)
    if config.class_names is not None:
        plan = plan.rename_classes(read_class_names(config.class_names, plan.classes))
    if on_plan is not None:
        on_plan(plan)
    clip = load_clip(
        config.model,
        config.pretrained,
        preprocess=preprocess,
        image_size=config.image_size,
        preprocess_as=None if config.preprocess is None else str(config.preprocess),
    )
    prompts = None if config.prompts is None else open_prompts(config.prompts, clip)
    tower = prompt_vision(make_vision_tower(clip, precision=config.precision, device=device), prompts)
    tower = compile_tower(tower) if config.compile else tower
    name = Path(config.model).name
    if (last := config.hook_points[-1].layer) >= tower.n_layers:
        raise SettingsError(
            f"{name} has no layer {last}: its blocks are 0..{tower.n_layers - 1}. Choose --layer within that range."
        )
    if lacking := sorted({hook.site for hook in config.hook_points} - set(tower.sites)):
        raise SettingsError(
            f"{name} has no {', '.join(lacking)}: its blocks have {', '.join(tower.sites)}. Choose --site among these."
        )
    chunk_images, shard_images = choose_shape(plan.n_images, config.shard_images)
    settings = StoreSettings(
        model_id=tower.model_id,
        rows_id=plan.rows_id,
        hook_points=config.hook_points,
        dtype=config.dtype,
        precision=tower.precision,
        codec=config.codec,
        layout=StoreLayout(
            n_images=plan.n_images,
            grid=tower.grid,
            d_model=tower.d_model,
            chunk_images=chunk_images,
            shard_images=shard_images,
            n_extra=tower.n_extra,
            itemsize=check_dtype(config.dtype).itemsize,
            prefix=tower.prefix,
        ),
        patch_size=find_patch_size(tower),
        seed=config.seed,
        limit=config.limit,
        preprocess=tower.preprocess.to_json(),
        compile=config.compile,
        prompts=prompts.description if prompts else None,
        columns=plan.columns,
    )
    provenance = {
        "model": name,
        "pretrained": Path(config.pretrained or clip.source.sources["weights"]).name,
        "model_sources": clip.facts,
        **_describe_prompts(config.prompts),
        "images": source.path.name,
        "class_level": "auto" if config.class_level is None else config.class_level,
        **({"max_pixels": config.max_pixels} if config.max_pixels != MAX_PIXELS else {}),
        **clip.versions,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "paths": remember_paths(
            path,
            model=config.model,
            pretrained=config.pretrained or config.model,  # a folder or repository has its own weights
            prompts=config.prompts,
            masks=config.masks,
            class_names=config.class_names,
            not_in=config.not_in,
        ),
    }
    if not overwrite:
        _explain_more_images(source, plan, path, settings)
    names_given = config.class_level is not None or config.class_names is not None
    return ExtractionPlan(path, source, plan, tower, settings, provenance, config.max_pixels, names_given)


def _list_images(source: ImageSource, store: Path | None, **options: Any) -> ImagePlan:
    """The images of a source, as an existing store has them if an earlier version made it of the same folder."""
    plan = source.plan(**options)
    if store is not None and isinstance(source, ImageFolder):
        with suppress(PipelineError, KeyError):  # there is no store, or no image with the earlier suffixes
            recorded = open_artifact(store, "acts").settings["rows_id"]
            if recorded != plan.rows_id and (earlier := source.listed_earlier().plan(**options)).rows_id == recorded:
                return earlier
    return plan


def find_patch_size(tower: VisionTower) -> tuple[int, int]:
    """Pixels of a patch: those that the tower names, if they give its grid. A tower with a convolutional stem may name
    the patches of the stem's output, and then the picture divided by the grid is right.
    """
    (height, width), (rows, columns), (high, wide) = tower.preprocess.size, tower.grid, tower.patch_size
    exact = (height // high, width // wide) == (rows, columns)
    return (high, wide) if exact else (height // rows, width // columns)


@torch.no_grad()
def check_stream(plan: ExtractionPlan) -> None:
    """Raise ModelError unless one pass over black pictures gives the tokens that the layout says, because the grid that
    a tower declares may be another than the one that it makes of pictures of this size.
    """
    (height, width), last, layout = plan.tower.preprocess.size, plan.settings.hook_points[-1], plan.layout
    shape = tuple(plan.tower.run(torch.zeros(2, 3, height, width), [last])[last].shape[1:])
    if shape != (layout.n_stream, layout.d_model):
        rows, columns = layout.grid
        raise ModelError(
            f"{plan.provenance['model']} makes {shape[0]} tokens of width {shape[1]} of {height} x {width} "
            f"pixels; expected were {layout.n_stream} of width {layout.d_model} ({len(layout.prefix)} special tokens, "
            f"{rows} x {columns} patches, {layout.n_extra} prompts). Nothing was written; choose another image size."
        )


def _describe_prompts(prompts: str | Path | None) -> dict[str, object]:
    """The name of the prompts and, if they are known, the images that they were trained on."""
    if prompts is None:
        return {}
    shots = recorded_shots(prompts)
    return {"prompts": Path(prompts).name, **({} if shots is None else {"shots": asdict(shots)})}


def estimate(
    images: ImageSource | str | Path, store: str | Path, config: ExtractConfig | None = None, *,
    batch_size: int = 32, device: str = "auto", **options: Any,
) -> ExtractionEstimate:  # fmt: skip
    """What `extract` would do with the same arguments, extrapolated from one batch of real images, decoding included.

    Nothing is written.

    Args:
        config, options: as for `extract`.
    """
    worker, batch_size = find_worker(), check_number("batch_size", batch_size, int, at_least=1)
    plan = plan_extraction(images, store, config or ExtractConfig(**options), device)
    path = plan.path
    check_stream(plan)
    shards = range(plan.layout.n_shards)
    missing = missing_shards(path, len(shards)) if path.is_dir() else list(shards)
    uris = plan.images.table["uri"].slice(0, min(SAMPLE_IMAGES, batch_size)).to_pylist()
    pixels, started = [], time.perf_counter()
    for uri in uris:
        try:
            pixels.append(plan.read_pixels(uri))
        except PipelineError:
            continue  # extraction itself lists what cannot be read
    decoding = (time.perf_counter() - started) / max(torch.get_num_threads(), 1)
    with torch.no_grad():
        if pixels:
            plan.tower.run(torch.stack(pixels[:2]), plan.settings.hook_points)  # warm-up
            started = time.perf_counter()
            streams = plan.tower.run(torch.stack(pixels), plan.settings.hook_points)
            _ = [float(x.flatten()[0]) for x in streams.values()]  # this waits for the device
    rate = len(uris) / (time.perf_counter() - started + decoding)
    own = [shard for shard in missing if worker.owns(shard)]
    return ExtractionEstimate(
        n_images=plan.layout.n_images,
        n_tokens=plan.layout.n_images * plan.layout.n_read_tokens("all"),
        n_bytes=plan.shard_bytes(shards),
        n_shards=len(shards),
        n_missing_shards=len(missing),
        missing_bytes=plan.shard_bytes(missing),
        free_bytes=free_bytes(path),
        images_per_s=rate,
        seconds=sum(len(plan.layout.shard_range(shard)) for shard in own) / rate,
        settings=plan.settings,
        classes=plan.images.classes,
        left_out=plan.images.left_out,
    )


def _explain_more_images(source: ImageSource, plan: ImagePlan, store: Path, settings: StoreSettings) -> None:
    """If the source has grown since the store was made, explain how to extract the new images into another store."""
    try:
        existing = open_artifact(store, "acts")
        if existing.settings["rows_id"] == plan.rows_id or existing.settings["model_id"] != settings.model_id:
            return
        stored = set(read_images(store)["uri"].to_pylist())
    except (PipelineError, KeyError):
        return
    new = set(plan.table["uri"].to_pylist()) - stored
    if new and plan.n_images == len(stored) + len(new):
        raise SettingsError(
            f"{source.path} has {len(new):,} images that {store} lacks. A store never changes: extract them "
            f"into another one with --not-in {store}; train, encode and analyze take several stores."
        )
