"""TrainingData: opened stores, with the images that are trained on and those that are held out."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache import HookPoint, SettingsError
from actcache.seen import LearnedImages
from actcache.store import StoreGroup, Tokens
from saetrain.data.split import split_wanted

FIRST_IMAGES = 512
"""Number of images that initial weights are taken from."""


@dataclass(frozen=True)
class TrainingData:
    """Stored positions over all stores; only images that could be read.

    Attributes:
        images: those that are trained on.
        held_out: those that are not, and that are no copies of images that are.
        n_seen: number of copies that were left out of `held_out`.
    """

    stores: StoreGroup
    images: NDArray[np.int64]
    held_out: NDArray[np.int64]
    n_seen: int = 0

    @classmethod
    def split(cls, stores: StoreGroup, where: str | None = None) -> "TrainingData":
        """Split the images, or those that match the filter `where`.

        Raises:
            SettingsError: `where` holds for no image, no image is held out, or all are copies of training images, so
                that the quality of an SAE could not be measured at the end.
        """
        images, held_out = split_wanted(stores, where)
        if where is not None and not len(images) + len(held_out):
            raise SettingsError(
                f"--where {where!r} holds for none of the {stores.n_images:,} images of {stores.path}. "
                "Relax the condition."
            )
        if not len(held_out):
            if where is None:
                raise SettingsError(f"No readable image of {stores.path} is held out. Extract more images.")
            raise SettingsError(
                f"--where {where!r} holds for {len(images):,} images of {stores.path}, but for none of those that are "
                "held out (the last 5 %). Relax the condition."
            )
        # by content only: two stores may have equal names for different images
        no_names = np.zeros(stores.n_images, dtype=bool)
        copies = LearnedImages.of("training", stores.images, images).find(stores.images, named=no_names).images
        fresh = held_out[~copies[held_out]]
        if not len(fresh):
            raise SettingsError(
                f"All {len(held_out):,} held-out images of {stores.path} are also trained on, because the stores hold "
                "copies of the same images. Train on one of these stores, or extract others with --not-in."
            )
        return cls(stores, images, fresh, len(held_out) - len(fresh))

    def first_rows(self, hook_point: HookPoint, tokens: Tokens, n: int, *, seed: int) -> Tensor:
        """Up to n tokens [n, D] of the first training images, shuffled. The stored order of images is random."""
        values = self.stores.read(
            hook_point, images=self.images[:FIRST_IMAGES], tokens=tokens, check=self.stores.checks_cheaply
        )
        rows = torch.from_numpy(values.reshape(-1, values.shape[-1]))
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:n]]
