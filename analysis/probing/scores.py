"""The image-level codes, as far as a probe needs them: the ranking of all latents, and the columns of a few.

    F(s) = [sum_c n_c (m_c - m)^2 / (C - 1)] / [sum_c sum_{i in c} (x_i - m_c)^2 / (n - C)]      classes
    r(s) = sum_i (x_i - m)(y_i - my) / sqrt(sum_i (x_i - m)^2 sum_i (y_i - my)^2)                numbers

x_i is the score of the latent on image i (0 where it does not fire), n images, C classes. Both are computed from the
pairs of a range of latents, so nothing dense over images and latents is ever held. One F over all classes, and not one
for each class against the rest, makes k the number of latents of the whole probe.

Source: the one-way analysis of variance; scikit-learn's f_classif gives the same F.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache.progress import Progress
from analysis.reduce import Piece, Statistic, cut_latents, image_scores, join_columns, reduce_latents, reduce_shards
from saetrain import CodeStore

TASK_ENTRIES = 1 << 20
TASK_CELLS = 1 << 22
"""Latents x classes of a task: 34 MB of sums."""
SAME = 1e-12
"""A variance below this share of the mean square is rounding."""


class Ranked(NamedTuple):
    """What is known of all latents.

    Attributes:
        value: [targets, F], F or r.
        n_images: [F], on how many of the images the latent fires.
    """

    value: NDArray[np.float64]
    n_images: NDArray[np.int64]

    def best(self, target: int, k: int) -> NDArray[np.int64]:
        """The k latents with the largest F or |r|, largest first, ties by number; only those that fire."""
        order = np.argsort(-np.abs(self.value[target]), kind="stable")
        return order[self.n_images[order] > 0][:k]


def rank_latents(
    codes: CodeStore, images: NDArray[np.int64], targets: Sequence[NDArray[Any]], n_classes: int | None, score: str,
    on_progress: Progress | None = None,
) -> Ranked:  # fmt: skip
    """F or r of all latents on some images, for several targets at once; one pass over the codes.

    Args:
        images: [n], ascending. targets: each [n], class numbers or numbers.
        n_classes: C; None for numbers.
    """
    ranges = cut_latents(codes, TASK_ENTRIES, at_most=max(1, TASK_CELLS // (n_classes or 1)))
    statistics = {"pairs": Statistic(partial(_find_scores, images=images, score=score), join_columns)}
    finish = partial(_rank_range, targets=tuple(targets), n_classes=n_classes)
    rows = reduce_latents(codes, ranges, statistics, finish, on_progress=on_progress)
    return Ranked(np.concatenate([row.value for row in rows], 1), np.concatenate([row.n_images for row in rows]))


def _find_scores(piece: Piece, *, images: NDArray[np.int64], score: str) -> tuple[NDArray[Any], ...]:
    """(latent within the piece, place of the image in `images`, score) of the pairs of these images."""
    pairs = piece.pairs
    place = np.searchsorted(images, pairs.image).clip(max=len(images) - 1)
    keep = images[place] == pairs.image
    return pairs.latent[keep], place[keep].astype(np.int32), image_scores(pairs, piece.codes, score)[keep]


def _rank_range(
    codes: CodeStore, latents: range, values: Any, *, targets: Sequence[NDArray[Any]], n_classes: int | None
) -> Ranked:
    latent, place, x = values["pairs"]
    n_latents = len(latents)
    n_images = np.bincount(latent, minlength=n_latents)
    if n_classes is None:
        ranked = [_correlate(latent, x, target, target[place], n_latents) for target in targets]
    else:
        ranked = [_compare_classes(latent, x, target, target[place], n_latents, n_classes) for target in targets]
    return Ranked(np.stack(ranked), n_images)


def _compare_classes(
    latent: NDArray[Any], x: NDArray[np.float64], classes: NDArray[np.int64], own: NDArray[np.int64], n_latents: int,
    n_classes: int,
) -> NDArray[np.float64]:  # fmt: skip
    """F of each latent of a range; infinite where it separates the classes exactly, 0 where it is the same everywhere.

    Args:
        classes: of all images. own: of the image of each pair.
    """
    n, sizes = len(classes), np.bincount(classes, minlength=n_classes)
    key = latent.astype(np.int64) * n_classes + own
    sums = np.bincount(key, weights=x, minlength=n_latents * n_classes).reshape(n_latents, n_classes)
    squares = np.bincount(latent, weights=x * x, minlength=n_latents)
    explained = (sums**2 / sizes).sum(1)
    between = np.maximum(explained - sums.sum(1) ** 2 / n, 0.0)
    within = np.where(squares - explained > SAME * squares, squares - explained, 0.0)
    between[between <= SAME * squares] = 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        f = (between / (n_classes - 1)) / (within / (n - n_classes))
    return np.where(between > 0, f, 0.0)


def _correlate(
    latent: NDArray[Any], x: NDArray[np.float64], numbers: NDArray[np.float64], own: NDArray[np.float64], n_latents: int
) -> NDArray[np.float64]:
    """r of each latent of a range; 0 where it is the same everywhere."""
    n, mean = len(numbers), numbers.mean()
    squares = np.bincount(latent, weights=x * x, minlength=n_latents)
    spread = squares - np.bincount(latent, weights=x, minlength=n_latents) ** 2 / n
    products = np.bincount(latent, weights=x * (own - mean), minlength=n_latents)
    scale = np.sqrt(np.maximum(spread, 0.0) * ((numbers - mean) ** 2).sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((spread > SAME * squares) & (scale > 0), products / scale, 0.0)


@dataclass(frozen=True)
class Columns:
    """The scores of a few latents on all images on which they fire, sorted by latent, then image."""

    latent: NDArray[Any]
    image: NDArray[Any]
    score: NDArray[np.float64]

    def dense(self, latents: NDArray[np.int64], images: NDArray[np.int64]) -> NDArray[np.float64]:
        """[n, k] of some images (ascending) and latents."""
        rows = np.zeros((len(images), len(latents)))
        for column, latent in enumerate(latents.tolist()):
            own = slice(*np.searchsorted(self.latent, [latent, latent + 1]))
            place = np.searchsorted(images, self.image[own]).clip(max=len(images) - 1)
            there = images[place] == self.image[own]
            rows[place[there], column] = self.score[own][there]
        return rows


def read_columns(
    codes: CodeStore, latents: NDArray[np.int64], score: str, on_progress: Progress | None = None
) -> Columns:
    """The columns of some latents; one pass over the codes."""
    wanted = np.zeros(codes.n_latents, dtype=bool)
    wanted[latents] = True
    statistics = {"pairs": Statistic(partial(_keep_latents, wanted=wanted, score=score), join_columns)}
    latent, image, x = reduce_shards(codes, statistics, on_progress=on_progress)["pairs"]
    order = np.argsort(latent, kind="stable")  # the images ascend already
    return Columns(latent[order], image[order], x[order])


def _keep_latents(piece: Piece, *, wanted: NDArray[np.bool_], score: str) -> tuple[NDArray[Any], ...]:
    pairs = piece.pairs
    keep = wanted[pairs.latent]
    return pairs.latent[keep], pairs.image[keep], image_scores(pairs, piece.codes, score)[keep]
