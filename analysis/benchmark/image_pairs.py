"""TAPAScore: do the latents of an attribute follow it where nothing else in an image changes?

In: pairs of images that differ in one attribute, which one loses and the other has instead, and the coalition of each
attribute (coalitions.py). An attribute's latents are those of its coalition that the other one's does not hold.

    delta      1 if any of them fires on the image after and none on the image before; -1 the other way round; else 0
    TAPAScore  mean delta of the added attributes - mean delta of the removed ones, from -2 to 2; where no pair adds, or
               none removes, that mean is 0

Pairs are left out that hold an image on which anything was chosen, or from which a run has learned. Resamples draw
pairs; pairs that share an image are drawn together. Source: sae-concept-eval (arXiv 2606.24716).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actcache import PipelineError
from actcache.sources import read_table
from actcache.store import StoreGroup
from analysis.benchmark.attributes import Attributes
from analysis.benchmark.coalitions import NONE, read_fires, take_latents
from analysis.benchmark.measured import Measured, Skipped
from analysis.benchmark.ranked_patches import draw_weights
from analysis.benchmark.resamples import Resamples, divide
from analysis.benchmark.subject import Judged, Subject

Array = NDArray[np.float64]

NAME = "TAPAScore"
COLUMNS = ("before", "after", "removed", "added")


@dataclass(frozen=True)
class ImagePairs:
    """n pairs of images.

    Attributes:
        before, after: [n] stored positions.
        removed, added: what only the one or the other image has; "" where nothing is said.
        group: [n] number of the pairs that a pair is connected with, from 0: they share images.
        n_unknown: pairs of the table that name an image which is not in the store.
    """

    before: NDArray[np.int64]
    after: NDArray[np.int64]
    removed: tuple[str, ...]
    added: tuple[str, ...]
    group: NDArray[np.int64]
    n_unknown: int = 0


def read_pairs(path: str | Path, store: StoreGroup) -> ImagePairs | Skipped:
    """The pairs of a table, or why there are none.

    Its columns `before` and `after` hold uris or, as whole numbers, source indices.
    """
    path = Path(path)
    try:
        table = read_table(path)
    except PipelineError as error:
        return Skipped(NAME, " ".join(str(error).split()))
    if not set(COLUMNS[:2]) <= set(table.column_names) or not set(COLUMNS[2:]) & set(table.column_names):
        return Skipped(
            NAME,
            f"{path.name} is not a table of pairs; it needs the columns before and after, and removed or added or "
            f"both, but its columns are {', '.join(table.column_names)}"
        )  # fmt: skip
    numbers = pa.types.is_integer(table["before"].type) and pa.types.is_integer(table["after"].type)
    column = "source_index" if numbers else "uri"
    names = store.images[column].to_pylist()
    position = {name: i for i, name in enumerate(names)}
    if len(position) < len(names):
        return Skipped(NAME, f"several images of {store.path.name} have the same {column}, so --pairs cannot name them")
    both = [[position.get(name, -1) for name in table[side].to_pylist()] for side in COLUMNS[:2]]
    before, after = (np.array(side, dtype=np.int64) for side in both)
    there = (before >= 0) & (after >= 0) & (before != after)
    if not there.any():
        return Skipped(
            NAME,
            f"no pair of {path.name} names two images of {store.path.name} by their {column}; extract the images "
            "of the pairs into the same store"
        )  # fmt: skip
    removed, added = (_read_texts(table, side, there) for side in COLUMNS[2:])
    before, after = before[there], after[there]
    return ImagePairs(before, after, removed, added, connect(before, after), int((~there).sum()))


def _read_texts(table: pa.Table, column: str, kept: NDArray[np.bool_]) -> tuple[str, ...]:
    if column not in table.column_names:
        return ("",) * int(kept.sum())
    texts: list[Any] = table[column].to_pylist()
    return tuple("" if text is None else str(text) for text, keep in zip(texts, kept.tolist(), strict=True) if keep)


def connect(before: NDArray[np.int64], after: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n] the number of the component that each pair belongs to, in the graph whose edges are the pairs."""
    images, places = np.unique(np.concatenate([before, after]), return_inverse=True)
    first, second = np.split(places, 2)
    least = np.arange(len(images))
    while True:
        lower = np.minimum(least[first], least[second])
        spread = least.copy()
        np.minimum.at(spread, first, lower)
        np.minimum.at(spread, second, lower)
        if (spread == least).all():
            return np.unique(least[first], return_inverse=True)[1]
        least = spread


def measure_pairs(
    subject: Subject, judged: Judged, attributes: Attributes, coalitions: NDArray[np.int64], pairs: ImagePairs
) -> Measured | Skipped:
    """The TAPAScore of a subject."""
    allowed = np.isin(pairs.before, judged.may_judge) & np.isin(pairs.after, judged.may_judge)
    if not allowed.any():
        return Skipped(
            NAME,
            f"each of the {len(pairs.before):,} pairs holds an image that a run has learned from, or that latents "
            "are chosen on; give pairs of images that are new to the runs, or --on-seen use"
        )  # fmt: skip
    known = {text: attributes.find(text) for text in {*pairs.removed, *pairs.added} - {""}}
    removed, added = (
        np.array([NONE if not text else -2 if known[text] is None else known[text] for text in side])
        for side in (pairs.removed, pairs.added)
    )
    told = (np.minimum(removed, added) > -2) & (np.maximum(removed, added) >= 0)
    kept = np.flatnonzero(allowed & told)
    if not len(kept):
        missing = next((text for text, number in known.items() if number is None), "")
        return Skipped(
            NAME,
            f"no pair differs in an attribute that can be measured, such as {attributes.names[0]!r}; the table of "
            f"pairs names {missing!r}"
        )  # fmt: skip
    before, after, removed, added = pairs.before[kept], pairs.after[kept], removed[kept], added[kept]
    deltas = find_deltas(subject, coalitions, before, after, removed, added)
    groups, group = np.unique(pairs.group[kept], return_inverse=True)
    resamples = Resamples(len(groups), judged.resamples.n, judged.seed)
    weights = draw_weights(resamples, np.arange(len(groups)))[:, group]
    value, of_removed, of_added = score_deltas(deltas, removed, added, weights)
    order = np.random.Generator(np.random.Philox(judged.seed)).permutation(len(kept))
    wrong = removed[order], added[order]
    shuffled, *_ = score_deltas(find_deltas(subject, coalitions, before, after, *wrong), *wrong, weights[:1])
    details: dict[str, object] = {
        "added": float(of_added[0]), "removed": float(of_removed[0]), "shuffled": float(shuffled[0]),
        "n_pairs": len(kept), "n_left_out": int((~allowed).sum()), "n_unknown": pairs.n_unknown,
        "n_of_other_attributes": int((allowed & ~told).sum()),
    }  # fmt: skip
    return Measured(NAME, float(value[0]), value[1:], True, details)


def find_deltas(
    subject: Subject, coalitions: NDArray[np.int64], before: NDArray[np.int64], after: NDArray[np.int64],
    removed: NDArray[np.int64], added: NDArray[np.int64],
) -> tuple[Array, Array]:  # fmt: skip
    """(delta of the removed attribute, delta of the added one) [n] of n pairs; 0 for an attribute that is -1.

    Args:
        before, after: [n] stored positions. removed, added: [n] numbers of attributes.
    """
    padded = np.concatenate([coalitions, np.full((1, coalitions.shape[1]), NONE)])  # of attribute -1
    latents = np.unique(padded)
    images = np.unique(np.concatenate([before, after]))
    fires = np.zeros((len(images), len(latents)), dtype=bool)
    for place, block in read_fires(subject.codes, images):
        fires[place] = take_latents(block, latents)
    rows = np.searchsorted(images, before)[:, None], np.searchsorted(images, after)[:, None]

    def find_delta(of: NDArray[np.int64], other: NDArray[np.int64]) -> Array:
        mine = padded[of]
        own = (mine != NONE) & ~(mine[:, :, None] == padded[other][:, None, :]).any(2)
        column = np.searchsorted(latents, mine)
        earlier, later = ((fires[row, column] & own).any(1).astype(np.float64) for row in rows)
        return np.asarray(later - earlier)

    return find_delta(removed, added), find_delta(added, removed)


def score_deltas(
    deltas: tuple[Array, Array], removed: NDArray[np.int64], added: NDArray[np.int64], weights: NDArray[np.int16]
) -> tuple[Array, Array, Array]:
    """(score, mean delta of the removed attributes, that of the added ones) [n + 1]; a mean of no pair is 0.

    Args:
        weights: [n + 1, pairs].
    """
    means = []
    for delta, of in zip(deltas, (removed, added), strict=True):
        count = (weights @ (of >= 0)).astype(np.float64)
        total = np.asarray(weights @ np.where(of >= 0, delta, 0.0), dtype=np.float64)
        mean = divide(total, count, count > 0)
        means.append(np.where(np.isnan(mean), np.nan_to_num(mean[:1]), mean))
    return means[1] - means[0], means[0], means[1]
