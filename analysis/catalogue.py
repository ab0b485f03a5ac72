"""The statistics of pairs: numpy only. The pairs of a shard in, arrays over latents out.

Everything here starts from *pairs* (analysis/pairs.py): a latent and an image it fires on. Sums are of float16
values in float64, hence exact, whatever the order, until they pass 2^29.

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
    """Sums over shards; all arrays are [F]. What is not of CLS is of patches."""

    n_images: int
    n_tokens: int
    n_cls: int
    fired_tokens: NDArray[np.int64]
    fired_images: NDArray[np.int64]
    fired_cls: NDArray[np.int64]
    total: NDArray[np.float64]
    total_cls: NDArray[np.float64]
    maximum_patch: NDArray[np.float32]
    maximum_cls: NDArray[np.float32]

    @property
    def maximum(self) -> NDArray[np.float32]:
        return np.maximum(self.maximum_patch, self.maximum_cls)

    def __add__(self, other: "Totals") -> "Totals":
        def join(name: str, mine: Any, its: Any) -> Any:
            return np.maximum(mine, its) if name.startswith("maximum") else mine + its

        names = [field.name for field in fields(self)]
        return replace(self, **{name: join(name, getattr(self, name), getattr(other, name)) for name in names})


def totals_statistic() -> Statistic:
    """Density, image frequency, mean and maximum come from these."""
    return Statistic(chunk=_totals, combine=_sum, finalize=_identity)


def _totals(codes: CodeStore, number: int, pairs: Pairs) -> Totals:
    images = codes.shard_range(number)
    n_valid = int(codes.valid[images.start : images.stop].sum())

    def add(weights: NDArray[Any]) -> NDArray[Any]:
        return np.bincount(pairs.latent, weights=weights, minlength=codes.n_latents)

    def largest(values: NDArray[np.float32]) -> NDArray[np.float32]:
        maximum = np.zeros(codes.n_latents, dtype=np.float32)
        np.maximum.at(maximum, pairs.latent, values)
        return maximum

    return Totals(
        n_images=n_valid,
        n_tokens=n_valid * tokens_per_image(codes),
        n_cls=0 if codes.tokens == "patch" else n_valid,
        fired_tokens=add(pairs.n_fired).astype(np.int64),
        fired_images=np.bincount(pairs.latent, minlength=codes.n_latents),
        fired_cls=add(pairs.cls_fires).astype(np.int64),
        total=add(pairs.total),
        total_cls=add(pairs.cls),
        maximum_patch=largest(pairs.patch),
        maximum_cls=largest(pairs.cls),
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
    score: NDArray[np.floating[Any]]  # mean over the image's tokens (PatchSAE), or maximum over tokens or patches
    peak: NDArray[np.float32]
    peak_patch: NDArray[np.integer[Any]]

    def rank(self) -> NDArray[np.int64]:
        """[N]: 0 for a latent's strongest image."""
        place = np.arange(len(self.latent))
        new = np.ones(len(place), dtype=np.bool_)
        new[1:] = self.latent[1:] != self.latent[:-1]
        return place - np.maximum.accumulate(np.where(new, place, 0))

    def of(self, latent: int) -> "TopImages":
        start, stop = np.searchsorted(self.latent, [latent, latent + 1])
        return TopImages._make(column[start:stop] for column in self)

    def take(self, rows: NDArray[Any]) -> "TopImages":
        return TopImages._make(column[rows] for column in self)


def top_images_statistic(n_top: int, score: str) -> Statistic:
    """The images a latent fires on most.

    Args:
        score: `mean` over tokens, `max` over tokens, or `patch`: the maximum over patches. The last gives the strongest
            patches of a latent, the best one of each image.
    """
    return Statistic(
        chunk=partial(_top_images, n_top=n_top, score=score),
        combine=partial(_merge_top, n_top=n_top),
        finalize=_identity,
    )


def _top_images(codes: CodeStore, number: int, pairs: Pairs, *, n_top: int, score: str) -> TopImages:
    scores = pairs.patch if score == "patch" else image_scores(pairs, codes, score)
    top = TopImages(pairs.latent, pairs.image, scores, pairs.peak, pairs.peak_patch)
    return _merge_top([top.take(pairs.peak_patch > 0) if score == "patch" else top], n_top=n_top)


def _merge_top(parts: Sequence[TopImages], *, n_top: int) -> TopImages:
    joined = TopImages._make(np.concatenate(column) for column in zip(*parts, strict=True))
    if not len(joined.latent):
        return joined
    if len(parts) > 1:  # each is sorted: what is below the n_top-th of one part is not among the n_top of all
        floor = np.full(int(joined.latent.max()) + 1, -np.inf)
        for part in parts:
            last = np.flatnonzero(part.rank() == n_top - 1)
            floor[part.latent[last]] = np.maximum(floor[part.latent[last]], part.score[last])
        joined = joined.take(joined.score >= floor[joined.latent])
    joined = joined.take(_strongest_first(joined))
    return joined.take(joined.rank() < n_top)


def _strongest_first(top: TopImages) -> NDArray[np.int64]:
    """Order by latent, then score descending, then image: `lexsort`, ten times as fast.

    numpy sorts by vector instructions where order among equals does not matter, and 16-bit integers by digits; equals
    are put right afterwards.
    """
    order = np.argsort(-top.score)
    small = np.uint16 if top.latent.max() < 1 << 16 else np.uint32
    order = order[np.argsort(top.latent[order].astype(small), kind="stable")]
    latent, score = top.latent[order], top.score[order]
    tied = np.zeros(len(order), dtype=np.bool_)
    tied[1:] = (latent[1:] == latent[:-1]) & (score[1:] == score[:-1])
    tied[:-1] |= tied[1:]
    rows = order[tied]
    order[tied] = rows[np.lexsort((top.image[rows], -top.score[rows], top.latent[rows]))]
    return order


# ---------------------------------------------------------------------------------------------------------------------
# Classes


class ClassCounts(NamedTuple):
    """What a latent does on a class, sparse, sorted by label, then latent."""

    label: NDArray[np.integer[Any]]  # [N]
    latent: NDArray[np.integer[Any]]
    n_tokens: NDArray[np.integer[Any]]  # tokens above tau, summed over the class's images: a_c[s], PatchSAE equation 5
    n_images: NDArray[np.integer[Any]]  # images of the class with at least one
    total: NDArray[np.float64]  # sum of activations, above tau or not


def class_counts_statistic(labels: NDArray[np.int32], *, silent: bool = False) -> Statistic:
    """Counts per class of tokens above the tau the reduction was called with; images without a label are left out.

    Args:
        labels: [I], -1 for none.
        silent: keep classes on which a latent has no token above tau.
    """
    return Statistic(
        chunk=partial(_class_counts, labels=labels),
        combine=_merge_counts,
        finalize=_identity if silent else drop_silent,
    )


def drop_silent(counts: ClassCounts) -> ClassCounts:
    """Without the classes on which a latent has no token above tau."""
    return ClassCounts._make(column[counts.n_tokens > 0] for column in counts)


def _class_counts(codes: CodeStore, number: int, pairs: Pairs, *, labels: NDArray[np.int32]) -> ClassCounts:
    label = labels[pairs.image]
    keep = label >= 0
    count = np.uint32 if codes.n_images * codes.n_tokens < 1 << 32 else np.uint64
    above = pairs.n_above[keep].astype(count)
    return _merge_counts(
        [ClassCounts(label[keep], pairs.latent[keep], above, (above > 0).astype(count), pairs.total[keep])]
    )


def _merge_counts(parts: Sequence[ClassCounts]) -> ClassCounts:
    joined = ClassCounts._make(np.concatenate(column) for column in zip(*parts, strict=True))
    if not len(joined.label):
        return joined
    n_latents = int(joined.latent.max()) + 1
    key = joined.label.astype(np.int64) * n_latents + joined.latent
    order = np.argsort(key, kind=None if len(parts) == 1 else "stable")  # merges parts that are sorted
    key = key[order]
    start = np.concatenate([[0], np.flatnonzero(key[1:] != key[:-1]) + 1])
    sums = [np.add.reduceat(column[order], start) for column in (joined.n_tokens, joined.n_images, joined.total)]
    label, latent = (column[order[start]] for column in (joined.label, joined.latent))
    return ClassCounts(label, latent, *sums)


def label_spread(
    latent: NDArray[np.integer[Any]], label: NDArray[np.integer[Any]], mass: NDArray[np.float64], n_latents: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How far a latent's activation spreads over labels, p_c being the share of its summed `mass` on label c.

    Args:
        latent, label, mass: [N] in any order; labels below 0 and masses of 0 are left out.

    Returns:
        (entropy -sum_c p_c ln p_c, PatchSAE 3.2; standard deviation of the label number under p): [F] each; NaN for a
        latent without any mass. Neighboring numbers are related where labels are in WordNet's order.
    """
    keep = (label >= 0) & (mass > 0)
    latent, label, mass = latent[keep].astype(np.int64), label[keep].astype(np.int64), mass[keep]
    entropy, deviation = np.full(n_latents, np.nan), np.full(n_latents, np.nan)
    if not len(latent):
        return entropy, deviation
    n_classes = int(label.max()) + 1
    key, group = np.unique(latent * n_classes + label, return_inverse=True)
    owner, label = np.divmod(key, n_classes)
    summed = np.bincount(group, weights=mass)

    def add(values: NDArray[Any]) -> NDArray[Any]:
        return np.bincount(owner, weights=values, minlength=n_latents)

    share = summed / add(summed)[owner]
    present = np.unique(owner)
    entropy[present] = np.maximum(add(-share * np.log(share))[present], 0.0)  # a single class sums to -0.0
    mean = add(share * label)
    deviation[present] = np.sqrt(add(share * (label - mean[owner]) ** 2))[present]
    return entropy, deviation
