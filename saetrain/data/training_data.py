"""TrainingData: opened stores, with the images that are trained on and those that are held out."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache import HookPoint, SettingsError
from actcache.store import StoreGroup, Tokens, select_images
from saetrain.data.order import split_images

FIRST_IMAGES = 512
"""Number of images that initial weights are taken from."""


@dataclass(frozen=True)
class TrainingData:
    """Stored positions over all stores; only images that could be read."""

    stores: StoreGroup
    images: NDArray[np.int64]  # trained on
    held_out: NDArray[np.int64]

    @classmethod
    def split(cls, stores: StoreGroup, where: str | None = None) -> "TrainingData":
        """Split the images, or those that match the filter `where`.

        Raises:
            SettingsError: `where` holds for no image, or no image is held out, so the quality of an SAE could not be
                measured at the end.
        """
        wanted = stores.valid if where is None else stores.valid & select_images(stores.images, where)
        if not wanted.any() and where is not None:
            raise SettingsError(
                f"--where {where!r} holds for none of the {stores.n_images:,} images of {stores.path}. "
                "Relax the condition."
            )
        images, held_out = split_images([member.n_images for member in stores.stores])
        data = cls(stores, images[wanted[images]], held_out[wanted[held_out]])
        if not len(data.held_out):
            if where is None:
                raise SettingsError(f"No readable image of {stores.path} is held out. Extract more images.")
            raise SettingsError(
                f"--where {where!r} holds for {wanted.sum():,} images of {stores.path}, but for none of those that are "
                "held out (the last 5 %). Relax the condition."
            )
        return data

    def first_rows(self, hook_point: HookPoint, tokens: Tokens, n: int, *, seed: int) -> Tensor:
        """Up to n tokens [n, D] of the first training images, shuffled. The stored order of images is random."""
        values = self.stores.read(hook_point, images=self.images[:FIRST_IMAGES], tokens=tokens)
        rows = torch.from_numpy(values.reshape(-1, values.shape[-1]))
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:n]]
