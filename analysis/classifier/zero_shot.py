"""The zero-shot classifier behind a hook point: cached activations in, logits over class names out.

Only the blocks after the hook point run, then the head. Promises: with unchanged activations the logits are those of a
full forward pass, up to the rounding of the stored dtype.
Shapes: B images of a batch, T tokens (special tokens, patches, an adapted model's prompt tokens), D d_model, C classes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from actcache import HookPoint, SettingsError
from actcache.models import VisionTower, read_templates
from actcache.options import check_number, identity_of
from actcache.progress import Progress
from actcache.prompts import (
    Towers,
    class_words,
    digest_class_names,
    open_towers,
    read_class_names,
    warn_about_shared_texts,
)
from actcache.store import StoreGroup, select_images
from analysis.config import ComparisonConfig, ModelOptions, StudyConfig
from analysis.lineage import open_parents
from saetrain import CodeStore

BATCH_IMAGES = ModelOptions.batch_size
BATCH_TEXTS = 512
"""Texts that CoCoOp embeds at once: images x classes."""


@dataclass(frozen=True)
class ZeroShot:
    """A store, the model behind one of its hook points, and the classes to tell apart.

    Attributes:
        names: class names, sorted.
        classes: [C, E] unit text embeddings; of `by_image` none, [0, E].
        labels: [I] class number of every image of the store, -1 for images that are not selected.
        logit_scale: factor that cosines are multiplied with.
        by_image: CoCoOp's texts, which differ from image to image: unit image embeddings [B, E] -> [B, C, E].
    """

    store: StoreGroup
    hook_point: HookPoint
    vision: VisionTower
    names: tuple[str, ...]
    classes: Tensor
    labels: NDArray[np.int64]
    logit_scale: float
    by_image: Callable[[Tensor], Tensor] | None = None

    @property
    def images(self) -> NDArray[np.int64]:
        """Stored positions of the selected images."""
        return np.flatnonzero(self.labels >= 0)

    def read(self, images: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """The stream at the hook point, [B, T, D] float32 on the model's device."""
        return read_stream(self.store, self.hook_point, images).to(self.vision.device)

    def embed(self, x: Tensor) -> Tensor:
        """The stream at the hook point [B, T, D] -> unit image embeddings [B, E]."""
        x = self.vision.run_blocks(x, self.hook_point.layer + 1, self.vision.n_layers)
        return F.normalize(self.vision.head(x), dim=1)

    def logits(self, x: Tensor) -> Tensor:
        """The stream at the hook point [B, T, D] -> logits [B, C], scaled."""
        return self.classify(self.embed(x))

    def classify(self, embedded: Tensor) -> Tensor:
        """Unit image embeddings [B, E] -> logits [B, C], scaled."""
        if self.by_image is None:
            return self.logit_scale * embedded @ self.classes.T
        parts = torch.split(embedded, max(1, BATCH_TEXTS // len(self.names)))
        return self.logit_scale * torch.cat([torch.einsum("be,bce->bc", x, self.by_image(x)) for x in parts])


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
    names, numbers = np.unique(_label_names(store)[chosen], return_inverse=True)
    if len(names) < 2:
        raise SettingsError(
            f"The selected images of {store.path} have one class, {names[0]}. Zero-shot needs at least two classes."
        )
    labels = np.full(store.n_images, -1, dtype=np.int64)
    labels[chosen] = numbers
    classes = names.tolist()
    given = {} if class_names is None else read_class_names(class_names, classes)
    words = tuple(given.get(name) or class_words(name, classes) for name in classes)
    warn_about_shared_texts(classes, words)
    return ClassifiedImages(store, hook_point, tuple(classes), labels, texts, words)


def open_zero_shot(images: ClassifiedImages, towers: Towers, *, by_image: bool = False) -> ZeroShot:
    """The classifier of the images by the model that `towers` are.

    Args:
        by_image: accept CoCoOp's prompts too, whose class texts differ from image to image.

    Raises:
        SettingsError: CoCoOp's prompts without `by_image`, or prompts that were trained for other classes.
    """
    store, hook_point, names, labels, templates, words = images
    vision, text, _ = towers
    texts_by_image = towers.texts_by_image(words) if by_image else None
    classes = towers.embed_classes(words, templates) if texts_by_image is None else torch.empty(0, text.embed_dim)
    return ZeroShot(store, hook_point, vision, names, classes, labels, text.logit_scale, texts_by_image)


def describe_config(config: StudyConfig | ComparisonConfig) -> dict[str, object]:
    """The fields of a configuration for a result's identity: a file of class names counts by its content, if given."""
    fields: dict[str, Any] = identity_of(config)
    names = digest_class_names(fields.pop("class_names"))
    return fields if names is None else fields | {"class_names": names}


def choose_images(
    store: StoreGroup, *, where: str | None, within: NDArray[np.int64] | None = None, limit: int | None, seed: int
) -> NDArray[np.int64]:
    """Readable images with a label, ascending. Raises SettingsError when there are none."""
    mask = store.valid & _label_names(store).astype(bool)
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


def _label_names(store: StoreGroup) -> NDArray[Any]:
    return np.array(store.images["label_name"].to_pylist(), dtype=object)


def check_images(images: NDArray[np.int64], names: tuple[str, ...], labels: NDArray[np.int64], what: str) -> None:
    """Raise SettingsError unless every class has one of the images."""
    counts = np.bincount(labels[images], minlength=len(names))
    if not counts.all():
        missing = ", ".join(np.array(names, dtype=object)[counts == 0].tolist()[:10])
        raise SettingsError(
            f"There is no image of {missing} to {what}. Give more images, or select others with --where."
        )


def read_stream(store: StoreGroup, hook_point: HookPoint, images: Sequence[int] | NDArray[np.int64]) -> Tensor:
    """Everything that later blocks need from some images: [B, T, D] float32."""
    return torch.from_numpy(store.read_stream(hook_point, images=images, check=store.checks_cheaply)).float()


def batches(
    images: NDArray[np.int64], batch_size: int = BATCH_IMAGES, on_progress: Progress | None = None
) -> Iterator[NDArray[np.int64]]:
    """Cut images into batches. `on_progress` is called with (images done, in all) once the caller is done with one."""
    for first in range(0, len(images), batch_size):
        yield images[first : first + batch_size]
        if on_progress:
            on_progress(min(first + batch_size, len(images)), len(images))


def as_numpy(value: Tensor) -> NDArray[Any]:
    return np.asarray(value.detach().cpu().numpy())


@torch.no_grad()
def predict_classes(
    codes: CodeStore, *, model: ModelOptions = ModelOptions(), on_progress: Progress | None = None
) -> NDArray[Any]:
    """[I] class names, "" for an image without a label or that could not be read.

    The store is looked for where the codes say it is.

    Raises:
        ParentMismatchError: something else lies where the store was. Others as `choose_classes`.
    """
    store = open_parents(codes)
    labeled = choose_classes(store, codes.hook_point)
    towers = open_towers(store.stores[0].artifact, model=model.model, pretrained=model.pretrained, device=model.device)
    classifier = open_zero_shot(labeled, towers)
    names, predicted = np.array(classifier.names, dtype=object), np.full(codes.n_images, "", dtype=object)
    for images in batches(classifier.images, model.batch_size, on_progress):
        predicted[images] = names[as_numpy(classifier.logits(classifier.read(images)).argmax(1))]
    return predicted
