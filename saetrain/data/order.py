"""Which rows come when: pure functions of (seed, epoch, stream, window). No files, no torch.

In: how many rows each *unit* gives (a unit is what is read at once: one chunk of a store). Out: windows of units, and
the order of rows in each. An epoch visits every row once. Its units are permuted and cut into virtual streams of equal
length; a stream is cut into windows; a window's rows are permuted. A batch takes the next batch_size / n_streams rows
of every stream, one behind the other. The windows of different streams end at different times (the first one of
stream v has (v + 1) / n_streams of the others' size), so that a batch always comes from windows of every age, and only
about one window has to be read while another is used up. Where everything fits the pool there is one window.

The position in the stream is (epoch, step): any step of any epoch is found without walking there. The partial last
batch of an epoch is dropped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

HELD_OUT_SHARE = 0.05


@dataclass(frozen=True)
class Window:
    """Rows `start`..`start + n_rows` of a stream, from consecutive units of the epoch's order.

    Attributes:
        units: [n].
        skip, stop: [n], which of each unit's rows belong to it; a unit is cut where a stream begins or ends only.
    """

    stream: int
    number: int
    start: int
    units: NDArray[np.int64]
    skip: NDArray[np.int64]
    stop: NDArray[np.int64]

    @property
    def n_rows(self) -> int:
        return int((self.stop - self.skip).sum())


def split_images(n_images: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training, held-out) images of stores with so many images each, numbered over all: each gives its last 5 %."""
    starts = np.cumsum([0, *n_images[:-1]])

    def gather(part: Callable[[int], range]) -> NDArray[np.int64]:
        return np.concatenate([s + np.array(part(n), dtype=np.int64) for s, n in zip(starts, n_images, strict=True)])

    return gather(train_images), gather(held_out_images)


def train_images(n_images: int) -> range:
    """All stored images but the last 5 % (at least one): the stored order is random already."""
    return range(n_images - n_held_out(n_images))


def held_out_images(n_images: int) -> range:
    """The last 5 % of the stored order; nothing is trained on them."""
    return range(n_images - n_held_out(n_images), n_images)


def n_held_out(n_images: int) -> int:
    return min(n_images - 1, max(1, round(HELD_OUT_SHARE * n_images)))


def count_steps(n_rows: int, batch_size: int) -> int:
    """Whole batches in an epoch."""
    return n_rows // batch_size


def plan_epoch(
    counts: NDArray[np.int64], *, batch_size: int, n_streams: int, window_rows: int, seed: int, epoch: int
) -> list[list[Window]]:
    """The windows of each stream of an epoch, in order.

    Args:
        counts: [U] rows of each unit, above 0.
        n_streams: divides batch_size.
        window_rows: rows of a window, rounded to whole units; at least all rows: one window for every stream.
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
    inner = np.unique(edges[np.searchsorted(edges, wanted)])  # at the borders of units
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
    """Permutation of a window's rows."""
    return _generator(seed, epoch, 1 + stream, window).permutation(n_rows)


def _generator(*words: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))
