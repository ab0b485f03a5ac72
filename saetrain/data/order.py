"""The order of rows, as pure functions of (seed, epoch, stream, window). No files, no torch.

A *unit* is what is read at once: one chunk of a store. From the number of rows in each unit, this module plans windows
of units, and the order of rows in each window. An epoch visits every row once. Its units are permuted and cut into
virtual streams of equal length, each stream is cut into windows, and the rows of each window are permuted. A batch
takes the next batch_size / n_streams rows of every stream, one stream after the other. The windows of different
streams end at different times (the first window of stream v has (v + 1) / n_streams of the size of the others), so
that a batch always draws from windows of every age, and about one window has to be read while another is used up.
Where all rows fit in the pool, there is a single window.

A position is (epoch, step): any step of any epoch can be reached directly. The partial last batch of an epoch is
dropped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

HELD_OUT_SHARE = 0.05


@dataclass(frozen=True)
class Window:
    """Rows `start`..`start + n_rows` of a stream, from consecutive units in the order of the epoch.

    Attributes:
        units: [n].
        skip, stop: [n]; the rows skip..stop of each unit belong to the window. Only where a stream begins or ends is a
            unit cut.
    """

    stream: int
    number: int
    start: int
    units: NDArray[np.int64]
    skip: NDArray[np.int64]
    stop: NDArray[np.int64]

    @cached_property
    def n_rows(self) -> int:
        return int((self.stop - self.skip).sum())


def split_images(n_images: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The training and the held-out images of several stores, numbered over all. Each store holds out its last 5 %."""
    starts = np.cumsum([0, *n_images[:-1]])

    def gather(part: Callable[[int], range]) -> NDArray[np.int64]:
        return np.concatenate([s + np.array(part(n), dtype=np.int64) for s, n in zip(starts, n_images, strict=True)])

    return gather(train_images), gather(held_out_images)


def train_images(n_images: int) -> range:
    """All stored images except the last 5 % (at least one). The stored order is random already."""
    return range(n_images - n_held_out(n_images))


def held_out_images(n_images: int) -> range:
    """The last 5 % of the stored order, which are never trained on."""
    return range(n_images - n_held_out(n_images), n_images)


def n_held_out(n_images: int) -> int:
    return min(n_images - 1, max(1, round(HELD_OUT_SHARE * n_images)))


def count_steps(n_rows: int, batch_size: int) -> int:
    """The number of whole batches in an epoch."""
    return n_rows // batch_size


def plan_epoch(
    counts: NDArray[np.int64], *, batch_size: int, n_streams: int, window_rows: int, seed: int, epoch: int
) -> list[list[Window]]:
    """The windows of each stream of an epoch, in order.

    Args:
        counts: [U] number of rows in each unit, above 0.
        n_streams: must divide batch_size.
        window_rows: number of rows in a window, rounded to whole units. If it is at least the number of all rows, every
            stream has one window.
    """
    order = _generator(seed, epoch).permutation(len(counts))
    edges = np.concatenate([[0], np.cumsum(counts[order])])
    length = count_steps(int(edges[-1]), batch_size) * (batch_size // n_streams)
    return [
        _cut_stream(order, edges, stream, stream * length, (stream + 1) * length, window_rows, n_streams)
        for stream in range(n_streams)
    ]


def _cut_stream(
    order: NDArray[np.int64],
    edges: NDArray[np.int64],
    stream: int,
    begin: int,
    end: int,
    window_rows: int,
    n_streams: int,
) -> list[Window]:
    first = max(1, window_rows * (stream + 1) // n_streams)
    wanted = np.arange(begin + first, end, max(1, window_rows))
    inner = np.unique(edges[np.searchsorted(edges, wanted)])  # at the edges of units
    cuts = [begin, *inner[(inner > begin) & (inner < end)].tolist(), end]
    windows = []
    for number, (low, high) in enumerate(pairwise(cuts)):
        a = int(np.searchsorted(edges, low, side="right")) - 1
        b = int(np.searchsorted(edges, high, side="left"))
        skip = np.maximum(low - edges[a:b], 0)
        stop = np.minimum(high, edges[a + 1 : b + 1]) - edges[a:b]
        windows.append(Window(stream, number, low - begin, order[a:b], skip, stop))
    return windows


def window_order(n_rows: int, *, seed: int, epoch: int, stream: int, window: int) -> NDArray[np.int64]:
    """The permutation of the rows of a window."""
    return _generator(seed, epoch, 1 + stream, window).permutation(n_rows)


def _generator(*words: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))
