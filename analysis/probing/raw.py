"""The raw activations that an SAE reads, as features of an image: what its codes could at best tell.

CLS and the mean of the patches, as far as the codes cover them, at the codes' own hook point. They are read as they are
stored, so the model is not needed.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from actcache import PipelineError
from actcache.store import StoreGroup
from analysis.lineage import open_parents
from saetrain import CodeStore

PARTS = {"all": ("cls", "patch"), "patch": ("patch",), "cls": ("cls",)}
BATCH_IMAGES = 64


def find_raw(codes: CodeStore, store: str | None = None) -> StoreGroup | str:
    """The activations that codes were made from, or the reason why they cannot be read.

    Raises what `open_parents` raises, for a store that the caller gave.
    """
    try:
        return open_parents(codes, store)
    except PipelineError:
        if store is not None:
            raise
        return "the activations that the codes were made from are no longer there (give them with --store)"


def read_raw(codes: CodeStore, store: StoreGroup) -> Callable[[NDArray[np.int64]], NDArray[np.float64]]:
    """Reads the features [n, E] float64 of some images."""

    def read(images: NDArray[np.int64]) -> NDArray[np.float64]:
        blocks = []
        for first in range(0, len(images), BATCH_IMAGES):
            part = images[first : first + BATCH_IMAGES]
            read = [
                store.read(codes.hook_point, images=part, tokens=kind, check=store.checks_cheaply)  # type: ignore[arg-type]
                for kind in PARTS[codes.tokens]
            ]
            blocks.append(np.concatenate([each.astype(np.float64).mean(1) for each in read], axis=1))
        return np.concatenate(blocks)

    return read


def name_features(codes: CodeStore) -> str:
    return "+".join(PARTS[codes.tokens])
