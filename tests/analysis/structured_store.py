"""Activations in which planted directions fire in blobs of the patch grid that belong to the class of an image."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache import ActivationStore
from actcache.importing import import_activations

D, N_PLANTED, SIDE, N_CLASSES = 24, 32, 6, 6


class Structured(NamedTuple):
    """store: a store of [N, P, D] activations without CLS. planted: [N_PLANTED, D] unit directions."""

    store: ActivationStore
    planted: NDArray[np.float32]


def draw_activations(labels: NDArray[np.int64], seed: int, planted: NDArray[np.float32]) -> NDArray[np.float32]:
    """[N, P, D]: each image has blobs of four directions that its class prefers, one of any, and noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.divmod(np.arange(SIDE * SIDE), SIDE)
    x = rng.normal(0, 0.15, (len(labels), SIDE * SIDE, D))
    for image, label in enumerate(labels):
        own = (4 * label + rng.integers(6, size=3)) % N_PLANTED
        for direction in (*own, rng.integers(N_PLANTED)):
            row, column = rng.uniform(0, SIDE, 2)
            blob = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / rng.uniform(1, 6))
            x[image] += rng.uniform(1, 3) * np.where(blob > 0.2, blob, 0)[:, None] * planted[direction]
    return (x + 0.5).astype(np.float32)


def write_structured(folder: Path, n_images: int, *, seed: int = 0, name: str = "x") -> Structured:
    """A store with labels class0, class1, ... in a seeded order."""
    planted = np.random.default_rng(99).normal(size=(N_PLANTED, D))
    planted = (planted / np.linalg.norm(planted, axis=1, keepdims=True)).astype(np.float32)
    labels = np.sort(np.random.default_rng(seed).integers(N_CLASSES, size=n_images))
    for image, label in enumerate(labels):
        file = folder / f"{name}-images" / f"class{label}" / f"{image:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"nobody looks at picture {image} of {seed}")
    np.save(folder / f"{name}.npy", draw_activations(labels, seed, planted))
    store = import_activations(
        folder / f"{name}.npy", folder / f"{name}.acts", images=folder / f"{name}-images", layers=[1], prefix="none",
        model_name="planted", shard_images=64, dtype="float32",
    )  # fmt: skip
    return Structured(store, planted)
