"""Measure 7, spatial coherence: do the patches on which a latent fires lie next to each other?

What is reported is Moran's I (`morans.py`) in excess of its expectation on random patches, as the mean over the images
of each latent and then over latents. The variance of I under permutations gives how many latents exceed the 97.5 %
point of their own null.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache.progress import Progress
from analysis.benchmark.measured import Measured, Skipped
from analysis.benchmark.morans import LEAST_IMAGES, LEAST_PATCHES, Array, Grid, Morans, find_morans
from analysis.benchmark.resamples import Resamples, divide
from analysis.benchmark.subject import Judged, Subject
from analysis.intervals import Z
from analysis.reduce import cut_latents, fold_pieces
from saetrain import CodeStore

NAME = "spatial coherence"
TASK_LATENTS, TASK_ENTRIES = 1024, 1 << 22
SPAN_IMAGES = 1024
"""Images whose pairs are held at a time, in an array of [latents of a task, images]."""


class Coherences(NamedTuple):
    """The latents of a range that have enough images, and their sum on the judged images and on every resample."""

    total: Array  # [n + 1] sum over latents of their mean I
    n_there: Array  # [n + 1] the latents that have an image there
    mean: Array  # [latents] mean I over the judged images
    deviation: Array  # [latents] standard deviation of this mean under the null
    n_pairs: int


def measure_coherence(
    subject: Subject, judged: Judged, on_progress: Progress | None = None
) -> list[Measured | Skipped]:
    """The mean of Moran's I over images and latents, above what random places give.

    Args:
        on_progress: called with (ranges of latents done, in all).
    """
    codes, grid = subject.codes, Grid(*subject.codes.grid)
    if codes.tokens == "cls":
        return [Skipped(NAME, "it needs codes of patches, but the runs were trained on CLS. Train one on --tokens all")]
    if grid.most < LEAST_PATCHES:
        reason = f"it needs {LEAST_PATCHES} active patches and some that are not, but an image has {grid.n_patches}"
        return [Skipped(NAME, reason)]
    function = partial(measure_range, images=judged.images, resamples=judged.resamples)
    ranges = cut_latents(codes, TASK_ENTRIES, at_most=TASK_LATENTS)
    found: Coherences = fold_pieces(codes, function, join_ranges, ranges, on_progress=on_progress)
    if not len(found.mean):
        wanted = f"{LEAST_PATCHES} to {grid.most} active patches"
        return [
            Skipped(NAME, f"no latent has {LEAST_IMAGES} judged images with {wanted}. Give a store with more images")
        ]
    means = divide(found.total, found.n_there, found.n_there > 0)
    excess = found.mean - grid.null
    details: dict[str, object] = {
        "mean": float(means[0]), "null": grid.null, "null_deviation": float(found.deviation.mean()),
        "above_null": float((excess > Z * found.deviation).mean()),
        "percentiles": {str(q): float(np.percentile(excess, q)) for q in (5, 50, 95)},
        "n_evaluable": len(excess), "n_latents": codes.n_latents, "n_pairs": found.n_pairs,
        "grid": list(codes.grid), "patches": [LEAST_PATCHES, grid.most], "least_images": LEAST_IMAGES,
    }  # fmt: skip
    return [Measured(NAME, float(means[0] - grid.null), means[1:] - grid.null, True, details)]


def measure_range(codes: CodeStore, latents: range, *, images: NDArray[np.int64], resamples: Resamples) -> Coherences:
    """Moran's I of a range of latents over all judged images. `images`: [I], ascending."""
    grid, n = Grid(*codes.grid), len(latents)
    counted = np.zeros(codes.n_images, dtype=np.bool_)
    counted[images] = True
    total, weight = np.zeros((n, resamples.n + 1)), np.zeros((n, resamples.n + 1))
    variance = np.zeros(n)
    n_pairs = 0
    for shard in range(codes.n_shards):
        stored = codes.shard_range(shard)
        first, last = np.searchsorted(images, (stored.start, stored.stop)).tolist()
        if first == last:
            continue
        found = find_morans(codes.read_latents(shard, latents.start, latents.stop), codes.n_tokens, grid, counted)
        variance += np.bincount(found.latent, weights=found.variance, minlength=n)
        n_pairs += len(found.latent)
        for start, drawn, place, pairs in _cut_images(found, images, first, last, resamples):
            dense = np.zeros((n, len(drawn)))
            dense[found.latent[pairs], place - start] = found.moran[pairs]
            total += dense @ drawn
            dense[found.latent[pairs], place - start] = 1.0
            weight += dense @ drawn
    enough = weight[:, 0] >= LEAST_IMAGES
    total, weight, variance = total[enough], weight[enough], variance[enough]
    means = divide(total, weight, weight > 0)
    there = np.isfinite(means)
    return Coherences(
        np.where(there, means, 0).sum(0), there.sum(0).astype(np.float64), means[:, 0],
        np.sqrt(variance) / weight[:, 0], n_pairs,
    )  # fmt: skip


def _cut_images(
    found: Morans, images: NDArray[np.int64], first: int, last: int, resamples: Resamples
) -> Iterator[tuple[int, Array, NDArray[np.int64], NDArray[np.bool_]]]:
    """Yield the judged images number first to last - 1, some at a time: (start, weights [B, n + 1], place, pairs)."""
    place = np.searchsorted(images, found.image)
    for start in range(first, last, SPAN_IMAGES):
        stop = min(start + SPAN_IMAGES, last)
        drawn = np.concatenate([np.ones((stop - start, 1)), resamples.weights(start, stop).T], axis=1)
        pairs = (place >= start) & (place < stop)
        yield start, drawn, place[pairs], pairs


def join_ranges(parts: Sequence[Coherences]) -> Coherences:
    return Coherences(
        np.sum([part.total for part in parts], axis=0), np.sum([part.n_there for part in parts], axis=0),
        np.concatenate([part.mean for part in parts]), np.concatenate([part.deviation for part in parts]),
        sum(part.n_pairs for part in parts),
    )  # fmt: skip
