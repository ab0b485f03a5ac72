"""The images that a linear probe is trained on, chosen and checked before a model is loaded.

They are the labeled images of a store's training split; held-out images are left for judging. A probe has learned from
all of them, so they are never judged, nor are their copies in other stores: `seen_in` says which these are.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache import ParentMismatchError, SettingsError, open_stores
from actcache.artifacts import Artifact, digest
from actcache.seen import LearnedImages, Seen, hashes_of
from actcache.store import StoreGroup, select_images
from analysis.classifier.labeled_images import label_names, sample_images
from analysis.config import ProbeConfig
from saetrain.data import split_wanted

N_IMAGES = 20_000
"""Images that a probe is trained on at most: their features take 0.25 GB at width 1536, a fit some seconds a class."""
LEAST = 2
"""Images of each class: one to fit on, and one to choose C on."""


@dataclass(frozen=True)
class ProbeTraining:
    """Images to train on.

    Attributes:
        images: stored positions, ascending.
        labels: [n] class name of each.
        features: as in `ProbeConfig.probe_features`.
    """

    store: StoreGroup
    images: NDArray[np.int64]
    labels: NDArray[Any]
    features: str
    seed: int

    def of(self, names: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(images of some classes, their class numbers). Raises SettingsError for a class that has too few."""
        number = {name: i for i, name in enumerate(names)}
        classes = np.array([number.get(name, -1) for name in self.labels], dtype=np.int64)
        few = [name for name, i in number.items() if (classes == i).sum() < LEAST]
        if few:
            raise SettingsError(
                f"The probe has fewer than {LEAST} training images of {', '.join(few[:10])} in {self.store.path}. "
                "Give a labeled store of the same model that shows these classes with --probe-store."
            )
        return self.images[classes >= 0], classes[classes >= 0]

    def seen_in(self, store: StoreGroup) -> Seen:
        """Which images of a store the probe learns from."""
        learned = LearnedImages.of("probe", self.store.images, self.images)
        if store.rows_id != self.store.rows_id:
            return learned.find(store.images, store.valid)
        # positions tell the images of one store apart, names need not
        seen = learned.find(store.images, store.valid, named=np.zeros(store.n_images, dtype=bool))
        seen.images[self.images] = True
        return seen

    def parents(self, judged: StoreGroup) -> dict[str, Artifact]:
        """The store of the training images as a parent of a result, unless it is one already."""
        known = {member.store_id for member in judged.stores}
        new = [member.artifact for member in self.store.stores if member.store_id not in known]
        return {"probe store" if i == 0 else f"probe store {i + 1}": artifact for i, artifact in enumerate(new)}

    def digest(self, images: NDArray[np.int64]) -> str:
        """What stands for some of the images in a result: a hash of their contents, or of their names."""
        hashes, uris = (column.take(images).to_pylist() for column in (hashes_of(self.store.images), self._uris()))
        return str(digest(sorted(content or f"uri {uri}" for content, uri in zip(hashes, uris, strict=True))))

    def _uris(self) -> Any:
        return self.store.images["uri"].combine_chunks()


def choose_training(
    judged: StoreGroup, config: ProbeConfig, *, other: str | Path | None = None, seed: int = 0
) -> ProbeTraining:
    """The images to train a probe on that judges images of a store.

    Args:
        other: a labeled store of the same model to train on instead (`--probe-store`).

    Raises:
        SettingsError: scikit-learn is missing, there is no labeled image. ParentMismatchError: a store of another
            model or of other prompts.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise SettingsError("A linear probe needs the package scikit-learn: pip install 'patchsae[quality]'.")
    store = judged if other is None else open_stores(str(other))
    _check_model(store, judged)
    names = label_names(store)
    wanted = store.valid & names.astype(bool)
    if config.probe_where is not None:
        wanted &= select_images(store.images, config.probe_where, flag="--probe-where")
    images, _ = split_wanted(store, wanted)
    if not len(images):
        raise SettingsError(
            f"No labeled image of the training split of {store.path} is there to train a probe on. Give a labeled "
            "store of the same model with --probe-store."
        )
    images = sample_images(images, N_IMAGES, seed)
    return ProbeTraining(store, images, names[images], config.probe_features, seed)


def _check_model(store: StoreGroup, judged: StoreGroup) -> None:
    if store.model_id != judged.model_id:
        raise ParentMismatchError(
            f"--probe-store {store.path} holds model {store.model_id}, but {judged.path} holds {judged.model_id}. "
            "Extract the training images with the same model."
        )
    if store.stores[0].settings.prompts != judged.stores[0].settings.prompts:
        raise ParentMismatchError(
            f"--probe-store {store.path} and {judged.path} were extracted with different prompts. "
            "Extract the training images with the same prompts."
        )
