"""Which latents separate one group of images from another: effect size, AUROC, and control of false discoveries.

In: codes and two groups. Out: a pyarrow table, one row per latent. One block of latents is read at a time, so memory
does not grow with the tokens. All ranks are exact.

Cohen's d: difference of means over the pooled standard deviation (Cohen 1988).
AUROC: P(a > b) + P(a = b) / 2 for one image of each group: U / (n_a n_b) from average ranks (Mann and Whitney 1947).
p: two-sided, from the normal approximation of U with a correction for ties and none for continuity; it is rough with
fewer than about eight images per group. q: p adjusted by the method of Benjamini and Hochberg (1995) over the latents
that fire in either group.
"""

import math
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actcache import SettingsError
from actcache.compiler import find_kernels
from analysis.query.where import choose_images
from analysis.reduce import UNIT, cut_latents, find_pairs, fold_pieces, join_columns, sum_images, tokens_per_image
from saetrain import CodeStore
from saetrain.codes import read_batches

BLOCK_ENTRIES = 1 << 24
"""Entries of a block of latents; a task holds about 20 bytes for each, or 6 with a kernel that takes them at once."""

BATCH_ENTRIES = 20 << 20
"""Entries that a kernel compares at once: somewhat more than a block, whose size is an estimate."""

MOST_TOKENS = 1 << 19
"""The kernel divides by the number of tokens with this precision."""

LEAST_ENTRIES = 1 << 24
"""Entries of all codes from which the kernel is worth it: it takes 0.7 s to load the compiler and the machine code, in
which numpy compares groups by 16 million entries (one core AMD EPYC, AVX2).
"""

RANK_PAIRS = 1 << 18
"""How many pairs are ranked at a time, in whole latents, so that they stay in the processor's cache."""


class Contrast(NamedTuple):
    """Columns with one row for each latent that fires in either group."""

    latent: NDArray[np.int64]
    auroc: NDArray[np.float64]  # above one half: stronger in group a
    cohen_d: NDArray[np.float64]  # NaN if the latent varies in neither group
    p: NDArray[np.float64]
    mean_a: NDArray[np.float64]  # mean image score of each group
    mean_b: NDArray[np.float64]
    share_a: NDArray[np.float64]  # share of the group's images on which it fires
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
    """Latents that separate the images of `group` from those of `versus`; both are conditions as for `--where`.

    Args:
        versus: by default, all images that are not in `group`.
        score: the score of an image: `mean` over its tokens, or `max`.
        where: both groups are taken from these images only.

    Returns:
        latent, auroc, cohen_d, q, mean_a, mean_b, share_a, share_b; the AUROC farthest from one half comes first.

    Raises:
        SettingsError: a condition that cannot be parsed, a group of fewer than two images, or groups that overlap.
    """
    chosen = choose_images(codes, where)
    a = choose_images(codes, group, "--group") & chosen
    b = chosen & ~a if versus is None else choose_images(codes, versus, "--versus") & chosen
    for flag, members in (("--group", a), ("--versus", b)):
        if members.sum() < 2:
            raise SettingsError(f"{flag} holds for {members.sum()} images, but a group needs two. Relax the condition.")
    if (a & b).any():
        raise SettingsError(
            f"--group and --versus share {(a & b).sum():,} images (e.g. {codes.images['uri'][int((a & b).argmax())]}). "
            "Change one of them so that they do not overlap."
        )
    contrast = contrast_groups(codes, a, b, score=score)
    q = adjust_p(contrast.p)
    order = np.lexsort((contrast.latent, -abs(contrast.auroc - 0.5)))[:n_top]
    columns = {"q" if name == "p" else name: column for name, column in contrast._replace(p=q)._asdict().items()}
    return pa.table({name: column[order] for name, column in columns.items()})


def contrast_groups(codes: CodeStore, a: NDArray[np.bool_], b: NDArray[np.bool_], *, score: str = "mean") -> Contrast:
    """Compare two groups of images [I] that do not overlap, for every latent that fires in either."""
    blocks = cut_latents(codes, BLOCK_ENTRIES, at_most=1 << (62 - _score_bits(codes)))
    result: Contrast = fold_pieces(codes, partial(_contrast_block, a=a, b=b, score=score), join_columns, blocks)
    return result


def _score_bits(codes: CodeStore) -> int:
    """Bits of the largest score: a float16 as a whole number of 2^-24 has 40 bits, and a score is a sum over tokens."""
    return 40 + codes.n_tokens.bit_length()


def _contrast_block(
    codes: CodeStore, block: range, *, a: NDArray[np.bool_], b: NDArray[np.bool_], score: str
) -> Contrast:
    groups = np.where(a, 1, np.where(b, 0, -1)).astype(np.int8)
    bits = _score_bits(codes)
    unit = UNIT if score == "max" else UNIT / tokens_per_image(codes)
    n_a, n_b = int(a.sum()), int(b.sum())
    fits = codes.dtypes["row"] == np.uint32 and codes.n_tokens < MOST_TOKENS
    if fits and codes.n_entries >= LEAST_ENTRIES and (kernels := find_kernels("analysis.query.kernels")) is not None:
        contrast = _contrast_compiled(
            kernels, codes, block, groups, by_peak=score == "max", n_a=n_a, n_b=n_b, unit=unit
        )
        return contrast._replace(latent=contrast.latent + block.start)
    parts = []
    for shard in range(codes.n_shards):
        entries = codes.read_latents(shard, block.start, block.stop)
        if score == "max":
            pairs = find_pairs(entries, codes.n_tokens)
            latent, image, units = pairs.latent, pairs.image, (pairs.peak.astype(np.float64) / UNIT).astype(np.int64)
        else:
            latent, image, units = sum_images(entries, codes.n_tokens)
        group = groups[image]
        key = (latent.astype(np.int64) << (bits + 1)) | (units << 1) | (group == 1)
        keep = (group >= 0) & (units > 0)
        parts.append(key if keep.all() else key[keep])
    contrast = rank_groups(np.concatenate(parts), bits, n_a=n_a, n_b=n_b, unit=unit)
    return contrast._replace(latent=contrast.latent + block.start)


def _contrast_compiled(
    kernels: ModuleType, codes: CodeStore, block: range, groups: NDArray[np.int8], *, by_peak: bool,
    n_a: int, n_b: int, unit: float,
) -> Contrast:  # fmt: skip
    """As `rank_groups`, from the entries of a block. Latents are numbered from its start."""
    latents, columns = np.empty(len(block), np.int64), np.empty((7, len(block)))
    bits, keys = _score_bits(codes) + 1, list[NDArray[np.int64]]()
    for batch in read_batches(codes, block.start, block.stop, BATCH_ENTRIES):
        entries = batch.pointers, batch.row, batch.value.view(np.uint16), codes.n_tokens, groups
        if batch.is_last and not keys:
            n = kernels.contrast_latents(*entries, by_peak, n_a, n_b, unit, latents, columns)
            break
        key = np.empty(len(batch.row) + 1, np.int64)  # one more is written
        n_keys = kernels.key_pairs(*entries, bits, by_peak, key)
        keys.append(key[:n_keys].copy() if 2 * n_keys < len(key) else key[:n_keys])
    else:  # many shards, or a latent that fires very often: all its keys are needed at once
        together = np.concatenate(keys)
        keys.clear()
        together.sort()
        n = kernels.rank_latents(together, bits, n_a, n_b, unit, latents, columns)
    return Contrast(latents[:n], *(column[:n] for column in columns))


def rank_groups(key: NDArray[np.int64], bits: int, *, n_a: int, n_b: int, unit: float) -> Contrast:
    """Compare two groups latent by latent, given only the positive scores; all other images score 0.

    Args:
        key: [N] one number for each pair of latent and image. It holds the latent, the score as a whole number of
            `unit` (`bits` bits), and whether the image is in group a (1 bit), because numpy sorts plain integers by
            vector instructions. It is sorted in place.
        n_a, n_b: number of images in each group.
    """
    key.sort()
    near = key[RANK_PAIRS::RANK_PAIRS] >> (bits + 1) << (bits + 1)
    edges = np.unique([0, *np.searchsorted(key, near), len(key)]).tolist()
    parts = [_rank(key[i:j], bits, n_a=n_a, n_b=n_b, unit=unit) for i, j in pairwise(edges)]
    return join_columns(parts) if parts else _rank(key, bits, n_a=n_a, n_b=n_b, unit=unit)


def _rank(key: NDArray[np.int64], bits: int, *, n_a: int, n_b: int, unit: float) -> Contrast:
    """As `rank_groups`, for sorted keys of whole latents."""
    latent, units, in_a = key >> (bits + 1), (key >> 1) & ((1 << bits) - 1), (key & 1).astype(np.bool_)
    n_total = n_a + n_b
    new = np.ones(len(latent), dtype=np.bool_)
    new[1:] = latent[1:] != latent[:-1]
    first = np.flatnonzero(new)  # [L] where a latent begins
    n = np.diff(first, append=len(latent))
    n_zero = n_total - n
    new[1:] |= units[1:] != units[:-1]
    tied = np.flatnonzero(new)  # [R] where a run of equal scores begins
    run = np.searchsorted(tied, first)  # [L] the first run of a latent
    owner = np.repeat(np.arange(len(first)), np.diff(run, append=len(tied)))
    n_tied = np.diff(tied, append=len(latent)).astype(np.float64)
    a_before = np.concatenate([[0], np.cumsum(in_a)])
    a_tied = np.diff(a_before[np.append(tied, len(latent))])
    rank = tied - first[owner] + (n_tied + 1) / 2 + n_zero[owner]  # average, zeros before

    def by_latent(values: NDArray[Any], starts: NDArray[np.int64]) -> NDArray[np.float64]:
        sums: NDArray[np.float64] = np.add.reduceat(values, starts, dtype=np.float64) if len(starts) else np.empty(0)
        return sums

    ties = by_latent(n_tied**3 - n_tied, run) + n_zero.astype(np.float64) ** 3 - n_zero
    n_fired_a = np.diff(a_before[np.append(first, len(latent))])
    rank_sum = by_latent(rank * a_tied, run) + (n_a - n_fired_a) * (n_zero + 1) / 2
    u = rank_sum - n_a * (n_a + 1) / 2
    spread = np.sqrt(n_a * n_b / 12 * ((n_total + 1) - ties / (n_total * (n_total - 1.0))))
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(spread > 0, (u - n_a * n_b / 2) / spread, 0.0)

    score = units * unit
    sums = [by_latent(score * in_a, first), by_latent(score, first)]
    sums[1] -= sums[0]
    means = [total / size for total, size in zip(sums, (n_a, n_b), strict=True)]
    # deviations from the mean, in a second pass: a difference of large sums would leave rounding errors as variance
    score -= np.where(in_a, *(np.repeat(mean, n) for mean in means))
    within = by_latent(score * score, first)
    n_fired = n_fired_a, n - n_fired_a
    constant = np.ones(len(first), dtype=np.bool_)
    for mean, fired, size, in_run in zip(means, n_fired, (n_a, n_b), (a_tied, n_tied - a_tied), strict=True):
        within += (size - fired) * mean**2
        one_value = (fired == size) & (by_latent(in_run > 0, run) == 1)
        constant &= (fired == 0) | one_value  # exact, since equal scores are one run
    pooled = np.sqrt(np.where(constant, 0.0, within) / (n_total - 2))
    return Contrast(
        latent=latent[first].astype(np.int64),
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
