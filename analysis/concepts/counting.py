"""All statistics of a range of latents in one pass of a compiled loop, where there is a compiler.

In: codes, and a range of latents. Out: the same values as the statistics of statistics.py and histograms.py, which
remain the way without a compiler.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache.compiler import find_kernels
from analysis.concepts.config import AnalyzeConfig
from analysis.concepts.files import ClassSummary, CountRows, shorten
from analysis.concepts.histograms import N_BINS, EntryCounts, trim_bins
from analysis.concepts.statistics import ClassCounts, TopImages, Totals, place_labels, present_labels
from analysis.reduce import RangeCounter, last_bits, tokens_per_image
from saetrain import CodeStore
from saetrain.codes import read_batches

BATCH_ENTRIES = 1 << 24
"""Entries that are counted at once; they take 100 MB."""

MOST_TOKENS = 1 << 19
"""The kernel divides by the number of tokens with this precision."""

LEAST_ENTRIES = 1 << 22
"""Entries of all codes from which the kernel is worth it: it takes 0.7 s to load the compiler and the machine code, in
which numpy counts four million entries (one core AMD EPYC, AVX2).
"""


class RangeCounts(NamedTuple):
    """What the kernel counts of n latents. There are two lists of top images: by the image's score, and by patch."""

    tally: NDArray[np.int64]  # [n, 5] entries, images, entries at CLS; bits of the largest value of a patch, of CLS
    total: NDArray[np.float64]  # [n, 2] sum of all values, and of those at CLS
    strength: NDArray[np.uint32]  # [n, N_BINS]
    position: NDArray[np.uint32]  # [n, T]
    top_score: NDArray[np.float64]  # [2, n, n_top] descending; 0 where there is no image
    top_place: NDArray[np.int64]  # [2, n, n_top] row of the strongest patch, or of CLS, << 16 | bits of the maximum

    @classmethod
    def zeros(cls, n: int, n_tokens: int, n_top: int) -> "RangeCounts":
        return cls(
            np.zeros((n, 5), np.int64), np.zeros((n, 2)), np.zeros((n, N_BINS), np.uint32),
            np.zeros((n, n_tokens), np.uint32), np.zeros((2, n, n_top)), np.zeros((2, n, n_top), np.int64),
        )  # fmt: skip


class ClassColumns(NamedTuple):
    """What the kernel makes of the class counts; see `ClassSummary`."""

    labels: NDArray[np.float64]  # [C] their numbers
    n_classes: NDArray[np.int64]  # [n]
    place: NDArray[np.uint32]  # [as many rows as there may be]
    n_tokens: NDArray[np.uint32]
    n_images: NDArray[np.uint32]
    spread: NDArray[np.float64]  # [2, n, 2] over the top images, and over all: entropy and deviation

    @classmethod
    def empty(cls, labels: NDArray[np.int32], n: int, n_rows: int) -> "ClassColumns":
        place, n_tokens, n_images = (np.empty(n_rows + 1, np.uint32) for _ in range(3))  # one more is written
        spread = np.empty((2, n, 2))
        return cls(labels.astype(np.float64), np.zeros(n, np.int64), place, n_tokens, n_images, spread)


def range_counter(labels: NDArray[np.int32], config: AnalyzeConfig) -> RangeCounter:
    """What `reduce_latents` may count a range with.

    Args:
        labels: [I], -1 for no label.
    """
    return partial(_count_range, present=present_labels(labels), place=place_labels(labels), config=config)


def _count_range(
    codes: CodeStore, latents: range, *, present: NDArray[np.int32], place: NDArray[np.int32], config: AnalyzeConfig
) -> dict[str, object] | None:
    """The values of all statistics by name; None without a compiler, for few entries, or where a row takes more than 32
    bits.
    """
    fits = codes.dtypes["row"] == np.uint32 and codes.n_tokens < MOST_TOKENS
    if not fits or codes.n_entries < LEAST_ENTRIES or (kernels := find_kernels("analysis.concepts.kernels")) is None:
        return None
    settings = codes.n_tokens, last_bits(config.tau), place, float(tokens_per_image(codes)), config.score == "max"
    n, n_classes, n_entries = len(latents), len(present), 0
    counts, cells = RangeCounts.zeros(n, codes.n_tokens, config.n_top), _class_counts(0, n_classes)
    columns = ClassColumns.empty(present, 0, 0)
    for batch in read_batches(codes, latents.start, latents.stop, BATCH_ENTRIES):
        if not len(cells.total):  # entries that come all at once need the cells of one latent only
            cells = _class_counts(1 if batch.is_last else n, n_classes)
        n_entries += len(batch.row)
        if batch.is_last:
            columns = ClassColumns.empty(present, n, min(n * n_classes, n_entries))
        entries = batch.pointers, batch.row, batch.value.view(np.uint16)
        n_rows = kernels.count_entries(*entries, *settings, counts, cells, columns)
    return {
        "totals": _describe_totals(codes, counts),
        "top": _list_top(counts, 0, codes.n_tokens),
        "top_patches": _list_top(counts, 1, codes.n_tokens),
        "classes": _summarize(columns, n_rows),
        "entries": EntryCounts(*trim_bins(counts.strength), counts.position),
    }


def _class_counts(n: int, n_classes: int) -> ClassCounts:
    shape = n, n_classes
    return ClassCounts(np.zeros(shape, np.uint32), np.zeros(shape, np.uint32), np.zeros(shape))


def _summarize(columns: ClassColumns, n_rows: int) -> ClassSummary:
    place, n_tokens, n_images = (shorten(column[:n_rows]) for column in columns[2:5])
    top, all_images = ((spread[:, 0], spread[:, 1]) for spread in columns.spread)
    return ClassSummary(CountRows(columns.n_classes, place, n_tokens, n_images), top, all_images)


def _describe_totals(codes: CodeStore, counts: RangeCounts) -> Totals:
    n_valid = int(codes.valid.sum())
    fired, images, cls, *_ = counts.tally.T.copy()
    maximum_patch, maximum_cls = (_to_values(bits) for bits in counts.tally[:, 3:].T)
    return Totals(
        n_images=n_valid,
        n_tokens=n_valid * tokens_per_image(codes),
        n_cls=0 if codes.tokens == "patch" else n_valid,
        fired_tokens=fired,
        fired_images=images,
        fired_cls=cls,
        total=counts.total[:, 0],
        total_cls=counts.total[:, 1],
        maximum_patch=maximum_patch,
        maximum_cls=maximum_cls,
    )


def _list_top(counts: RangeCounts, which: int, n_tokens: int) -> TopImages:
    filled = counts.top_score[which] > 0
    score, place = counts.top_score[which][filled], counts.top_place[which][filled]
    image, token = np.divmod(place >> 16, n_tokens)
    return TopImages(
        latent=np.repeat(np.arange(len(filled), dtype=np.int32), np.count_nonzero(filled, axis=1)),
        image=image.astype(np.int32),
        score=score.astype(np.float32) if which else score,
        peak=_to_values(place & 0xFFFF),
        peak_patch=np.where(token > 0, token, -1).astype(np.int32),
    )


def _to_values(bits: NDArray[np.int64]) -> NDArray[np.float32]:
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)
