"""choose_judged(): which images a benchmark judges, and on which others everything is chosen and fitted."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from actcache import SettingsError
from actcache.seen import LearnedImages, SeenImages
from actcache.store import StoreGroup, select_images
from analysis.benchmark.image_pairs import ImagePairs
from analysis.benchmark.resamples import Resamples
from analysis.benchmark.subject import Judged
from analysis.classifier import sample_images
from analysis.config import StudyConfig
from saetrain import Run
from saetrain.lineage import find_seen

LEAST = 2
"""Judged and choosing images; with fewer, nothing has an interval."""


def choose_judged(
    runs: Sequence[Run], store: StoreGroup, config: StudyConfig, pairs: ImagePairs | None = None,
    learned: Sequence[LearnedImages] = (),
) -> tuple[Judged, SeenImages]:  # fmt: skip
    """The judged images are those that no run has learned from; the others are for choosing.

    In a store that is new to the runs there are too few others, and half of all images at random become choosing ones.

    Args:
        pairs: images that are judged in pairs. They become choosing ones last, and both of a pair together.
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
        moved = _choose_moved(images, n_missing, config.seed, pairs)
        images, others = np.setdiff1d(images, moved), np.union1d(others, moved)
    unsampled = images
    images = sample_images(images, config.limit, config.seed)
    if min(len(images), len(others)) < LEAST:
        raise SettingsError(
            f"{store.path} leaves {len(images):,} images to judge and {len(others):,} to choose on; at least {LEAST} "
            "of each are needed. Give a store with more images."
        )
    resamples = Resamples(len(images), seed=config.seed)
    return Judged(store, images, others, resamples, config.seed, unsampled), counted


def _choose_moved(images: NDArray[np.int64], n_missing: int, seed: int, pairs: ImagePairs | None) -> NDArray[np.int64]:
    """`n_missing` images at random, or a few more where pairs have to stay together; not in order."""
    if not n_missing:
        return images[:0]
    if pairs is None:
        return sample_images(images, n_missing, seed)
    free = np.setdiff1d(images, np.concatenate([pairs.before, pairs.after]))
    if n_missing <= len(free):
        return sample_images(free, n_missing, seed)
    group = np.full(images.max() + 1, -1)
    for side in (pairs.before, pairs.after):
        inside = np.isin(side, images)
        group[side[inside]] = pairs.group[inside]
    paired = np.setdiff1d(images, free)
    rank = np.random.Generator(np.random.Philox(seed)).permutation(pairs.group.max() + 1)[group[paired]]
    ranked = np.sort(rank)
    return np.concatenate([free, paired[rank <= ranked[n_missing - len(free) - 1]]])
