"""M1 `feature_localization`: Moran's I of a latent's values over the patch grid, mean over images, then over latents.

    I = P / S  x_c' W x_c / x_c' x_c         x over all P patches, W: the eight neighbors, S = sum W

x_c' W x_c = 2 Q - 2 mean(x) sum_p deg(p) x_p + mean(x)^2 S, where Q sums x_p x_q over neighboring patches once, so only
active patches count. A latent stops collecting once it has 200 images, which is looked at for every 64 images in a row;
they are counted anew in every 5,000.
"""

import numpy as np
from numpy.typing import NDArray

from analysis.benchmark.measured import Measured
from analysis.benchmark.visaebench.images import SEED, ProtocolImages
from analysis.benchmark.visaebench.pairs import (
    LARGEST_SHARE,
    LEAST_ACTIVE,
    LEAST_SPREAD,
    PatchEntries,
    Totals,
    cut_patches,
    select_latents,
)
from saetrain import CodeStore

NAME = "feature_localization"
LEAST_IMAGES, MOST_LATENTS, ENOUGH = 50, 500, 200
GROUP, SHARD = 64, 5000
"""Images that the package takes at once, and those in one of its files."""
NOT_LOCALIZED = 0.1


def sample(candidates: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """The package's sample of latents, ascending."""
    if len(candidates) <= most:
        return candidates
    return np.sort(np.random.RandomState(SEED).choice(candidates, size=most, replace=False))


def measure_localization(codes: CodeStore, images: ProtocolImages, totals: Totals) -> Measured:
    evaluable = np.flatnonzero(totals.n_localized >= LEAST_IMAGES)
    latents = sample(evaluable, MOST_LATENTS)
    scores = mean_morans(codes, images, latents)
    facts: dict[str, object] = {
        "median_morans_i": float(np.median(scores)) if len(scores) else 0.0,
        "std_morans_i": float(scores.std()) if len(scores) else 0.0,
        "frac_non_localized": float((scores < NOT_LOCALIZED).mean()) if len(scores) else 1.0,
        "num_features_scored": len(scores), "num_evaluable_features": len(evaluable),
        "num_total_features": codes.n_latents, "total_images_processed": len(images),
    }  # fmt: skip
    return Measured(NAME, float(scores.mean()) if len(scores) else 0.0, None, True, facts)


def mean_morans(codes: CodeStore, images: ProtocolImages, latents: NDArray[np.int64]) -> NDArray[np.float64]:
    """The mean Moran's I of some latents, ascending, over the images that they collect."""
    n, n_groups = len(latents), -(-SHARD // GROUP)
    total, count = np.zeros(n), np.zeros(n, np.int64)
    before, within, last = np.zeros(n, np.int64), np.zeros(n, np.int64), -1  # images before the last group, and in it
    for shard in range(codes.n_shards):
        placed = images.place[codes.shard_range(shard).start : codes.shard_range(shard).stop].max(initial=-1)
        if placed < 0:
            continue
        newest = int(placed // SHARD * n_groups + placed % SHARD // GROUP)
        earlier, latest = np.zeros(n, np.int64), np.zeros(n, np.int64)
        for part in cut_patches(select_latents(codes.read_by_latent(shard), latents), codes.n_tokens):
            latent, place = part.latent[part.start].astype(np.int64), images.place[part.image[part.start]]
            value, localized = find_morans(part, codes.grid)
            keep = localized & (place >= 0)
            latent, place, value = latent[keep], place[keep], value[keep]
            group = place // SHARD * n_groups + place % SHARD // GROUP
            key = latent * (newest + 1) + group
            ahead = np.searchsorted(key, key) - np.searchsorted(latent, latent)  # of its own in earlier groups
            collected = before[latent] + np.where(group == last, 0, within[latent] + ahead)
            taken = collected < ENOUGH
            total += np.bincount(latent[taken], value[taken], minlength=n)
            count += np.bincount(latent[taken], minlength=n)
            latest += np.bincount(latent[group == newest], minlength=n)
            earlier += np.bincount(latent[group < newest], minlength=n)
        if newest == last:
            within += latest
        else:
            before, within, last = before + within + earlier, latest, newest
    return total / np.maximum(count, 1)


def find_morans(part: PatchEntries, grid: tuple[int, int]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(Moran's I of each pair, whether the package counts it).

    The values of a pair lie in a grid of its own that has an empty column at its right and an empty row below, so each
    entry finds four of its neighbors, and is found by the other four.
    """
    height, width = grid
    n_patches, stride = height * width, width + 1
    value, patch = part.value.astype(np.float64), part.patch.astype(np.int64)
    padded = np.zeros((len(part.start) * (height + 1) + 1) * stride)
    position = (part.pair() * (height + 1) + patch // width) * stride + patch % width
    padded[position] = value
    near = padded[position + 1]
    for step in (stride - 1, stride, stride + 1):
        near += padded[position + step]
    degrees = count_neighbors(grid)
    n_active, total = part.counts(), part.sums(value)
    mean = total / n_patches
    spread = part.sums(value * value) - total * mean
    cross = 2 * part.sums(value * near) - 2 * mean * part.sums(value * degrees[patch]) + mean**2 * degrees.sum()
    few = n_active <= int(LARGEST_SHARE * n_patches)
    localized = (n_active >= LEAST_ACTIVE) & few & (spread > LEAST_SPREAD)
    return n_patches / degrees.sum() * cross / np.maximum(spread, LEAST_SPREAD), localized


def count_neighbors(grid: tuple[int, int]) -> NDArray[np.float64]:
    """[P]: the number of neighbors of each patch, of eight."""
    height, width = (np.convolve(np.ones(size), np.ones(3), "same") for size in grid)
    return (np.outer(height, width) - 1).reshape(-1)
