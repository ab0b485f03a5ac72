"""PatchLabels: which patches of some images carry which concept, from pixel masks.

In: the masks as `localize` reads them. Out: only the patches that a concept touches, so memory does not grow with the
number of concepts. A patch carries a concept, and may carry several, where the concept covers at least half of it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache import PipelineError
from actcache.progress import Progress
from analysis.benchmark.measured import Skipped
from analysis.benchmark.subject import Judged
from analysis.classifier import sample_images
from analysis.config import BenchmarkConfig
from analysis.localization import PixelMasks, read_masks
from saetrain import CodeStore

COVERED = 0.5
"""The share of a patch's pixels from which on it carries a concept."""
N_CHOOSING = 10_000
"""Choosing images whose masks are read at most; these are 0.5 GB at 224 x 224 pixels."""
BLOCK_IMAGES = 64


@dataclass(frozen=True)
class PatchLabels:
    """The concepts on the patches of M images, as n touched (patch, concept) pairs in the order of the patches.

    Attributes:
        names: the C concepts.
        images: [M] stored positions, ascending.
        n_patches: P, of an image. Patch number image * P + raster position, with the number of the image in `images`.
        patch, concept: [n] of each pair.
        share: [n] of the patch's pixels that carry the concept, above 0.
        center: [n] whether the pixel in the middle of the patch does.
    """

    names: tuple[str, ...]
    images: NDArray[np.int64]
    n_patches: int
    patch: NDArray[np.int64]
    concept: NDArray[np.int32]
    share: NDArray[np.float32]
    center: NDArray[np.bool_]

    @cached_property
    def indptr(self) -> NDArray[np.int64]:
        """[M * P + 1]: where the pairs of each patch begin in `carried`."""
        counts = np.bincount(self.patch[self.share >= COVERED], minlength=len(self.images) * self.n_patches)
        return np.concatenate([[0], np.cumsum(counts)])

    @cached_property
    def carried(self) -> NDArray[np.int32]:
        """The concepts that patches carry, patch by patch."""
        return self.concept[self.share >= COVERED]

    @cached_property
    def n_positives(self) -> NDArray[np.int64]:
        """[C]: patches that carry each concept."""
        return np.bincount(self.carried, minlength=len(self.names))

    @cached_property
    def _by_concept(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        order = np.argsort(self.concept, kind="stable")
        return order, np.searchsorted(self.concept[order], np.arange(len(self.names) + 1))

    def touched_images(self, concept: int) -> NDArray[np.int64]:
        """Stored positions of the images that show a concept."""
        order, edges = self._by_concept
        mine = order[edges[concept] : edges[concept + 1]]
        return self.images[np.unique(self.patch[mine] // self.n_patches)]

    def spread(self, concept: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """(share, center) [M, P] of one concept on all patches."""
        order, edges = self._by_concept
        mine = order[edges[concept] : edges[concept + 1]]
        share = np.zeros(len(self.images) * self.n_patches, dtype=np.float32)
        center = np.zeros(len(share), dtype=bool)
        share[self.patch[mine]], center[self.patch[mine]] = self.share[mine], self.center[mine]
        return share.reshape(len(self.images), -1), center.reshape(len(self.images), -1)


@dataclass(frozen=True)
class LabeledPatches:
    """Labels of the choosing and of the judged images, and the concepts that can be measured.

    Attributes:
        places: [M] number of each image of `judged` among the judged images.
        concepts: [K] those that some patches carry and others do not, among the choosing and among the judged images.
        left_out: the names of all others.
    """

    choosing: PatchLabels
    judged: PatchLabels
    places: NDArray[np.int64]
    concepts: NDArray[np.int64]
    left_out: tuple[str, ...]


def read_patch_labels(
    codes: CodeStore, judged: Judged, config: BenchmarkConfig, name: str, on_progress: Progress | None = None
) -> LabeledPatches | Skipped:
    """Read the masks, or say why there are none.

    Args:
        codes: of any of the subjects.
        name: the measure that is skipped without them.
    """
    choosing = sample_images(judged.choosing, N_CHOOSING, judged.seed)
    try:
        masks = read_masks(
            codes, masks=config.masks, legend=config.legend, within=np.union1d(choosing, judged.images),
            on_progress=on_progress,
        )  # fmt: skip
    except PipelineError as error:
        return Skipped(name, " ".join(str(error).split()))
    halves = []
    for images, what in ((choosing, "to choose latents on"), (judged.images, "to judge")):
        which = np.flatnonzero(np.isin(masks.images, images))
        if not len(which):
            return Skipped(name, f"none of the images {what} has a mask; give the masks of more images")
        halves.append(label_patches(masks.take(which), codes.grid))
    some = np.logical_and.reduce(
        [(half.n_positives > 0) & (half.n_positives < len(half.images) * half.n_patches) for half in halves]
    )
    if not some.any():
        return Skipped(
            name,
            f"none of the {len(masks.names):,} concepts covers half of a patch, but not all patches, both among the "
            "images to choose latents on and among those to judge; give masks of more images",
        )
    left_out = tuple(concept for concept, kept in zip(masks.names, some, strict=True) if not kept)
    places = np.searchsorted(judged.images, halves[1].images)
    return LabeledPatches(halves[0], halves[1], places, np.flatnonzero(some), left_out)


def label_patches(masks: PixelMasks, grid: tuple[int, int]) -> PatchLabels:
    """What the masks say of each patch, some images at a time."""
    n_patches = grid[0] * grid[1]
    columns: list[list[NDArray[Any]]] = [[], [], [], []]
    for first in range(0, len(masks.images), BLOCK_IMAGES):
        block = masks.take(np.arange(first, min(first + BLOCK_IMAGES, len(masks.images))))
        coverage, centers = block.coverage(grid), block.centers(grid)
        where = np.nonzero(coverage)
        place = (first + where[0]) * n_patches + where[1]
        found = place, where[2].astype(np.int32), coverage[where], centers[where]
        for column, part in zip(columns, found, strict=True):
            column.append(part)
    patch, concept, share, center = (np.concatenate(column) for column in columns)
    return PatchLabels(masks.names, masks.images, n_patches, patch, concept, share, center)
