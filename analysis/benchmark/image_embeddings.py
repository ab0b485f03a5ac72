"""Embeddings of the judged images by another model, by which monosemanticity says how alike images are.

They come from a store of the same images (`--embeddings`), through the rest of its model. Each image has two unit
vectors: its embedding, and the same minus the mean over the judged images. Without that, all of them lie in a narrow
cone, so any two images look alike. They are kept in a file of the work folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actcache import PipelineError
from actcache.artifacts import digest, open_atomic
from actcache.progress import Progress
from actcache.prompts import open_vision_tower
from actcache.store import StoreGroup
from analysis.benchmark.measured import Skipped
from analysis.benchmark.resamples import BLOCK, Resamples, divide
from analysis.benchmark.subject import Judged
from analysis.classifier import embed_stored_images

NAME = "monosemanticity"
MISSING = (
    "it needs embeddings of the images by another model. Extract the same images with it (same --seed and --limit) and "
    "give the store with --embeddings"
)
VERSION = 1

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ImageEmbeddings:
    """Unit embeddings of the judged images.

    Attributes:
        path: an .npy file [I, 2 E] float32: the embedding, and the centered one.
        chance: [2, n + 1] mean cosine of two images, as they are and centered, on the judged images and each resample.
        facts: where they come from.
    """

    path: Path
    chance: Array
    facts: Mapping[str, object]


def embed_judged(
    other: StoreGroup | None, judged: Judged, folder: Path, *, device: str = "auto", batch_size: int = 64,
    on_progress: Progress | None = None,
) -> ImageEmbeddings | Skipped:  # fmt: skip
    """Embed the judged images, unless `folder` has their embeddings already.

    Args:
        other: the store of `--embeddings`, whose rows are those of the judged store.
        on_progress: called with (images done, in all).

    Returns:
        Why there are none, where no store was given or its model cannot be run.
    """
    if other is None:
        return Skipped(NAME, MISSING)
    about = {"version": VERSION, "stores": [each.store_id for each in other.stores], "images": judged.images.tolist()}
    path = folder / f"embeddings-{digest(about)[:12]}.npy"
    if not path.exists():
        try:
            vision = open_vision_tower(
                other.stores[0].artifact, device=device, precision=str(other.stores[0].artifact.settings["precision"])
            )
            unit = embed_stored_images(
                other, judged.images, vision=vision, batch_size=batch_size, on_progress=on_progress
            )
        except PipelineError as error:
            return Skipped(NAME, f"--embeddings {other.path}: {' '.join(str(error).split())}")
        both = add_centered(unit)
        if both is None:
            return Skipped(NAME, f"--embeddings {other.path}: the model embeds several images alike, as their mean")
        with open_atomic(path) as file:
            np.save(file, both, allow_pickle=False)
    own = other.model_id == judged.store.model_id
    return ImageEmbeddings(
        path, mean_of_all_pairs(path, judged.resamples), {"embeddings": other.path.name, "own_model": own}
    )


def add_centered(unit: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """[I, 2 E]: unit vectors, and beside them the same minus their mean, of unit length; None if one has no length."""
    centered = unit - unit.mean(0, dtype=np.float64)
    length = np.linalg.norm(centered, axis=1, keepdims=True)
    if not (length > 1e-6).all():
        return None
    return np.concatenate([unit, centered / length], axis=1).astype(np.float32)


def mean_of_all_pairs(path: Path, resamples: Resamples) -> Array:
    """[2, n + 1]: the mean cosine of two different images; copies of an image in a resample are the same image."""
    array, counts = np.load(path, mmap_mode="r", allow_pickle=False), count_images(resamples)
    sums, first, second = (
        np.zeros((resamples.n + 1, array.shape[1])),
        np.zeros(resamples.n + 1),
        np.zeros(resamples.n + 1),
    )
    for start in range(0, len(array), BLOCK):
        drawn = counts[start : start + BLOCK].astype(np.float64)
        sums += drawn.T @ array[start : start + BLOCK].astype(np.float64)
        first += drawn.sum(0)
        second += np.square(drawn).sum(0)
    return mean_cosines(sums, first, second)


def mean_cosines(sums: Array, first: Array, second: Array) -> Array:
    """The weighted mean cosine over all pairs of different images, [2, n]: of embeddings as they are, and centered.

        sum_{i != j} b_i b_j cos(e_i, e_j) / sum_{i != j} b_i b_j = (||sum b e||^2 - sum b^2) / ((sum b)^2 - sum b^2)

    It is NaN where fewer than two images have any weight.

    Args:
        sums: [n, 2 E] sum of b_i e_i, for embeddings as they are and centered.
        first: [n] sum of b_i. second: [n] sum of b_i^2.
    """
    halves = sums.reshape(len(sums), 2, -1)
    squared = np.einsum("nce,nce->cn", halves, halves)
    pairs = np.broadcast_to(first**2 - second, squared.shape)
    return divide(squared - second, pairs, pairs > 1e-9 * first**2)


@lru_cache(maxsize=1)
def count_images(resamples: Resamples) -> NDArray[np.uint8]:
    """[I, n + 1]: how often each resample holds each judged image, after a column of ones for the images themselves.

    A latent gathers the rows of its own images, wherever they are, so all are held at once: 0.2 kB for an image, which
    is a twentieth of its embeddings on disk.
    """
    counts = np.ones((resamples.n_images, resamples.n + 1), np.uint8)
    for start in range(0, resamples.n_images, BLOCK):
        stop = min(start + BLOCK, resamples.n_images)
        counts[start:stop, 1:] = resamples.weights(start, stop).T
    counts.setflags(write=False)
    return counts
