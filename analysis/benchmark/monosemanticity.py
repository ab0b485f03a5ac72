"""Measure 6, monosemanticity: are the images on which a latent fires alike, in the eyes of another model?

The score of a latent is the mean cosine of two images' embeddings over all pairs of images, weighted by a_i a_j, where
a is the maximum of the latent over an image's tokens, scaled to 0..1 by its minimum and maximum over the judged images
(Pach et al. 2025, arXiv 2504.02821; `mean_cosines` has the identity that makes it linear in the images).

    monosemanticity            the mean over latents, minus chance
    monosemanticity centered   the same of centered embeddings

Chance is the mean of the same score if the embeddings were dealt to the images at random. Each pair of weights then
meets each pair of embeddings equally often, so it is exactly the mean cosine of two different images, for every latent.

A resample counts image i w_i times, so its weight is b_i = w_i a_i. Copies of an image are one image with this weight,
and no pairs. The sums of b e on all resamples are one product of matrices for each latent, over its own images only. It
is computed in float32, whose error of about 1e-6 lies far below the spread over resamples.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache.progress import Progress
from analysis.benchmark.image_embeddings import NAME, ImageEmbeddings, count_images, mean_cosines
from analysis.benchmark.measured import Measured, Skipped
from analysis.benchmark.resamples import Resamples, divide
from analysis.benchmark.subject import Judged, Subject
from analysis.reduce import cut_latents, find_pairs, fold_pieces, join_columns
from saetrain import CodeStore

NAMES = (NAME, f"{NAME} centered")
LEAST_IMAGES = 10
"""A latent counts if it has as many images; with fewer, a resample may hold no pair of them."""
TASK_LATENTS, TASK_ENTRIES = 64, 1 << 22
GATHERED_IMAGES = 2048
"""Images in one product of matrices, which then stays in the processor's cache."""

Array = NDArray[np.float64]


class ImagePeaks(NamedTuple):
    """What latents give to the judged images on which they fire."""

    latent: NDArray[np.int64]
    place: NDArray[np.int64]  # number of the image among the judged ones
    peak: Array  # maximum over its tokens; after `weigh_images` scaled to 0..1


class LatentScores(NamedTuple):
    """The scores of the latents of a range that have enough images; the first axis is raw, centered."""

    total: Array  # [2, n + 1] their sum on the judged images and on every resample
    count: Array  # [2, n + 1] the latents that have a score there
    scores: Array  # [2, latents] on the judged images


def measure_monosemanticity(
    subject: Subject, judged: Judged, embeddings: ImageEmbeddings | Skipped, on_progress: Progress | None = None
) -> list[Measured | Skipped]:
    """The mean score of the latents above chance, for embeddings as they are and centered.

    Args:
        on_progress: called with (ranges of latents done, in all).
    """
    if isinstance(embeddings, Skipped):
        return [embeddings]
    codes = subject.codes
    function = partial(score_range, path=embeddings.path, images=judged.images, resamples=judged.resamples)
    ranges = cut_latents(codes, TASK_ENTRIES, at_most=TASK_LATENTS)
    found: LatentScores = fold_pieces(codes, function, join_ranges, ranges, on_progress=on_progress)
    n_evaluable = found.scores.shape[1]
    if not n_evaluable:
        reason = f"no latent fires on {LEAST_IMAGES} judged images. Give a store with more images"
        return [Skipped(name, reason) for name in NAMES]
    means = divide(found.total, found.count, found.count > 0)
    measured: list[Measured | Skipped] = []
    for name, mean, chance, scores in zip(NAMES, means, embeddings.chance, found.scores, strict=True):
        excess = mean - chance
        details: dict[str, object] = {
            "mean": float(mean[0]), "chance": float(chance[0]),
            "percentiles": {str(q): float(np.percentile(scores - chance[0], q)) for q in (5, 50, 95)},
            "n_evaluable": n_evaluable, "n_latents": codes.n_latents, "least_images": LEAST_IMAGES, **embeddings.facts,
        }  # fmt: skip
        measured.append(Measured(name, float(excess[0]), excess[1:], True, details))
    return measured


def score_range(
    codes: CodeStore, latents: range, *, path: Path, images: NDArray[np.int64], resamples: Resamples
) -> LatentScores:
    """The scores of a range of latents.

    Args:
        path: the embeddings of the judged images. images: [I] these images, ascending.
    """
    vectors, counts = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False)), count_images(resamples)
    latent, place, active = weigh_images(read_peaks(codes, latents, images), len(images))
    scores = [np.empty((2, 0, resamples.n + 1))]
    for begin, end in pairwise(np.searchsorted(latent, np.arange(len(latents) + 1)).tolist()):
        if end - begin >= LEAST_IMAGES:
            blocks = (slice(at, min(at + GATHERED_IMAGES, end)) for at in range(begin, end, GATHERED_IMAGES))
            parts = [sum_weighted(counts[place[of]], active[of], vectors[place[of]]) for of in blocks]
            scores.append(mean_cosines(*(np.sum(each, axis=0) for each in zip(*parts, strict=True)))[:, None])
    joined = np.concatenate(scores, axis=1)
    joined = joined[:, np.isfinite(joined[:, :, 0]).all(0)]
    there = np.isfinite(joined)
    return LatentScores(
        np.where(there, joined, 0).sum(1), there.sum(1).astype(np.float64), np.ascontiguousarray(joined[:, :, 0])
    )


def sum_weighted(counts: NDArray[np.uint8], active: Array, vectors: NDArray[np.float32]) -> tuple[Array, Array, Array]:
    """(sum b e [n, 2 E], sum b [n], sum b^2 [n]) over images for b = counts * active.

    Args:
        counts: [I, n] for each resample. active: [I]. vectors: [I, 2 E].
    """
    b = counts * active.astype(np.float32)[:, None]
    squares = np.square(counts, dtype=np.float32).T @ np.square(active)
    return (b.T @ vectors).astype(np.float64), counts.T.astype(np.float64) @ active, squares


def weigh_images(peaks: ImagePeaks, n_judged: int) -> ImagePeaks:
    """Peaks scaled to 0..1 by the minimum and maximum of each latent over the judged images; those of weight 0 go.

    The minimum is 0 unless the latent fires on all of them.
    """
    edges = np.flatnonzero(np.diff(peaks.latent, prepend=-1))
    if not len(edges):
        return peaks
    n_fired = np.diff(np.append(edges, len(peaks.latent)))
    low = np.where(n_fired == n_judged, np.minimum.reduceat(peaks.peak, edges), 0.0)
    high = np.maximum.reduceat(peaks.peak, edges)
    low, high = np.repeat(low, n_fired), np.repeat(high, n_fired)
    kept = peaks.peak > low
    return ImagePeaks(peaks.latent[kept], peaks.place[kept], ((peaks.peak - low)[kept]) / (high - low)[kept])


def join_ranges(parts: Sequence[LatentScores]) -> LatentScores:
    return LatentScores(
        np.sum([part.total for part in parts], axis=0), np.sum([part.count for part in parts], axis=0),
        np.concatenate([part.scores for part in parts], axis=1),
    )  # fmt: skip


def read_peaks(codes: CodeStore, latents: range, images: NDArray[np.int64]) -> ImagePeaks:
    """The peaks of a range of latents on the judged images, sorted by latent, then image."""
    parts = [ImagePeaks(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    for shard in range(codes.n_shards):
        stored = codes.shard_range(shard)
        first, last = np.searchsorted(images, (stored.start, stored.stop)).tolist()
        if first == last:
            continue
        place = np.full(len(stored), -1)
        place[images[first:last] - stored.start] = np.arange(first, last)
        pairs = find_pairs(codes.read_latents(shard, latents.start, latents.stop), codes.n_tokens)
        found = place[pairs.image - stored.start]
        kept = found >= 0
        parts.append(ImagePeaks(pairs.latent[kept].astype(np.int64), found[kept], pairs.peak[kept].astype(np.float64)))
    joined = join_columns(parts)
    order = np.argsort(joined.latent, kind="stable")
    return ImagePeaks._make(column[order] for column in joined)
