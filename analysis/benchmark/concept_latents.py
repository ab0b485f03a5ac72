"""The latents whose 1-D probes tell best where concepts are: codes of the choosing images in, a probe per concept out.

One pass over the codes, some latents at a time; see logistic.py for what is computed of them.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from analysis.benchmark.logistic import Best, LatentValues, improve
from analysis.benchmark.patch_labels import PatchLabels
from analysis.reduce import cut_latents, split_rows
from saetrain import CodeStore

RANGE_ENTRIES = 1 << 22
"""Entries of the latents that are read together; their keys are 16 MB."""


def choose_latents(
    codes: CodeStore,
    labels: PatchLabels,
    concepts: NDArray[np.int64],
    report: Callable[[int], None] = lambda done: None,
) -> Best:
    """For each concept the latent whose probe has the lowest loss on the labeled images, and the probe.

    Args:
        report: called with the number of latents that are done.
    """
    best = Best.none(len(concepts))
    for latents in cut_latents(codes, RANGE_ENTRIES):
        best = improve(best, gather_values(codes, latents, labels, concepts), latents.start)
        report(latents.stop)
    return best


def gather_values(codes: CodeStore, latents: range, labels: PatchLabels, concepts: NDArray[np.int64]) -> LatentValues:
    """The values of some latents on the labeled patches, and what they have in common with the concepts."""
    slot = number_images(codes, labels)
    column = np.full(len(labels.names), -1)
    column[concepts] = np.arange(len(concepts))
    shape = len(latents), len(concepts)
    n_both, total = np.zeros(shape), np.zeros(shape)
    word: type[np.unsignedinteger] = np.uint32 if len(latents) < 1 << 16 else np.uint64
    keys = []
    for shard in range(codes.n_shards):
        part = codes.read_latents(shard, latents.start, latents.stop)
        image, token = split_rows(part.row, codes.n_tokens)
        keep = (slot[image] >= 0) & (token > 0)
        latent = np.repeat(np.arange(len(latents)), np.diff(part.latent_indptr))[keep]
        bits = part.latent_value[keep].view(np.uint16)
        keys.append(latent.astype(word) << word(16) | bits)
        patch = slot[image[keep]] * labels.n_patches + token[keep] - 1
        first, count = labels.indptr[patch], labels.indptr[patch + 1] - labels.indptr[patch]
        entry = np.repeat(np.arange(len(patch)), count)
        inside = np.arange(len(entry)) - np.repeat(np.cumsum(count) - count, count)
        concept = column[labels.carried[first[entry] + inside]]
        entry, concept = entry[concept >= 0], concept[concept >= 0]
        cell = latent[entry] * shape[1] + concept
        n_both += np.bincount(cell, minlength=n_both.size).reshape(shape)
        value = bits.view(np.float16)[entry].astype(np.float64)
        total += np.bincount(cell, value, minlength=n_both.size).reshape(shape)
    distinct, counts = np.unique(np.concatenate(keys), return_counts=True)
    indptr = np.searchsorted(distinct >> word(16), np.arange(shape[0] + 1))
    return LatentValues(
        indptr, (distinct & word(0xFFFF)).astype(np.uint16), counts, len(labels.images) * labels.n_patches,
        labels.n_positives[concepts], n_both, total,
    )  # fmt: skip


def number_images(codes: CodeStore, labels: PatchLabels) -> NDArray[np.int64]:
    """[I]: the number of each image of the codes among the labeled ones; -1 for all others."""
    slot = np.full(codes.n_images, -1, dtype=np.int64)
    slot[labels.images] = np.arange(len(labels.images))
    return slot
