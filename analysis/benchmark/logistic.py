"""Logistic regressions with one variable: for each class, the latent whose code predicts it best.

    minimize over b, w:  sum over patches of log(1 + exp(b + w z)) - y (b + w z),  plus RIDGE w^2 / 2

z is the code of a latent on a patch, y whether the patch carries the class. Only the first term depends on the values,
and not on y. So a latent's codes enter as their distinct values, which are float16 and therefore few, with counts (the
silent patches are one more value, 0), and a class as its number of patches and the sum of z over them. A Newton step
then costs the same for any number of patches.

Not every pair is fitted. Where the values of a bin are replaced by their mean, the first term falls, as it is convex in
z, so the minimum falls, too: fits on a few bins are lower bounds, and only pairs whose bound lies below the best fit so
far are fitted exactly. The result is the same as that of fitting all of them.
Source: `Sparse1DProbe` of saev's trait_discovery (arXiv 2511.17735) has this objective, and at most 200 Newton steps.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RIDGE = 1e-8
N_STEPS = 200
PRECISION = 1e-10
"""A fit ends when the next step would lower the objective by less than this share of it."""
BIN_BITS = 8
"""Bits of a float16 that a bin leaves out: 2 of its 10 mantissa bits remain, so an octave has 4 bins."""
N_BINS = 20
"""Five octaves below the largest value of a latent; smaller values share the last bin."""
CELLS = 1 << 18
"""Values of all pairs that are fitted together: 2 MB, which stay in the cache."""
AT_ONCE = 4
"""Latents that are fitted exactly for a class before the bounds of the others are looked at again."""
SLACK = 1e-7
"""The share of a bound by which it may lie above the true minimum, as a fit on bins is not exact, either."""


class Fit(NamedTuple):
    """Objective, intercept b and weight w of some pairs."""

    objective: Array
    b: Array
    w: Array


@dataclass(frozen=True)
class LatentValues:
    """The codes of L consecutive latents on N patches, and what they have in common with C classes.

    Attributes:
        indptr: [L + 1]: where the distinct values of each latent begin.
        bits, count: [m] float16 bits of each distinct value, ascending in a latent, and patches that have it.
        n_patches: N.
        n_positives: [C] patches of each class.
        n_both: [L, C] patches of the class on which the latent fires, and `total` [L, C] the sum of its values there.
    """

    indptr: NDArray[np.int64]
    bits: NDArray[np.uint16]
    count: NDArray[np.int64]
    n_patches: int
    n_positives: NDArray[np.int64]
    n_both: Array
    total: Array

    @property
    def n_silent(self) -> NDArray[np.int64]:
        """[L]: patches on which a latent does not fire."""
        before = np.concatenate([[0], np.cumsum(self.count)])
        return self.n_patches - np.diff(before[self.indptr])


@dataclass(frozen=True)
class Best:
    """For each of C classes the latent with the lowest objective so far (-1: none), and its fit."""

    latent: NDArray[np.int64]
    fit: Fit

    @classmethod
    def none(cls, n_classes: int) -> "Best":
        worst = np.full(n_classes, np.inf)
        return cls(np.full(n_classes, -1), Fit(worst, np.zeros(n_classes), np.zeros(n_classes)))


def improve(best: Best, values: LatentValues, first: int) -> Best:
    """The best latents among those of before and those of `values`; of equally good ones the first.

    Args:
        first: the number of the first latent of `values`.
    """
    bounds = find_bounds(values)
    order = np.argsort(bounds, axis=0, kind="stable")
    latent, fit = best.latent.copy(), Fit(*(column.copy() for column in best.fit))
    for start in range(0, len(order), AT_ONCE):
        rows = order[start : start + AT_ONCE]
        open_ = np.take_along_axis(bounds, rows, axis=0) < fit.objective
        if not open_.any():
            break
        place, of_class = np.nonzero(open_)
        tried = rows[place, of_class]
        found = fit_exactly(values, tried, of_class)
        by_class = np.lexsort((tried, found.objective, of_class))
        winner = by_class[np.diff(of_class[by_class], prepend=-1) != 0]
        better = winner[found.objective[winner] < fit.objective[of_class[winner]]]
        for column, new in zip(fit, found, strict=True):
            column[of_class[better]] = new[better]
        latent[of_class[better]] = tried[better] + first
    return Best(latent, fit)


def find_bounds(values: LatentValues) -> Array:
    """[L, C]: a number below the objective that each pair reaches."""
    z, n = _bin_values(values)
    silent = values.n_silent.astype(np.float64)
    # where a latent fires on no patch of a class, the best it can do is to rule the class out wherever it fires
    bounds = silent[:, None] * entropy(values.n_positives / np.maximum(silent, 1)[:, None])
    latent, of_class = np.nonzero(values.n_both)
    step = max(1, CELLS // N_BINS)
    for start in range(0, len(latent), step):
        rows, columns = latent[start : start + step], of_class[start : start + step]
        fit = _descend(z[rows], n[rows], silent[rows], values.n_positives[columns], values.total[rows, columns])
        bounds[rows, columns] = fit.objective
    return np.asarray(bounds - SLACK * np.abs(bounds))


def fit_exactly(values: LatentValues, latents: NDArray[np.int64], classes: NDArray[np.int64]) -> Fit:
    """The fits of some pairs, on all distinct values."""
    sizes = np.diff(values.indptr)[latents]
    result = Fit(*np.empty((3, len(latents))))
    order, start = np.argsort(-sizes, kind="stable"), 0
    while start < len(order):
        width = int(sizes[order[start]])
        pairs = order[start : start + max(1, CELLS // max(1, width))]
        start += len(pairs)
        mine = latents[pairs]
        place = values.indptr[mine][:, None] + np.arange(width)
        there = place < values.indptr[mine + 1][:, None]
        place = np.where(there, place, 0)
        z = np.where(there, values.bits.view(np.float16)[place].astype(np.float64), 0.0)
        n = np.where(there, values.count[place], 0).astype(np.float64)
        fit = _descend(
            z, n, values.n_silent[mine].astype(np.float64), values.n_positives[classes[pairs]],
            values.total[mine, classes[pairs]],
        )  # fmt: skip
        for column, new in zip(result, fit, strict=True):
            column[pairs] = new
    return result


def _bin_values(values: LatentValues) -> tuple[Array, Array]:
    """(mean value, patches) [L, bins] of the bins of each latent, the largest values first."""
    n_latents = len(values.indptr) - 1
    sizes = np.diff(values.indptr)
    latent = np.repeat(np.arange(n_latents), sizes)
    largest = values.bits[np.repeat(values.indptr[1:] - 1, sizes)]
    place = latent * N_BINS + np.minimum((largest - values.bits) >> BIN_BITS, N_BINS - 1)
    count = values.count.astype(np.float64)
    n: Array = np.bincount(place, count, n_latents * N_BINS).astype(np.float64)
    total = np.bincount(place, count * values.bits.view(np.float16), n_latents * N_BINS)
    return (total / np.maximum(n, 1)).reshape(n_latents, -1), n.reshape(n_latents, -1)


def _descend(z: Array, n: Array, n_silent: Array, n_positives: NDArray[np.int64], total: Array) -> Fit:
    """Newton's method for p pairs at once; a step that raises the objective is halved.

    Args:
        z, n: [p, Q] values and the patches that have them. n_silent: [p] patches of value 0.
        n_positives, total: [p] patches of the class, and the sum of z over them.
    """
    n_patches = n.sum(1) + n_silent
    rate = n_positives / n_patches
    result = Fit(*np.zeros((3, len(z))))
    at = np.stack([np.log(rate / (1 - rate)), np.zeros(len(z))])
    best, lowest, step = at.copy(), np.full(len(z), np.inf), np.zeros((2, len(z)))
    gain = np.full(len(z), np.inf)
    active = np.arange(len(z))
    for _ in range(N_STEPS):
        value, gradient, hessian, noise = _differentiate(z, n, n_silent, n_positives, total, at)
        lower = value <= lowest + noise
        best, lowest = np.where(lower, at, best), np.where(lower, value, lowest)
        determinant = np.maximum(hessian[0] * hessian[2] - hessian[1] ** 2, 1e-15 * hessian[0] * hessian[2])
        newton = np.stack(
            [hessian[1] * gradient[1] - hessian[2] * gradient[0], hessian[1] * gradient[0] - hessian[0] * gradient[1]]
        ) / np.maximum(determinant, 1e-300)  # fmt: skip
        gain = np.where(lower, -(gradient * newton).sum(0) / 2, gain / 2)
        step = np.where(lower, newton, step / 2)
        done = (gain <= PRECISION * np.abs(lowest) + noise) | (lowest < 0)
        if done.any():
            for column, new in zip(result, (lowest, *best), strict=True):
                column[active[done]] = new[done]
            keep = ~done
            if not keep.any():
                return result
            z, n, n_silent, n_positives, total = z[keep], n[keep], n_silent[keep], n_positives[keep], total[keep]
            best, lowest, step, gain, active = best[:, keep], lowest[keep], step[:, keep], gain[keep], active[keep]
        at = best + step
    for column, new in zip(result, (lowest, *best), strict=True):
        column[active] = new
    return result


def _differentiate(
    z: Array, n: Array, n_silent: Array, n_positives: NDArray[np.int64], total: Array, at: Array
) -> tuple[Array, Array, Array, Array]:
    """(objective [p], gradient [2, p], derivatives by bb, bw and ww [3, p], rounding error of the first [p])."""
    b, w = at
    logit = w[:, None] * z + b[:, None]
    tail = np.exp(-np.abs(logit))
    chance = np.where(logit >= 0, 1.0, tail) / (1 + tail)
    spread = n * chance * (1 - chance)
    of_zero, chance_of_zero = softplus(b), np.exp(-softplus(-b))  # of large negative b without an overflow
    summed = np.einsum("pq,pq->p", n, np.maximum(logit, 0) + np.log1p(tail)) + n_silent * of_zero
    objective = summed - b * n_positives - w * total + RIDGE / 2 * w * w
    gradient = np.stack(
        [
            np.einsum("pq,pq->p", n, chance) + n_silent * chance_of_zero - n_positives,
            np.einsum("pq,pq,pq->p", n, chance, z) - total + RIDGE * w,
        ]
    )
    hessian = np.stack(
        [
            spread.sum(1) + n_silent * chance_of_zero * (1 - chance_of_zero),
            np.einsum("pq,pq->p", spread, z),
            np.einsum("pq,pq,pq->p", spread, z, z) + RIDGE,
        ]
    )
    noise = 1e-14 * (summed + np.abs(b) * n_positives + np.abs(w) * total + 1)
    return objective, gradient, hessian, noise


def softplus(x: Array) -> Array:
    """log(1 + exp(x))."""
    return np.asarray(np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))))


def entropy(rate: Array) -> Array:
    """-p log p - (1 - p) log(1 - p), the mean loss of a constant prediction; 0 at the ends."""
    p = np.clip(rate, 1e-300, 1)
    q = np.clip(1 - rate, 1e-300, 1)
    return np.asarray(-(p * np.log(p) + q * np.log(q)))
