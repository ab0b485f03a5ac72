"""Pixels: images as the model takes them, decoded once if they fit into memory. Shots: those that prompts learn from.

embed_all() runs a tower on all of them, batch by batch.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache.models import Clip, VisionTower
from actcache.prompts.towers import embed_images
from actcache.sources import ImageSource, decode_image

CACHE_BYTES = 1 << 30
"""Memory for decoded images; images beyond it are decoded again each time."""


class Pixels:
    """Images as the model takes them, [B, 3, H, W] float32, decoded by threads and kept in memory up to CACHE_BYTES."""

    def __init__(self, source: ImageSource, uris: Sequence[str], clip: Clip) -> None:
        self.source, self.uris, self.clip = source, list(uris), clip
        self.kept: dict[int, Tensor] = {}
        self.n_bytes = 0

    def __len__(self) -> int:
        return len(self.uris)

    def read(self, rows: Sequence[int], pool: ThreadPoolExecutor) -> Tensor:
        """Raises ImageSourceError."""
        return torch.stack(list(pool.map(self._load, rows)))

    def _load(self, row: int) -> Tensor:
        if row not in self.kept:
            uri = self.uris[row]
            x = self.clip.transform(decode_image(self.source.read(uri), name=uri, preprocess=self.clip.preprocess))
            if self.n_bytes + x.nbytes > CACHE_BYTES:
                return x
            self.kept[row] = x
            self.n_bytes += x.nbytes
        return self.kept[row]


@dataclass(frozen=True)
class Shots:
    """The training images: pixels, [N] class numbers, class texts."""

    pixels: Pixels
    labels: NDArray[np.int64]
    names: tuple[str, ...]


@torch.no_grad()
def embed_all(
    tower: VisionTower, pixels: Pixels, *, embed: Callable[[VisionTower, Tensor], Tensor] = embed_images,
    batch_size: int = 64, on_batch: Callable[[int], None] = lambda n: None,
) -> Tensor:  # fmt: skip
    """What `embed` gives for all images, [N, E]: by default their unit embeddings."""
    parts = []
    with ThreadPoolExecutor(thread_name_prefix="decode") as pool:
        for first in range(0, len(pixels), batch_size):
            rows = range(first, min(first + batch_size, len(pixels)))
            parts.append(embed(tower, pixels.read(rows, pool)))
            on_batch(len(rows))
    return torch.cat(parts)
