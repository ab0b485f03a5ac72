"""The statistics of pairs. In: the pairs of a piece. Out: arrays over its latents. numpy only.

Everything here starts from *pairs* (analysis/reduce/pairs.py): a latent and an image on which it fires. Values are
float16 and are summed in float64, so sums below 2^29 are exact in any order. A partial result may hold the pairs
themselves until they outnumber the cells into which they are counted: then one count serves many shards.

Source: PatchSAE (arXiv 2412.05276) section 3.2 for frequency, mean and entropy, equations 4-5 for class counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.reduce import Piece, Statistic, image_scores, join_columns, tokens_per_image

# ---------------------------------------------------------------------------------------------------------------------
# Totals: counts, sums and maxima of each latent


@dataclass(frozen=True)
class Totals:
    """Sums over shards; all arrays are [F]. Every token that is not CLS is a patch."""

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
        def join(name: str) -> Any:
            values = getattr(self, name), getattr(other, name)
            return np.maximum(*values) if name.startswith("maximum") else values[0] + values[1]

        return Totals(**{field.name: join(field.name) for field in fields(self)})


def totals_statistic() -> Statistic:
    """The totals from which density, image frequency, mean and maximum are computed."""
    return Statistic(chunk=_totals, combine=_sum)


def _totals(piece: Piece) -> Totals:
    codes, pairs, n_latents = piece.codes, piece.pairs, len(piece.latents)
    images = codes.shard_range(piece.shard)
    n_valid = int(codes.valid[images.start : images.stop].sum())
    n_images = np.bincount(pairs.latent, minlength=n_latents)
    fires = n_images > 0
    first = (np.cumsum(n_images) - n_images)[fires]  # the first pair of each latent

    def fold(by: np.ufunc, column: NDArray[Any], dtype: Any) -> NDArray[Any]:
        out = np.zeros(n_latents, dtype)
        if len(first):
            out[fires] = by.reduceat(column, first, dtype=dtype)
        return out

    return Totals(
        n_images=n_valid,
        n_tokens=n_valid * tokens_per_image(codes),
        n_cls=0 if codes.tokens == "patch" else n_valid,
        fired_tokens=np.diff(piece.entries.latent_indptr),
        fired_images=n_images,
        fired_cls=fold(np.add, pairs.cls_fires, np.int64),
        total=fold(np.add, pairs.total, np.float64),
        total_cls=fold(np.add, pairs.cls, np.float64),
        maximum_patch=fold(np.maximum, pairs.patch, np.float32),
        maximum_cls=fold(np.maximum, pairs.cls, np.float32),
    )


def _sum(parts: Sequence[Any]) -> Any:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Top images of each latent


class TopImages(NamedTuple):
    """The images on which each latent fires most, sorted by latent, then score descending, then image ascending."""

    latent: NDArray[np.integer[Any]]  # [N]
    image: NDArray[np.integer[Any]]
    score: NDArray[np.floating[Any]]  # mean over the image's tokens (PatchSAE), or maximum over tokens or patches
    peak: NDArray[np.float32]
    peak_patch: NDArray[np.integer[Any]]

    def rank(self) -> NDArray[np.int64]:
        """[N]: 0 for a latent's strongest image, then 1, 2, ..."""
        place = np.arange(len(self.latent))
        new = np.ones(len(place), dtype=np.bool_)
        new[1:] = self.latent[1:] != self.latent[:-1]
        return place - np.maximum.accumulate(np.where(new, place, 0))

    def take(self, rows: NDArray[Any]) -> "TopImages":
        return TopImages._make(column[rows] for column in self)


def top_images_statistic(n_top: int, score: str) -> Statistic:
    """The images on which each latent fires most.

    Args:
        score: `mean` over tokens, `max` over tokens, or `patch`, the maximum over patches, which gives the strongest
            patches of a latent, one per image.
    """
    return Statistic(partial(_top_images, score=score), partial(_merge_top, n_top=n_top))


def _top_images(piece: Piece, *, score: str) -> TopImages:
    pairs = piece.pairs
    scores = pairs.patch if score == "patch" else image_scores(pairs, piece.codes, score)
    top = TopImages(pairs.latent, pairs.image, scores, pairs.peak, pairs.peak_patch)
    if score == "patch" and (pairs.peak_patch < 0).any():
        top = top.take(pairs.peak_patch > 0)
    return top


def _merge_top(parts: Sequence[TopImages], *, n_top: int) -> TopImages:
    """The top `n_top` of each latent. Parts are sorted by latent; its images may be in any order."""
    n_latents = 1 + max((int(part.latent[-1]) for part in parts if len(part.latent)), default=-1)
    floor = np.full(n_latents, -np.inf)
    for part in parts:  # if a part has exactly n_top images of a latent, no weaker image can be among the top
        count = np.bincount(part.latent, minlength=n_latents)
        full = count == n_top
        if full.any():
            least = np.minimum.reduceat(part.score, (np.cumsum(count) - count)[count > 0])
            floor[full] = np.maximum(floor[full], least[full[count > 0]])
    if np.isfinite(floor).any():
        parts = [part.take(np.flatnonzero(part.score >= floor[part.latent])) for part in parts]
    joined = join_columns(parts)
    if not len(joined.latent):
        return joined
    joined = joined.take(strongest_first(joined.latent, joined.score, joined.image))
    return joined.take(joined.rank() < n_top)


def strongest_first(
    latent: NDArray[np.integer[Any]], score: NDArray[np.floating[Any]], image: NDArray[np.integer[Any]]
) -> NDArray[np.int64]:
    """The order by latent, then score descending, then image (below 2^32): as `lexsort`, but ten times as fast.

    numpy sorts by vector instructions when the order of ties does not matter, and sorts 16-bit integers by digits; ties
    are put in order afterwards.
    """
    order = np.argsort(-score)
    small = np.uint16 if latent.max(initial=0) < 1 << 16 else np.uint32
    order = order[np.argsort(latent[order].astype(small), kind="stable")]
    latent, score = latent[order], score[order]
    new = np.ones(len(order), dtype=np.bool_)
    new[1:] = (latent[1:] != latent[:-1]) | (score[1:] != score[:-1])
    tied = np.flatnonzero(~(new & np.append(new[1:], True)))
    rows, group = order[tied], np.cumsum(new)[tied].astype(np.uint64)
    order[tied] = rows[np.argsort((group << np.uint64(32)) | image[rows].astype(np.uint64))]
    return order


# ---------------------------------------------------------------------------------------------------------------------
# Classes


class ClassRows(NamedTuple):
    """Rows of (latent, class) that are still to be added up; a pair may have several rows."""

    latent: NDArray[np.integer[Any]]  # [N]
    label: NDArray[np.integer[Any]]  # index in `present_labels`
    n_above: NDArray[np.integer[Any]]  # tokens of one image above tau
    total: NDArray[np.float64]


class ClassCounts(NamedTuple):
    """What each latent does on each class; all arrays are [F, C]."""

    n_tokens: NDArray[np.unsignedinteger[Any]]  # above tau, over the class's images: a_c[s], PatchSAE equation 5
    n_images: NDArray[np.unsignedinteger[Any]]  # images of the class with at least one such token
    total: NDArray[np.float64]  # sum of activations, above tau or not


CLASS_BYTES = 16
"""Bytes of ClassCounts for one latent and class."""

SPREAD_CELLS = 1 << 17
"""How many cells (latents x classes) are processed at a time, so that they stay in the processor's cache."""


@dataclass(frozen=True)
class _Classes:
    """A partial result: the counts of many pieces, and rows that are not counted yet."""

    n_latents: int
    rows: tuple[ClassRows, ...]
    counts: ClassCounts | None = None

    @property
    def n_rows(self) -> int:
        return sum(len(part.label) for part in self.rows)


def class_counts_statistic(labels: NDArray[np.int32]) -> Statistic:
    """Counts per class of the tokens above the reduction's tau. Images without a label are left out.

    Args:
        labels: [I], -1 for no label. Classes are numbered as in `present_labels`.
    """
    place, n_classes = place_labels(labels), len(present_labels(labels))
    return Statistic(
        chunk=partial(_class_rows, place=place),
        combine=partial(_merge_classes, n_classes=n_classes),
        finalize=partial(_count_classes, n_classes=n_classes),
    )


def place_labels(labels: NDArray[np.int32]) -> NDArray[np.int32]:
    """[I]: the index of each image's label in `present_labels`; -1 for an image without a label."""
    return np.where(labels < 0, -1, np.searchsorted(present_labels(labels), labels)).astype(np.int32)


def present_labels(labels: NDArray[np.int32]) -> NDArray[np.int32]:
    """[C]: the labels that occur among the images, ascending."""
    return np.unique(labels[labels >= 0])


def _class_rows(piece: Piece, *, place: NDArray[np.int32]) -> _Classes:
    pairs = piece.pairs
    rows = ClassRows(pairs.latent, place[pairs.image], pairs.n_above, pairs.total)
    labeled = rows.label >= 0
    if not labeled.all():
        rows = ClassRows._make(column[labeled] for column in rows)
    return _Classes(len(piece.latents), (rows,))


def _merge_classes(parts: Sequence[_Classes], *, n_classes: int) -> _Classes:
    n_latents = parts[0].n_latents
    counted = [part.counts for part in parts if part.counts is not None]
    joined = _Classes(n_latents, sum((part.rows for part in parts), ()), _add_classes(counted) if counted else None)
    if 2 * joined.n_rows < n_latents * n_classes:
        return joined
    return _Classes(n_latents, (), _count_classes(joined, n_classes=n_classes))


def _count_classes(part: _Classes, *, n_classes: int) -> ClassCounts:
    """Add all rows to the counts. This happens at the latest when all pieces have been seen."""
    shape = (part.n_latents, n_classes)
    if not part.n_rows:
        empty = ClassCounts(np.zeros(shape, np.uint32), np.zeros(shape, np.uint32), np.zeros(shape))
        return part.counts or empty
    latent, label, n_above, total = join_columns(part.rows)
    key = latent.astype(np.int64) * n_classes + label
    n_cells = part.n_latents * n_classes
    n_tokens = np.bincount(key, n_above, n_cells)
    small: Any = np.uint32 if n_tokens.max() < 1 << 32 else np.uint64
    summed: NDArray[Any] = np.bincount(key, total, n_cells)
    counts = ClassCounts(
        n_tokens=n_tokens.astype(small).reshape(shape),
        n_images=np.bincount(key[n_above > 0], minlength=n_cells).astype(np.uint32).reshape(shape),
        total=summed.reshape(shape),
    )
    return counts if part.counts is None else _add_classes([part.counts, counts])


def _add_classes(parts: Sequence[ClassCounts]) -> ClassCounts:
    most = sum(int(part.n_tokens.max(initial=0)) for part in parts)
    return ClassCounts(
        n_tokens=_sum([part.n_tokens.astype(np.uint32 if most < 1 << 32 else np.uint64, copy=False) for part in parts]),
        n_images=_sum([part.n_images for part in parts]),
        total=_sum([part.total for part in parts]),
    )


def label_spread(
    mass: NDArray[np.float64], labels: NDArray[np.integer[Any]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How widely a latent's activation spreads over labels, where p_c is the share of its summed `mass` on label c.

    Args:
        mass: [F, C], not negative.
        labels: [C] the numbers of the labels.

    Returns:
        (entropy -sum_c p_c ln p_c, PatchSAE 3.2; standard deviation of the label number under p): [F] each; NaN for a
        latent without any mass. The deviation has a meaning if neighboring numbers are related, as in WordNet's order.
    """
    step = max(1, SPREAD_CELLS // max(1, len(labels)))
    parts = [_spread(mass[row : row + step], labels.astype(np.float64)) for row in range(0, len(mass), step)]
    return join_columns(parts)


def _spread(mass: NDArray[np.float64], labels: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    total = mass.sum(axis=1)
    present = total > 0
    share = mass / np.where(present, total, 1.0)[:, None]
    mean = np.einsum("fc,c->f", share, labels)  # unlike BLAS, this gives the same bits for any number of rows
    deviation = np.sqrt(np.einsum("fc,fc->f", share, (labels - mean[:, None]) ** 2))
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    entropy = np.maximum(-np.einsum("fc,fc->f", share, logs), 0.0)  # a single class would give -0.0
    return np.where(present, entropy, np.nan), np.where(present, deviation, np.nan)
