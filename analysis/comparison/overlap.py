"""Do two models use the same latents? Counts of both in, overlaps, groups and correlations out. numpy only.

In: a_c[s] of a base and of an adapted model, from one SAE and one set of images. Shapes: C classes, F latents.
Sources: PatchSAE (arXiv 2412.05276) section 4.2, table 1 and figure 20; rank-biased overlap: Webber et al. 2010, cut at
a depth and divided by what equal lists reach there.
"""

from collections.abc import Sequence
from dataclasses import asdict, fields

import numpy as np
from numpy.typing import NDArray

from analysis.interventions import rank_latents
from analysis.results import ClassOverlap, CountOverlap, DatasetOverlap, Overlap, OverlapMeans

PERSISTENCE = 0.9
"""Persistence of the rank-biased overlap: the first ten ranks have 86 % of the weight."""


def jaccard(a: Sequence[int], b: Sequence[int]) -> float:
    """Number of shared members over number of all members; NaN for two empty lists."""
    first, second = set(a), set(b)
    return len(first & second) / len(first | second) if first | second else float("nan")


def rank_biased_overlap(a: Sequence[int], b: Sequence[int], persistence: float = PERSISTENCE) -> float:
    """1 for equal lists, 0 for lists without a common member; early ranks count most. NaN for empty lists."""
    depth = max(len(a), len(b))
    weights = persistence ** np.arange(depth)
    shares = [len(set(a[: d + 1]) & set(b[: d + 1])) / (d + 1) for d in range(depth)]
    return float(np.dot(weights, shares) / weights.sum()) if depth else float("nan")


def group_latents(
    base: NDArray[np.integer], adapted: NDArray[np.integer], high: int, low: int
) -> dict[str, NDArray[np.int64]]:
    """Latents that are frequent in both models, fell, or rose, from counts [F] of one class.

    Among all counts of both models, the `high`-th largest is the upper bound and the `low`-th largest the lower bound.
    high: at or above the upper bound in both; high_to_low: from there to below the lower bound; low_to_high: the
    reverse.
    """
    union = np.sort(np.concatenate([base, adapted]))[::-1]
    upper, lower = (max(1, int(union[min(n, len(union)) - 1])) for n in (high, low))
    return {
        "high": np.flatnonzero((base >= upper) & (adapted >= upper)),
        "high_to_low": np.flatnonzero((base >= upper) & (adapted < lower)),
        "low_to_high": np.flatnonzero((base < lower) & (adapted >= upper)),
    }


def compare_counts(
    base: NDArray[np.integer], adapted: NDArray[np.integer], names: Sequence[str], *, k: int, high: int, low: int
) -> CountOverlap:
    """Overlap of the top k latents and the three groups, for each class and for the dataset.

    Args:
        base, adapted: [C, F] counts.
    """
    rows = [ClassOverlap(**asdict(_compare(base[c], adapted[c], k, high, low)), class_=n) for c, n in enumerate(names)]
    task = [float(np.mean([getattr(row, field.name) for row in rows])) for field in fields(OverlapMeans)]
    a, b = base.sum(0, dtype=np.int64), adapted.sum(0, dtype=np.int64)
    live = np.flatnonzero(a + b)
    dataset = DatasetOverlap(
        **asdict(_compare(a, b, k, high, low)),
        correlation=_correlation(a[live], b[live]),
        log_correlation=_correlation(np.log1p(a[live]), np.log1p(b[live])),
    )
    scatter = (tuple(live.tolist()), tuple(a[live].tolist()), tuple(b[live].tolist()))
    return CountOverlap(tuple(rows), OverlapMeans(*task), dataset, scatter)


def _compare(a: NDArray[np.integer], b: NDArray[np.integer], k: int, high: int, low: int) -> Overlap:
    first, second = (row[row >= 0].tolist() for row in (rank_latents(x[None], k)[0] for x in (a, b)))
    groups = group_latents(a, b, high, low)
    return Overlap(
        jaccard=jaccard(first, second),
        rank_biased_overlap=rank_biased_overlap(first, second),
        n_high=len(groups["high"]),
        n_high_to_low=len(groups["high_to_low"]),
        n_low_to_high=len(groups["low_to_high"]),
        shared=tuple([latent for latent in first if latent in set(second)][:10]),
        base_only=tuple([latent for latent in first if latent not in set(second)][:10]),
        adapted_only=tuple([latent for latent in second if latent not in set(first)][:10]),
    )


def _correlation(a: NDArray[np.number], b: NDArray[np.number]) -> float:
    """Pearson correlation; NaN if one of the two does not vary."""
    if len(a) < 2 or not a.std() or not b.std():
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def improvement_rate(base: float, adapted: float) -> float:
    """Delta: the share of the base model's errors that the adapted model does not make; NaN if there are none."""
    return (adapted - base) / (1 - base) if base < 1 else float("nan")
