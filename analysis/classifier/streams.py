"""The stream of stored images, batch by batch."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache import HookPoint
from actcache.progress import Progress
from actcache.store import StoreGroup
from analysis.config import ModelOptions

BATCH_IMAGES = ModelOptions.batch_size


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
