"""choose_judged(): which images a benchmark judges, and on which others everything is chosen and fitted."""

from collections.abc import Sequence

import numpy as np

from actcache import SettingsError
from actcache.seen import LearnedImages, SeenImages
from actcache.store import StoreGroup, select_images
from analysis.benchmark.resamples import Resamples
from analysis.benchmark.subject import Judged
from analysis.classifier import sample_images
from analysis.config import StudyConfig
from saetrain import Run
from saetrain.lineage import find_seen

LEAST = 2
"""Judged and choosing images; with fewer, nothing has an interval."""


def choose_judged(
    runs: Sequence[Run], store: StoreGroup, config: StudyConfig, learned: Sequence[LearnedImages] = ()
) -> tuple[Judged, SeenImages]:
    """The judged images are those that no run has learned from; the others are for choosing.

    In a store that is new to the runs there are too few others, and half of all images at random become choosing ones.

    Args:
        learned: further images that are not judged.

    Raises:
        SettingsError: no image, or too few, are left to judge.
    """
    wanted = store.valid.copy()
    if config.where is not None:
        wanted &= select_images(store.images, config.where)
        if not wanted.any():
            raise SettingsError(f"--where {config.where!r} holds for no image of {store.path}. Relax the condition.")
    images, counted = find_seen(store, runs, learned).judge(np.flatnonzero(wanted), config, str(store.path))
    others = np.setdiff1d(np.flatnonzero(store.valid), images)
    if len(others) < len(images):
        n_missing = (len(images) + len(others)) // 2 - len(others)
        moved = sample_images(images, n_missing, config.seed) if n_missing else images[:0]
        images, others = np.setdiff1d(images, moved), np.union1d(others, moved)
    images = sample_images(images, config.limit, config.seed)
    if min(len(images), len(others)) < LEAST:
        raise SettingsError(
            f"{store.path} leaves {len(images):,} images to judge and {len(others):,} to choose on; at least {LEAST} "
            "of each are needed. Give a store with more images."
        )
    resamples = Resamples(len(images), seed=config.seed)
    return Judged(store, images, others, resamples, config.seed), counted
