"""Labeled images of a store, and the classes to tell apart: chosen and checked before a model is loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache import HookPoint, SettingsError
from actcache.models import read_templates
from actcache.options import check_number, identity_of
from actcache.prompts import class_words, digest_class_names, read_class_names
from actcache.store import StoreGroup, select_images
from analysis.config import ComparisonConfig, StudyConfig


class ClassifiedImages(NamedTuple):
    """Labeled images of a store and the classes to tell apart, checked before a model is loaded.

    Attributes:
        names: class names, sorted.
        labels: [I] class number of every image of the store, -1 for images that are not selected.
        templates: texts around a class name.
        words: what the text encoder is given for each class.
    """

    store: StoreGroup
    hook_point: HookPoint
    names: tuple[str, ...]
    labels: NDArray[np.int64]
    templates: tuple[str, ...]
    words: tuple[str, ...]


def choose_classes(
    store: StoreGroup,
    hook_point: HookPoint,
    *,
    templates: str | Sequence[str] = "photo",
    class_names: str | Path | None = None,
    where: str | None = None,
    within: NDArray[np.int64] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> ClassifiedImages:
    """Select labeled images of a store; their classes are the ones to tell apart.

    Args:
        templates: as in `read_templates`.
        class_names: a file as in `read_class_names`.
        where: which images, by columns of images.parquet.
        within: stored positions to choose from.
        limit: number of images to sample at random.

    Raises:
        SettingsError: a site other than resid_post, no labels, fewer than two classes, an unknown template.
    """
    if hook_point.site != "resid_post":
        raise SettingsError(
            f"The rest of the model can only be run from a block's output (resid_post), not from {hook_point}. "
            "Use a run that was trained on a block's output."
        )
    texts = read_templates(templates)
    chosen = choose_images(store, where=where, within=within, limit=limit, seed=seed)
    names, numbers = np.unique(label_names(store)[chosen], return_inverse=True)
    if len(names) < 2:
        raise SettingsError(
            f"The selected images of {store.path} have one class, {names[0]}. A classifier needs at least two."
        )
    labels = np.full(store.n_images, -1, dtype=np.int64)
    labels[chosen] = numbers
    classes = names.tolist()
    given = {} if class_names is None else read_class_names(class_names, classes)
    words = tuple(given.get(name) or class_words(name, classes) for name in classes)
    return ClassifiedImages(store, hook_point, tuple(classes), labels, texts, words)


def describe_config(config: StudyConfig | ComparisonConfig) -> dict[str, object]:
    """The fields of a configuration for a result's identity: a file of class names counts by its content, if given."""
    fields: dict[str, Any] = identity_of(config)
    fields.pop("probe_store", None)  # a parent
    names = digest_class_names(fields.pop("class_names"))
    return fields if names is None else fields | {"class_names": names}


def choose_images(
    store: StoreGroup, *, where: str | None, within: NDArray[np.int64] | None = None, limit: int | None, seed: int
) -> NDArray[np.int64]:
    """Readable images with a label, ascending. Raises SettingsError when there are none."""
    mask = store.valid & label_names(store).astype(bool)
    if not mask.any():
        raise SettingsError(f"No image of {store.path} has a label. Extract a folder of class folders, or a table.")
    if where is not None:
        mask &= select_images(store.images, where)
        if not mask.any():
            raise SettingsError(
                f"--where {where!r} holds for none of the {store.n_images:,} images of {store.path} that have a label. "
                "Relax the condition."
            )
    images = np.flatnonzero(mask)
    if within is not None:
        images = np.intersect1d(images, within)
    if not len(images):
        raise SettingsError(f"No labeled image of {store.path} is selected. Select others with --where.")
    limit = None if limit is None else check_number("limit", limit, int, at_least=1)
    return sample_images(images, limit, seed)


def sample_images(images: NDArray[np.int64], limit: int | None, seed: int) -> NDArray[np.int64]:
    """At most `limit` of some images at random, ascending."""
    if limit is None or limit >= len(images):
        return images
    return np.sort(np.random.Generator(np.random.Philox(seed)).permutation(images)[:limit])


def label_names(store: StoreGroup) -> NDArray[Any]:
    """[I] names of the labels; "" for an image without a label."""
    return np.array(store.images["label_name"].to_pylist(), dtype=object)


def check_images(images: NDArray[np.int64], names: tuple[str, ...], labels: NDArray[np.int64], what: str) -> None:
    """Raise SettingsError unless every class has one of the images."""
    counts = np.bincount(labels[images], minlength=len(names))
    if not counts.all():
        missing = ", ".join(np.array(names, dtype=object)[counts == 0].tolist()[:10])
        raise SettingsError(
            f"There is no image of {missing} to {what}. Give more images, or select others with --where."
        )
