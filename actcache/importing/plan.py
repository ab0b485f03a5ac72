"""plan_import(): which images, which tokens, which model, which layout. Nothing is written.

In: the shape of the activations, and what is said of them. Out: `ImportPlan`. An import and a program that writes
activations of its own are planned in the same way.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actcache.artifacts import artifact_path, digest
from actcache.errors import ModelError, SettingsError
from actcache.hook_point import HookPoint
from actcache.importing.config import ImportConfig
from actcache.importing.tokens import find_tokens
from actcache.preprocess import MAX_SIDE, Preprocess
from actcache.sources import ImagePlan, ImageSource, ImageTable, open_source, plan_images
from actcache.store import (
    NO_IMAGES,
    ImportedFrom,
    StoreLayout,
    StoreSettings,
    check_dtype,
    choose_shape,
    remember_paths,
)

log = logging.getLogger(__name__)

Images = ImageSource | str | Path | None
"""Where the images of activations are, in the order of the activations; None if they are not at hand."""


@dataclass(frozen=True)
class ImportPlan:
    """Everything that is known before the first value is read.

    Attributes:
        path: of the store.
        source: the images; None if they are not at hand.
        images: the image table in stored order.
        rows: [I] place of each stored image in the order of the activations.
    """

    path: Path
    source: ImageSource | None
    images: ImagePlan
    rows: NDArray[np.int64]
    settings: StoreSettings
    provenance: Mapping[str, object]

    @property
    def images_path(self) -> Path:
        return self.path / NO_IMAGES if self.source is None else self.source.path

    @property
    def layout(self) -> StoreLayout:
        return self.settings.layout


def plan_import(
    store: str | Path,
    config: ImportConfig,
    *,
    images: Images,
    n_images: int | None,
    n_tokens: int,
    d_model: int,
    hook_points: tuple[HookPoint, ...],
    imported: ImportedFrom,
    prefix: tuple[str, ...] | None = None,
    model_name: str | None = None,
    provenance: Mapping[str, object] | None = None,
) -> ImportPlan:
    """Fit the images and the model to the shape of activations.

    Args:
        n_images: None takes the number of `images`.
        prefix, model_name: what the files themselves say; the options come first.

    Raises:
        SettingsError: the number of images, tokens or channels is another one, or something was not said.
        ImageSourceError: the images cannot be listed. ModelError: the model cannot be loaded.
    """
    path = artifact_path(store)
    source, plan, rows = _plan_images(images, n_images, config, imported.source)
    model = _describe_model(config, n_tokens, d_model, hook_points, prefix, model_name)
    if source is not None and not model.preprocess:
        model = _assume_crop(model)
    chunk_images, shard_images = choose_shape(plan.n_images, config.shard_images)
    settings = StoreSettings(
        model_id=model.model_id,
        rows_id=plan.rows_id,
        hook_points=hook_points,
        dtype=config.dtype,
        precision=config.precision,
        codec=config.codec,
        layout=StoreLayout(
            n_images=plan.n_images,
            grid=model.grid,
            d_model=d_model,
            chunk_images=chunk_images,
            shard_images=shard_images,
            itemsize=check_dtype(config.dtype).itemsize,
            prefix=model.prefix,
        ),
        patch_size=model.patch_size,
        seed=config.seed,
        limit=None,
        preprocess=model.preprocess,
        columns=plan.columns,
        imported=replace(imported, model=model.name_alone),
    )
    paths = remember_paths(path, model=config.model, pretrained=config.pretrained or config.model, masks=config.masks)
    facts = {
        **model.provenance,
        **({} if source is None else {"images": source.path.name}),
        **({} if config.class_level is None else {"class_level": config.class_level}),
        **({"guessed": list(model.guessed)} if model.guessed else {}),
        **(provenance or {}),
        "paths": paths,
    }
    return ImportPlan(path, source, plan, rows, settings, facts)


# ---------------------------------------------------------------------------------------------------------------------
# Images


def _plan_images(
    images: Images, n_images: int | None, config: ImportConfig, identity: str
) -> tuple[ImageSource | None, ImagePlan, NDArray[np.int64]]:
    """(the images if they are at hand, their plan, the place of each stored image in the order of the activations)."""
    given = {name: getattr(config, name) for name in ("masks", "class_level", "path_column", "label")}
    if images is None:
        assert n_images is not None
        for name, value in given.items():
            if value is not None:
                raise SettingsError(f"--{name.replace('_', '-')} is about images. Name them with --images.")
        plan = _number_images(n_images, config.seed)
        plan = replace(plan, rows_id=digest({"rows": plan.rows_id, "source": identity}))  # no other file's images
        return None, plan, _source_index(plan)
    opened = open_source(images, **given)
    source: ImageSource | None = opened
    table = opened if isinstance(opened, ImageTable) and config.masks is None else None
    if table is not None and (names := table.plan_names(seed=config.seed)) is not None:
        log.warning("%s lists no image that is there: only their names and columns are kept.", opened.path)
        source, plan = None, names
    else:
        plan = opened.plan(seed=config.seed)
    if n_images not in (None, plan.n_images):
        raise SettingsError(
            f"The activations are of {n_images:,} images, but {opened.path} has {plan.n_images:,}. Expected one row an "
            "image, in the order of the table's rows, or of the sorted names of a folder."
        )
    given_rows = getattr(opened, "given_rows", None)  # a table, whose listing is sorted
    index = _source_index(plan)
    return source, plan, index if given_rows is None else given_rows[index]


def _source_index(plan: ImagePlan) -> NDArray[np.int64]:
    return np.asarray(plan.table["source_index"].to_numpy(), dtype=np.int64)


def _number_images(n_images: int, seed: int) -> ImagePlan:
    """An image table for images of which only the place is known, which is their uri."""
    numbers = pa.array(np.arange(n_images, dtype=np.int64))
    columns = {
        "uri": numbers.cast(pa.string()),
        "label": pa.array(np.full(n_images, -1, np.int32)),
        "label_name": pa.array(np.full(n_images, "")),
        "bytes": pa.array(np.full(n_images, -1, np.int64)),
    }
    return plan_images(pa.table(columns), seed=seed)


# ---------------------------------------------------------------------------------------------------------------------
# The model


class _Model(NamedTuple):
    """What is stored of the model. `name_alone`: its name, if no more is known of it."""

    model_id: str
    prefix: tuple[str, ...]
    grid: tuple[int, int]
    patch_size: tuple[int, int]
    preprocess: Mapping[str, object]
    provenance: Mapping[str, object]
    name_alone: str | None
    guessed: tuple[str, ...]


def _describe_model(
    config: ImportConfig, n_tokens: int, d_model: int, hook_points: tuple[HookPoint, ...],
    prefix: tuple[str, ...] | None, model_name: str | None,
) -> _Model:  # fmt: skip
    if config.model is not None:
        return _describe_tower(config, n_tokens, d_model, hook_points, prefix)
    name = config.model_name or model_name
    if name is None:
        raise SettingsError(
            "Which model made the activations? Give --model and --pretrained, or --model-name NAME if its weights are "
            "not at hand."
        )
    tokens = find_tokens(n_tokens, prefix if config.special is None else config.special, config.rows_columns)
    model_id = digest({"name": name})
    return _Model(model_id, tokens.prefix, tokens.grid, (1, 1), {}, {"model": name}, name, tokens.guessed)


def _assume_crop(model: _Model) -> _Model:
    """Pictures are shown as most models see them: the shorter side is resized, and the center is cut out. A patch gets
    at least 16 pixels, and a picture 224.
    """
    longer = max(model.grid)
    side = max(1, min(max(16, -(-224 // longer)), MAX_SIDE // longer))
    preprocess = Preprocess(size=(side * model.grid[0], side * model.grid[1]))
    return model._replace(patch_size=(side, side), preprocess=preprocess.to_json(), guessed=(*model.guessed, "crop"))


def _describe_tower(
    config: ImportConfig, n_tokens: int, d_model: int, hook_points: tuple[HookPoint, ...],
    prefix: tuple[str, ...] | None,
) -> _Model:  # fmt: skip
    """The identity and the tokens of a tower, whose stream the activations must be."""
    from actcache.extraction import find_patch_size
    from actcache.models import load_clip, make_vision_tower

    assert config.model is not None
    preprocess_as = None if config.preprocess is None else str(config.preprocess)
    clip = load_clip(config.model, config.pretrained, image_size=config.image_size, preprocess_as=preprocess_as)
    tower = make_vision_tower(clip, precision="float32", device="cpu")
    name = Path(config.model).name
    given = config.special if config.special is not None else prefix
    for what, ours, theirs in (
        ("tokens an image", n_tokens, tower.n_tokens),
        ("channels a token", d_model, tower.d_model),
        ("special tokens", given if given is not None else tower.prefix, tower.prefix),
        ("patches", config.rows_columns or tower.grid, tower.grid),
    ):
        if ours != theirs:
            shown = [" x ".join(map(str, value)) or "none" if isinstance(value, tuple) else f"{value:,}"
                     for value in (ours, theirs)]  # fmt: skip
            raise ModelError(
                f"The activations have {shown[0]} {what}, but {name} has {shown[1]}. Name the model that made them, or "
                "give --model-name instead of --model if they are a part of its stream."
            )
    if (last := hook_points[-1].layer) >= tower.n_layers:
        raise SettingsError(f"{name} has no layer {last}: its blocks are 0..{tower.n_layers - 1}. Correct --layer.")
    if (site := hook_points[0].site) not in tower.sites:
        raise SettingsError(f"{name} has no {site}: its blocks have {', '.join(tower.sites)}. Correct --site.")
    provenance: dict[str, object] = {
        "model": name,
        "pretrained": Path(config.pretrained or clip.source.sources["weights"]).name,
        "model_sources": clip.facts,
        **clip.versions,
    }
    patch_size, preprocess = find_patch_size(tower), tower.preprocess.to_json()
    return _Model(tower.model_id, tower.prefix, tower.grid, patch_size, preprocess, provenance, None, ())
