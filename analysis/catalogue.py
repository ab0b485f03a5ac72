"""The statistics themselves: numpy only. The pairs of a shard in, arrays over latents out.

Everything starts from *pairs* (analysis/pairs.py): a latent and an image it fires on.

Source: PatchSAE (arXiv 2412.05276) section 3.2 for frequency, mean and entropy, equations 4-5 for class counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.pairs import Pairs, image_scores, tokens_per_image
from analysis.reduction import Statistic
from saetrain import CodeStore

# ---------------------------------------------------------------------------------------------------------------------
# Totals: counts, sums and maxima a latent


@dataclass(frozen=True)
class Totals:
    """Sums over shards; all arrays are [F]."""

    n_images: int
    n_tokens: int
    fired_tokens: NDArray[np.int64]
    fired_images: NDArray[np.int64]
    total: NDArray[np.float64]
    maximum: NDArray[np.float32]

    def __add__(self, other: "Totals") -> "Totals":
        summed = {
            field.name: getattr(self, field.name) + getattr(other, field.name)
            for field in fields(self)
            if field.name != "maximum"
        }
        return replace(self, **summed, maximum=np.maximum(self.maximum, other.maximum))


def totals_statistic() -> Statistic:
    """Density, image frequency, mean and maximum come from these."""
    return Statistic(chunk=_totals, combine=_sum, finalize=_identity)


def _totals(codes: CodeStore, number: int, pairs: Pairs) -> Totals:
    images = codes.shard_range(number)
    n_latents = codes.n_latents
    n_valid = int(codes.valid[images.start : images.stop].sum())
    maximum = np.zeros(n_latents, dtype=np.float32)
    np.maximum.at(maximum, pairs.latent, pairs.peak)
    return Totals(
        n_images=n_valid,
        n_tokens=n_valid * tokens_per_image(codes),
        fired_tokens=np.bincount(pairs.latent, weights=pairs.n_fired, minlength=n_latents).astype(np.int64),
        fired_images=np.bincount(pairs.latent, minlength=n_latents),
        total=np.bincount(pairs.latent, weights=pairs.total, minlength=n_latents).astype(np.float64),
        maximum=maximum,
    )


def _sum(parts: Sequence[Any]) -> Any:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _identity(value: Any) -> Any:
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Top images a latent


class TopImages(NamedTuple):
    """The images a latent fires on most, sorted by latent, then score descending, then image ascending."""

    latent: NDArray[np.integer[Any]]  # [N]
    image: NDArray[np.integer[Any]]
    score: NDArray[np.float64]  # mean over the image's tokens (PatchSAE), or maximum
    peak: NDArray[np.float32]
    peak_patch: NDArray[np.integer[Any]]

    def rank(self) -> NDArray[np.integer[Any]]:
        """[N]: 0 for a latent's strongest image."""
        first = np.searchsorted(self.latent, self.latent, side="left")
        return np.arange(len(self.latent)) - first

    def of(self, latent: int) -> "TopImages":
        start, stop = np.searchsorted(self.latent, [latent, latent + 1])
        return TopImages._make(column[start:stop] for column in self)


def top_images_statistic(n_top: int, score: str) -> Statistic:
    return Statistic(
        chunk=partial(_top_images, n_top=n_top, score=score),
        combine=partial(_merge_top, n_top=n_top),
        finalize=_identity,
    )


def _top_images(codes: CodeStore, number: int, pairs: Pairs, *, n_top: int, score: str) -> TopImages:
    top = TopImages(pairs.latent, pairs.image, image_scores(pairs, codes, score), pairs.peak, pairs.peak_patch)
    return _merge_top([top], n_top=n_top)


def _merge_top(parts: Sequence[TopImages], *, n_top: int) -> TopImages:
    joined = TopImages._make(np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((joined.image, -joined.score, joined.latent))
    joined = TopImages._make(column[order] for column in joined)
    keep = joined.rank() < n_top
    return TopImages._make(column[keep] for column in joined)


# ---------------------------------------------------------------------------------------------------------------------
# Class x latent counts


class ClassCounts(NamedTuple):
    """a_c[s] of PatchSAE equation 5, sparse, sorted by label, then latent."""

    label: NDArray[np.integer[Any]]  # [N]
    latent: NDArray[np.integer[Any]]
    n_tokens: NDArray[np.integer[Any]]  # tokens above tau, summed over the class's images
    n_images: NDArray[np.integer[Any]]  # images of the class with at least one


def class_counts_statistic(labels: NDArray[np.int32]) -> Statistic:
    """Counts per class of tokens above the tau the reduction was called with; images without a label are left out.

    Args:
        labels: [I], -1 for none.
    """
    return Statistic(chunk=partial(_class_counts, labels=labels), combine=_merge_counts, finalize=_identity)


def _class_counts(codes: CodeStore, number: int, pairs: Pairs, *, labels: NDArray[np.int32]) -> ClassCounts:
    label = labels[pairs.image].astype(np.int64)
    keep = (label >= 0) & (pairs.n_above > 0)
    ones = np.ones(int(keep.sum()), dtype=np.int64)
    return _merge_counts([ClassCounts(label[keep], pairs.latent[keep], pairs.n_above[keep], ones)])


def _merge_counts(parts: Sequence[ClassCounts]) -> ClassCounts:
    joined = ClassCounts._make(np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((joined.latent, joined.label))
    label, latent = joined.label[order], joined.latent[order]
    if not len(label):
        return joined
    start = np.concatenate([[0], np.flatnonzero((np.diff(label) != 0) | (np.diff(latent) != 0)) + 1])
    return ClassCounts(
        label[start],
        latent[start],
        np.add.reduceat(joined.n_tokens[order], start),
        np.add.reduceat(joined.n_images[order], start),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Label entropy


def label_entropy(top: TopImages, labels: NDArray[np.int32], n_latents: int) -> NDArray[np.float64]:
    """H = -sum_c p_c ln p_c over each latent's top images, p_c its share of their summed score (PatchSAE 3.2).

    Returns:
        [F]; NaN for a latent that fires on no labeled image.
    """
    label = labels[top.image].astype(np.int64)
    keep = (label >= 0) & (top.score > 0)
    latent, label, score = top.latent[keep], label[keep], top.score[keep]
    entropy = np.full(n_latents, np.nan)
    if not len(latent):
        return entropy
    n_classes = int(label.max()) + 1
    key, group = np.unique(latent * n_classes + label, return_inverse=True)
    mass = np.bincount(group, weights=score)
    owner = key // n_classes
    total = np.bincount(owner, weights=mass, minlength=n_latents)
    share = mass / total[owner]
    present = np.unique(owner)
    entropy[present] = np.bincount(owner, weights=-share * np.log(share), minlength=n_latents)[present]
    entropy[entropy < 0] = 0.0  # a single class sums to -0.0
    return entropy
