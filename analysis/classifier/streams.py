"""The stream of stored images, batch by batch, and which of its positions are CLS and the patches."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache import HookPoint, SettingsError
from actcache.models import VisionTower
from actcache.progress import Progress
from actcache.store import StoreGroup, read_extra
from analysis.config import ModelOptions

BATCH_IMAGES = ModelOptions.batch_size

Part = slice | Tensor
"""Positions in the stream: a slice where they are neighbors."""


def read_stream(store: StoreGroup, hook_point: HookPoint, images: Sequence[int] | NDArray[np.int64]) -> Tensor:
    """Everything that later blocks need from some images: [B, T, D] float32."""
    x = torch.from_numpy(store.read(hook_point, images=images, check=store.checks_cheaply)).float()
    if not store.layout.n_extra:
        return x
    return torch.cat([x, torch.from_numpy(read_extra(store, hook_point, images=np.asarray(images))).float()], 1)


def stream_part(vision: VisionTower, tokens: str) -> Part:
    """Where the tokens of a kind lie in the stream: all (CLS, where there is one, and the patches), patch or cls.

    Registers and prompts are never among them.

    Raises:
        SettingsError: CLS of a tower that has none.
    """
    prefix, n_tokens = vision.prefix, vision.n_tokens
    patches = slice(len(prefix), n_tokens)
    if tokens == "patch" or (tokens == "all" and "cls" not in prefix):
        return patches
    if "cls" not in prefix:
        raise SettingsError("This model has no CLS token, so there is none to replace. Use --tokens patch.")
    cls = prefix.index("cls")
    if tokens == "cls":
        return slice(cls, cls + 1)
    if cls + 1 == patches.start:
        return slice(cls, n_tokens)
    return torch.tensor([cls, *range(patches.start, n_tokens)], device=vision.device)


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
