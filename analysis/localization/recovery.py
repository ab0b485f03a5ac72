"""Which known concepts did the SAE find? Codes of images with ground truth in, the best latent per concept out.

For each concept, the latent with the best AUROC and a threshold for its heat map are chosen on one set of images and
judged on another. numpy only.

AUROC: an image is scored by the latent's maximum over its patches, against the presence of the concept.
IoU: see scores.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.localization.scores import N_MASKS, choose_threshold, mean_iou
from saetrain import CodeStore

MaskReader = Callable[[NDArray[np.int64], int], NDArray[np.bool_]]


@dataclass(frozen=True)
class Labeled:
    """Codes of images whose content is known, in stored order.

    Attributes:
        present: [I, C].
        masks: (stored positions [n], concept) -> pixels [n, H, W].
    """

    codes: CodeStore
    present: NDArray[np.bool_]
    masks: MaskReader


@dataclass(frozen=True)
class Recovered:
    """One concept's latent, chosen on one set of images and judged on another."""

    concept: str
    latent: int
    auroc: float
    iou: float
    chosen_auroc: float  # on the choosing images


def recover_concepts(names: tuple[str, ...], choose: Labeled, judge: Labeled) -> list[Recovered]:
    """The best latent of each concept, and its scores on images that took no part in choosing it."""
    chosen = auroc_table(patch_scores(choose.codes), choose.present)
    judged = auroc_table(patch_scores(judge.codes), judge.present)
    recovered = []
    for concept, name in enumerate(names):
        latent = int(np.nanargmax(chosen[:, concept]))
        images = np.flatnonzero(choose.present[:, concept])[:N_MASKS]
        threshold = choose_threshold(choose.codes, latent, images, choose.masks(images, concept))
        images = np.flatnonzero(judge.present[:, concept])
        iou = mean_iou(judge.codes, latent, images, judge.masks(images, concept), threshold)
        recovered.append(Recovered(name, latent, float(judged[latent, concept]), iou, float(chosen[latent, concept])))
    return recovered


def patch_scores(codes: CodeStore) -> NDArray[np.float32]:
    """Maximum over patches of each latent on each image, dense [F, I], so for small labeled sets only."""
    scores = np.zeros((codes.n_latents, codes.n_images), dtype=np.float32)
    for number in range(codes.n_shards):
        shard = codes.read_shard(number)
        latent = np.repeat(np.arange(codes.n_latents), np.diff(shard.latent_indptr))
        image, token = np.divmod(shard.row.astype(np.int64), codes.n_tokens)
        patch = token > 0
        np.maximum.at(scores, (latent[patch], image[patch]), shard.latent_value[patch].astype(np.float32))
    return scores


def auroc_table(scores: NDArray[np.float32], present: NDArray[np.bool_]) -> NDArray[np.float64]:
    """AUROC of every row of scores [F, I] against every concept [I, C]: [F, C]; ties count half.

    U / (n_pos n_neg) with U from average ranks (Mann-Whitney). NaN for a concept that is in all images or in none.
    """
    n_images = scores.shape[1]
    positives = present.sum(0).astype(np.float64)
    ranks = np.stack([_average_ranks(row) for row in scores])
    u = ranks @ present.astype(np.float64) - positives * (positives + 1) / 2
    pairs = positives * (n_images - positives)
    return np.asarray(np.where(pairs > 0, u / np.maximum(pairs, 1), np.nan))


def _average_ranks(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """1-based ranks; equal values share their mean rank."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[group]
