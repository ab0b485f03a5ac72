"""Monosemanticity of latents: do the images on which a latent fires look alike to an image encoder?

In: codes, and a file of image embeddings. Out: one score per latent. numpy only, run by dask: a task takes a range of
latents over all shards, reads only their entries, and holds one [latents, width] sum, so memory does not grow with the
number of images.

Source: Pach et al. 2025 (arXiv 2504.02821). Let a be the activations of a latent on images, scaled to 0..1 by its
minimum and maximum over images, and E unit embeddings. MS is the mean of cos(E_n, E_m) over pairs n < m, weighted by
a_n a_m:

    MS = (||sum_n a_n E_n||^2 - sum_n a_n^2) / ((sum_n a_n)^2 - sum_n a_n^2)

This is exact, and linear in the number of images. Scaling to a maximum of 1 cancels out; the minimum is 0 unless the
latent fires on every image.
"""

from pathlib import Path

import dask
import numpy as np
from numpy.typing import NDArray

from actcache.progress import Progress
from analysis.reduce import compute, cut_latents, find_pairs, image_scores, open_codes
from saetrain import CodeStore

TASK_LATENTS, TASK_ENTRIES = 1024, 1 << 24


def monosemanticity(
    codes: CodeStore, embeddings: Path, *, score: str = "mean", on_progress: Progress | None = None
) -> NDArray[np.float64]:
    """The MS of every latent, [F]; NaN if fewer than two images have any weight.

    Args:
        embeddings: an .npy file [I, E] with rows in stored order, of any nonzero length. See `choose_embeddings`.
        score: a latent's activation on an image: the `mean` over its tokens, or the `max`.
        on_progress: called with (tasks done, tasks in all), see `n_monosemanticity_tasks`.
    """
    task = dask.delayed(_score_range, pure=False)
    place = str(codes.path.absolute()), codes.codes_id, str(embeddings.absolute()), score
    parts = [task(*place, latents.start, latents.stop) for latents in _ranges(codes)]
    joined = dask.delayed(np.concatenate, pure=False)(parts)
    scores: NDArray[np.float64] = compute(joined, parts=parts, on_progress=on_progress)
    return scores


def n_monosemanticity_tasks(codes: CodeStore) -> int:
    return len(_ranges(codes))


def _ranges(codes: CodeStore) -> list[range]:
    return cut_latents(codes, TASK_ENTRIES, at_most=TASK_LATENTS)


def _score_range(path: str, codes_id: str, embeddings: str, score: str, start: int, stop: int) -> NDArray[np.float64]:
    codes, array = open_codes(path, codes_id), np.load(embeddings, mmap_mode="r", allow_pickle=False)
    n, width = stop - start, array.shape[1]
    floor = _find_floor(codes, start, stop, score)
    summed, first, second = np.zeros((n, width)), np.zeros(n), np.zeros(n)
    for shard in range(codes.n_shards):
        images = codes.shard_range(shard)
        valid = codes.valid[images.start : images.stop]
        unit = np.asarray(array[images.start : images.stop], dtype=np.float64)
        unit = np.where(valid[:, None], unit, 1.0)
        unit /= np.linalg.norm(unit, axis=1)[:, None]
        pairs = find_pairs(codes.read_latents(shard, start, stop), codes.n_tokens)
        active = image_scores(pairs, codes, score) - floor[pairs.latent]
        dense = np.zeros((n, len(images)))
        dense[pairs.latent, pairs.image - images.start] = active
        summed += dense @ unit
        first += np.bincount(pairs.latent, weights=active, minlength=n)
        second += np.bincount(pairs.latent, weights=active**2, minlength=n)
    weight = first**2 - second
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(weight > 1e-12 * first**2, (np.einsum("ne,ne->n", summed, summed) - second) / weight, np.nan)


def _find_floor(codes: CodeStore, start: int, stop: int, score: str) -> NDArray[np.float64]:
    """[n]: the smallest activation of each latent over images, which is 0 unless it fires on all of them.

    It is computed before anything is added up, because subtracting it from the sums would cancel their digits. Few
    latents fire on every image of the first shard, so hardly anything is read twice.
    """
    floor = np.full(stop - start, np.inf)
    for shard in range(codes.n_shards):
        left = np.flatnonzero(floor)
        if not len(left):
            break
        first, last = start + int(left[0]), start + int(left[-1]) + 1
        images = codes.shard_range(shard)
        pairs = find_pairs(codes.read_latents(shard, first, last), codes.n_tokens)
        latent = pairs.latent + left[0]
        np.minimum.at(floor, latent, image_scores(pairs, codes, score))
        n_fired = np.bincount(latent, minlength=len(floor))
        floor[n_fired < codes.valid[images.start : images.stop].sum()] = 0.0
    return np.where(np.isfinite(floor), floor, 0.0)
