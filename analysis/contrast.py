"""Which latents tell one group of images from another: effect size, AUROC, and control of false discoveries.

In: codes and two groups. Out: a pyarrow table, a row a latent. A block of latents is read at a time, so memory does
not grow with the tokens; all ranks are exact.

Cohen's d: difference of means over the pooled standard deviation (Cohen 1988).
AUROC: P(a > b) + P(a = b) / 2 for an image of each group, U / (n_a n_b) from average ranks (Mann and Whitney 1947).
p: two-sided, from the normal approximation of U with correction for ties, without continuity correction; rough below
about eight images a group. q: p adjusted by Benjamini and Hochberg (1995) over the latents that fire in either group.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actcache import SettingsError
from analysis.join import fold_pieces
from analysis.pairs import find_pairs, image_scores
from analysis.selection import choose_images
from saetrain import CodeStore, LatentCodes

BLOCK_ENTRIES = 4_000_000
"""Entries of a block of latents; a task holds about 100 bytes each."""


class Contrast(NamedTuple):
    """A row a latent that fires in either group."""

    latent: NDArray[np.int64]
    auroc: NDArray[np.float64]  # above one half: stronger in group a
    cohen_d: NDArray[np.float64]  # NaN where neither group varies
    p: NDArray[np.float64]
    mean_a: NDArray[np.float64]  # of the image score
    mean_b: NDArray[np.float64]
    share_a: NDArray[np.float64]  # of the group's images it fires on
    share_b: NDArray[np.float64]


def query_groups(
    codes: CodeStore,
    group: str,
    versus: str | None = None,
    *,
    n_top: int = 10,
    score: str = "mean",
    where: str | None = None,
) -> pa.Table:
    """Latents that tell the images of `group` from those of `versus`, both `--where` expressions.

    Args:
        versus: by default all images that are not in `group`.
        score: of an image: `mean` over its tokens, or `max`.
        where: both groups are taken among these images.

    Returns:
        latent, auroc, cohen_d, q, mean_a, mean_b, share_a, share_b; farthest from an AUROC of one half first.

    Raises:
        SettingsError: an expression that cannot be read, a group of less than two images, or groups that overlap.
    """
    chosen = choose_images(codes, where)
    a = choose_images(codes, group, "--group") & chosen
    b = chosen & ~a if versus is None else choose_images(codes, versus, "--versus") & chosen
    for flag, mask in (("--group", a), ("--versus", b)):
        if mask.sum() < 2:
            raise SettingsError(f"{flag} holds for {mask.sum()} images; a group needs two. Loosen it.")
    if (a & b).any():
        raise SettingsError(
            f"--group and --versus share {(a & b).sum():,} images (e.g. {codes.images['uri'][int((a & b).argmax())]}). "
            "They must not overlap."
        )
    found = contrast_groups(codes, a, b, score=score)
    q = adjust_p(found.p)
    order = np.lexsort((found.latent, -abs(found.auroc - 0.5)))[:n_top]
    columns = {"q" if name == "p" else name: column for name, column in found._replace(p=q)._asdict().items()}
    return pa.table({name: column[order] for name, column in columns.items()})


def contrast_groups(codes: CodeStore, a: NDArray[np.bool_], b: NDArray[np.bool_], *, score: str = "mean") -> Contrast:
    """Every latent that fires in either of two groups of images [I], which do not overlap; by latent."""
    n_blocks = max(1, -(-codes.n_entries // BLOCK_ENTRIES))
    edges = np.unique(np.linspace(0, codes.n_latents, n_blocks + 1).astype(int)).tolist()
    result: Contrast = fold_pieces(
        codes, partial(_contrast_block, a=a, b=b, score=score), _join_blocks, list(pairwise(edges))
    )
    return result


def _contrast_block(
    codes: CodeStore, block: tuple[int, int], *, a: NDArray[np.bool_], b: NDArray[np.bool_], score: str
) -> Contrast:
    start, stop = block
    either = a | b
    latents, scores, images = [], [], []
    for shard in range(codes.n_shards):
        part = codes.read_latents(shard, start, stop)
        keep = either[part.row // codes.n_tokens] & (part.latent_value > 0)
        kept = np.concatenate([[0], np.cumsum(keep)])[part.latent_indptr]
        pairs = find_pairs(LatentCodes(kept, part.row[keep], part.latent_value[keep]), codes.n_tokens)
        latents.append(pairs.latent)
        scores.append(image_scores(pairs, codes, score))
        images.append(pairs.image)
    latent, value, in_a = np.concatenate(latents), np.concatenate(scores), a[np.concatenate(images)]
    found = rank_groups(latent, value, in_a, n_a=int(a.sum()), n_b=int(b.sum()))
    return found._replace(latent=found.latent + start)


def _join_blocks(parts: Sequence[Contrast]) -> Contrast:
    return Contrast._make(np.concatenate(column) for column in zip(*parts, strict=True))


def rank_groups(
    latent: NDArray[np.int64], score: NDArray[np.float64], in_a: NDArray[np.bool_], *, n_a: int, n_b: int
) -> Contrast:
    """Compare two groups latent by latent, given the positive scores only; all other images score 0.

    Args:
        latent, score, in_a: [N] a pair of latent and image each; which group the image is in.
        n_a, n_b: images of the groups.
    """
    order = np.lexsort((score, latent))
    latent, score, in_a = latent[order], score[order], in_a[order]
    changed = np.diff(latent, prepend=-1) != 0
    first = np.flatnonzero(changed)  # [L] where a latent begins
    owner = np.cumsum(changed) - 1  # [N] which of these latents
    n, n_total = np.diff(np.append(first, len(latent))), n_a + n_b
    n_zero = n_total - n

    tied = np.flatnonzero(changed | (np.diff(score, prepend=-1) != 0))  # where a run of equal scores begins
    n_tied = np.diff(np.append(tied, len(score)))
    rank = np.repeat(tied - first[owner[tied]] + (n_tied + 1) / 2, n_tied) + n_zero[owner]  # average, zeros before
    ties = np.bincount(owner[tied], n_tied.astype(float) ** 3 - n_tied, len(first)) + n_zero.astype(float) ** 3 - n_zero

    n_fired_a = np.bincount(owner, in_a, len(first))
    rank_sum = np.bincount(owner, rank * in_a, len(first)) + (n_a - n_fired_a) * (n_zero + 1) / 2
    u = rank_sum - n_a * (n_a + 1) / 2
    spread = np.sqrt(n_a * n_b / 12 * ((n_total + 1) - ties / (n_total * (n_total - 1.0))))
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(spread > 0, (u - n_a * n_b / 2) / spread, 0.0)

    sums = [np.bincount(owner, score * mask, len(first)) for mask in (in_a, ~in_a)]
    squares = [np.bincount(owner, score**2 * mask, len(first)) for mask in (in_a, ~in_a)]
    means = [total / size for total, size in zip(sums, (n_a, n_b), strict=True)]
    within = sum(square - total * mean for square, total, mean in zip(squares, sums, means, strict=True))
    pooled = np.sqrt(np.maximum(within, 0) / (n_total - 2))
    return Contrast(
        latent=latent[first],
        auroc=u / (n_a * n_b),
        cohen_d=np.divide(means[0] - means[1], pooled, out=np.full(len(first), np.nan), where=pooled > 0),
        p=np.array([math.erfc(abs(value) / math.sqrt(2)) for value in z]),
        mean_a=means[0],
        mean_b=means[1],
        share_a=n_fired_a / n_a,
        share_b=(n - n_fired_a) / n_b,
    )


def adjust_p(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Benjamini-Hochberg: the smallest false discovery rate at which each test would be called significant."""
    order = np.argsort(p)
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    q = np.empty_like(p)
    q[order] = np.minimum.accumulate(scaled[::-1])[::-1].clip(max=1)
    return q
