"""How well does a latent localize a concept? Codes and pixel masks in, AP, pointing game and IoU out.

AP: average precision over all pixels of all images with masks, where a pixel is scored by its patch's activation: the
sum over thresholds of precision times the step of recall (as scikit-learn's average_precision_score, where equal scores
are one step). It is exact, and computed from the share of each patch that carries the concept.
Pointing game (Zhang et al. 2016): the share of images with the concept in which the pixel in the middle of the
latent's strongest patch carries it; an image on which the latent is silent is a miss.
IoU: intersection over union of the mask and the heat map, which is upsampled bilinearly and cut at a threshold; the
mean over the images that contain the concept (as in network dissection, Bau et al. 2017, but image by image).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache import SettingsError
from actcache.options import JudgingConfig, check_number, identity_of
from actcache.progress import Progress
from actcache.seen import LearnedImages, SeenImages
from analysis.heat_maps import heat_maps, upsample
from analysis.lineage import image_stores, seen_in_codes
from analysis.localization.pixel_masks import PixelMasks, read_masks
from analysis.reduce import cut_latents, find_pairs, fold_pieces, join_columns
from analysis.results import LocalizedConcept, LocalizedConcepts, describe_result, find_result, finish_result
from saetrain import CodeStore, LatentCodes

CUTS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6)
"""Candidate thresholds, as shares of the latent's maximum over the choosing images."""

N_MASKS = 200
"""Images on which the threshold of a concept is chosen; more do not change it."""

BLOCK_CELLS = 16_000_000
"""Number of entries in a block of latents times concepts."""


class Localization(NamedTuple):
    """A row per latent, a column per concept; NaN for a concept that no image has."""

    ap: NDArray[np.float64]  # [L, C]
    pointing: NDArray[np.float64]  # [L, C]


def localize(
    codes: CodeStore,
    out: str | Path | None = None,
    *,
    masks: str | Path | None = None,
    legend: str | Path | None = None,
    latent: int | None = None,
    n_top: int = 1,
    where: str | None = None,
    images: str | Path | None = None,
    store: str | Path | None = None,
    judging: JudgingConfig = JudgingConfig(),
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> LocalizedConcepts:
    """The latents that localize each concept best, chosen by AP on one half of the images and judged on the other.

    The halves are the first and second of each store's images with masks, in stored order, which is random. Of the
    second half, images that the SAE or the model has learned from are left out. Concepts that one half lacks are left
    out, too.

    Args:
        out: a JSON file for the result; the same call again returns what the file holds.
        masks, legend, images, store, where: see `read_masks`.
        latent: judge this latent for every concept, instead of the best one.
        n_top: latents per concept.

    Raises:
        SettingsError, ImageSourceError, ParentMismatchError: see `read_masks`. SettingsError: a latent out of range, or
            no concept in both halves, or nothing left to judge.
    """
    n_top = check_number("n_top", n_top, int, at_least=1)
    latent = None if latent is None else check_number("latent", latent, int)
    if latent is not None and not 0 <= latent < codes.n_latents:
        raise SettingsError(f"--latent must lie in 0..{codes.n_latents - 1}, got {latent}.")
    pixel_masks = read_masks(
        codes, masks=masks, legend=legend, images=images, store=store, where=where, on_progress=on_progress
    )
    settings = {"latent": latent, "n_top": n_top, "where": where, "masks": pixel_masks.digest()}
    settings |= identity_of(judging)
    head = describe_result(LocalizedConcepts, settings, {"codes": codes.artifact})
    if (earlier := find_result(LocalizedConcepts, out, head, overwrite=overwrite)) is not None:
        return earlier
    first = _first_halves(image_stores(codes)[pixel_masks.images])
    second, seen = _leave_out(codes, pixel_masks.images[first], pixel_masks.images[~first], judging)
    choose = pixel_masks.take(np.flatnonzero(first))
    judge = pixel_masks.take(np.flatnonzero(np.isin(pixel_masks.images, second)))
    shares = [half.coverage(codes.grid) for half in (choose, judge)]
    present = [np.any(share > 0, axis=1) for share in shares]  # [M, C]
    concepts = np.flatnonzero(present[0].any(0) & present[1].any(0))
    if not len(concepts):
        n_images = len(pixel_masks.images)
        raise SettingsError(f"No concept is in both halves of the {n_images} images with masks. Give more images.")
    candidates = None if latent is None else [latent]
    chosen = score_latents(codes, choose, latents=candidates).ap
    order = np.argsort(-chosen, axis=0, kind="stable")[:n_top]  # [n_top, C]
    best = order if candidates is None else np.full_like(order, latent)
    latents = sorted(set(best[:, concepts].ravel().tolist()))
    judged = score_latents(codes, judge, latents=latents)
    rows = []
    for concept in concepts.tolist():
        in_chosen, in_judged = (np.flatnonzero(half[:, concept]) for half in present)
        in_chosen = in_chosen[:N_MASKS]
        chosen_pixels, judged_pixels = choose.pixels(in_chosen, concept), judge.pixels(in_judged, concept)
        for candidate, place in zip(best[:, concept].tolist(), order[:, concept].tolist(), strict=True):
            threshold = choose_threshold(codes, candidate, choose.images[in_chosen], chosen_pixels)
            rows.append(
                LocalizedConcept(
                    concept=pixel_masks.names[concept],
                    latent=candidate,
                    ap=float(judged.ap[latents.index(candidate), concept]),
                    chance=float(shares[1][..., concept].mean(dtype=np.float64)),
                    pointing=float(judged.pointing[latents.index(candidate), concept]),
                    iou=mean_iou(codes, candidate, judge.images[in_judged], judged_pixels, threshold),
                    chosen_ap=float(chosen[place, concept]),
                    n_images=len(in_judged),
                )
            )
    return finish_result(out, LocalizedConcepts(*head, len(pixel_masks.images), tuple(rows), seen=(seen,)))


def _leave_out(
    codes: CodeStore, chosen: NDArray[np.int64], judged: NDArray[np.int64], judging: JudgingConfig
) -> tuple[NDArray[np.int64], SeenImages]:
    """The images to judge on, without copies of those that latents are chosen on and without what the SAE has seen."""
    copies = LearnedImages.of("choice of latents", codes.images, chosen)
    seen = copies.find(codes.images, named=np.zeros(codes.n_images, dtype=bool)) | seen_in_codes(codes)
    return seen.judge(judged, judging, str(codes.path))


def _first_halves(stores: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[M]: which images lie in the first half of their store's images, given the store of each, ascending."""
    starts = np.searchsorted(stores, stores)
    sizes = np.searchsorted(stores, stores, side="right") - starts
    return np.asarray(np.arange(len(stores)) - starts < sizes // 2)


def score_latents(codes: CodeStore, masks: PixelMasks, *, latents: Sequence[int] | None = None) -> Localization:
    """AP and pointing game of latents (None: all) for every concept, one block of latents at a time."""
    coverage, centers = masks.coverage(codes.grid), masks.centers(codes.grid)
    if latents is None:
        pieces = cut_latents(codes, max(1, BLOCK_CELLS // len(masks.names)))
    else:
        pieces = [range(latent, latent + 1) for latent in latents]
    score = partial(_score_block, images=masks.images, coverage=coverage, centers=centers)
    result: Localization = fold_pieces(codes, score, join_columns, pieces)
    return result


def _score_block(
    codes: CodeStore,
    block: range,
    *,
    images: NDArray[np.int64],
    coverage: NDArray[np.float32],
    centers: NDArray[np.bool_],
) -> Localization:
    start, stop = block.start, block.stop
    slot = np.full(codes.n_images, -1)
    slot[images] = np.arange(len(images))
    columns: list[tuple[NDArray[Any], ...]] = []
    peaks: list[tuple[NDArray[Any], ...]] = []
    for shard in range(codes.n_shards):
        part = codes.read_latents(shard, start, stop)
        token = part.row % codes.n_tokens
        keep = (slot[part.row // codes.n_tokens] >= 0) & (token > 0) & (part.latent_value > 0)
        kept = np.concatenate([[0], np.cumsum(keep)])[part.latent_indptr]
        mine = LatentCodes(kept, part.row[keep], part.latent_value[keep])
        latent = np.repeat(np.arange(stop - start), np.diff(kept))
        columns.append((latent, slot[mine.row // codes.n_tokens], token[keep].astype(np.int64) - 1, mine.latent_value))
        pairs = find_pairs(mine, codes.n_tokens)
        peaks.append((pairs.latent.astype(np.int64), slot[pairs.image], pairs.peak_patch.astype(np.int64) - 1))
    latent, image, patch, value = join_columns(columns)
    ap = average_precision(latent, value.astype(np.float32), coverage[image, patch], coverage, stop - start)
    latent, image, patch = join_columns(peaks)
    hits = np.zeros((stop - start, coverage.shape[2]))
    np.add.at(hits, latent, centers[image, patch])
    n_images = coverage.any(1).sum(0)
    return Localization(ap, np.where(n_images > 0, hits / np.maximum(n_images, 1), np.nan))


def average_precision(
    latent: NDArray[np.int64],
    value: NDArray[np.float32],
    share: NDArray[np.float32],
    coverage: NDArray[np.float32],
    n_latents: int,
) -> NDArray[np.float64]:
    """[L, C]: average precision of each latent for each concept, given its positive entries only.

    Args:
        latent, value: [n] patches a latent fires on.
        share: [n, C] share of that patch that carries each concept.
        coverage: [M, P, C] the same for all patches; a patch without an entry scores 0.
    """
    n_patches = coverage.shape[0] * coverage.shape[1]
    mass = coverage.sum((0, 1), dtype=np.float64)  # [C] of the concept, in patches
    result = np.tile(mass / n_patches, (n_latents, 1)) if not len(latent) else np.zeros((n_latents, len(mass)))
    if len(latent):
        order = np.lexsort((-value, latent))
        latent, value = latent[order], value[order]
        first = np.flatnonzero(np.diff(latent, prepend=-1))  # where the entries of a latent begin
        end = np.flatnonzero(np.append((np.diff(latent) != 0) | (np.diff(value) != 0), True))  # where a step ends
        found = np.cumsum(share[order], axis=0, dtype=np.float64)
        owner = np.searchsorted(first, end, side="right") - 1
        before = np.where((first > 0)[:, None], found[first - 1], 0.0)  # belongs to earlier latents
        hit = found[end] - before[owner]  # [steps, C]
        size = end + 1 - first[owner]
        begins = np.diff(owner, prepend=-1) != 0
        gain = np.where(begins[:, None], hit, np.diff(hit, axis=0, prepend=np.zeros((1, len(mass)))))
        total = np.add.reduceat(gain * hit / size[:, None], np.flatnonzero(begins))
        last = hit[np.append(np.flatnonzero(begins)[1:] - 1, len(hit) - 1)]
        result += mass**2 / n_patches  # a latent that is silent everywhere: one step
        result[latent[first]] = total + (mass - last) * mass / n_patches  # all the silent patches: one last step
        result /= np.maximum(mass, 1e-300)
    return np.asarray(np.where(mass > 0, result, np.nan))


# ---------------------------------------------------------------------------------------------------------------------
# One latent, one concept, in pixels


def choose_threshold(codes: CodeStore, latent: int, images: NDArray[np.int64], masks: NDArray[np.bool_]) -> float:
    """The threshold for a latent's heat maps, among shares of their maximum, that gives the best mean IoU.

    Args:
        images: [n] stored positions. masks: [n, H, W] the concept's pixels in them.
    """
    heat = heat_maps(codes, latent, images)
    maximum = float(heat.max(initial=0.0))
    fields = upsample(heat, *masks.shape[1:])
    return CUTS[int(np.argmax([_iou(fields > cut * maximum, masks) for cut in CUTS]))] * maximum


def mean_iou(
    codes: CodeStore, latent: int, images: NDArray[np.int64], masks: NDArray[np.bool_], threshold: float
) -> float:
    """Mean over images of the IoU of a latent's upsampled heat map, cut at a threshold, with the concept's pixels."""
    return _iou(upsample(heat_maps(codes, latent, images), *masks.shape[1:]) > threshold, masks)


def _iou(fires: NDArray[np.bool_], masks: NDArray[np.bool_]) -> float:
    intersection, union = (fires & masks).sum((1, 2)), (fires | masks).sum((1, 2))
    return float((intersection / np.maximum(union, 1)).mean())
