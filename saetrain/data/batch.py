"""The batches that are being filled: which rows they take from which places, and the copy of these rows.

With a compiler, the loader's threads and the caller's, once it waits, take pieces of a batch from one list, so that a
thread that has nothing else to do copies rows (`row_kernels.py`). Without one, `torch.index_select` copies them in the
caller's thread.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache.compiler import find_kernels

PIECE = 512
"""Rows that a thread copies at a time, 0.3 ms: the last piece holds up the others for that long at most."""

WORD = 8


class Batch(NamedTuple):
    """One batch. Its tensors are overwritten once the next batch is asked for."""

    activations: Tensor  # [B, D] in the dtype of the store, at the first hook point
    image: Tensor  # [B] int64, the stored position over all stores
    token: Tensor  # [B] int64: 0 is CLS, 1 + row * columns + column is a patch
    others: tuple[Tensor, ...] = ()  # each [B, D]: the same rows at the other hook points


class BatchMemory:
    """The batches that are being filled, each in memory of its own.

    While a batch is used, the next one is copied. Where a copy of the batch before to a GPU may still be running,
    there is one more.

    Args:
        threads: those that may help to copy, `n_helpers` at most.
    """

    def __init__(
        self, n_rows: int, d_model: int, dtype: torch.dtype, *, n_hook_points: int, pin: bool,
        threads: ThreadPoolExecutor, n_helpers: int,
    ) -> None:  # fmt: skip
        self._kernels = find_kernels("saetrain.data.row_kernels") if d_model * dtype.itemsize % WORD == 0 else None
        self._threads, self._n_helpers = threads, n_helpers if self._kernels else 0
        self._chosen: list[tuple[NDArray[np.int64], int, int, int]] = []
        self._idle = deque(_BatchSet(n_rows, d_model, dtype, n_hook_points, pin) for _ in range(3 if pin else 2))
        self._filling: deque[_BatchSet] = deque()

    def begin(self) -> None:
        """From here on, rows are chosen for the next batch."""
        self._filling.append(self._idle.popleft())

    def choose(self, rows: NDArray[np.int64], first: int, n: int, at: int) -> None:
        """Put the rows first..first + n of `rows` [N, 3], (place in the arena, image, token), at the places at..at + n
        of the batch.
        """
        self._chosen.append((rows, first, n, at))

    def copy(self, arena: list[Tensor]) -> None:
        """Begin to copy the rows chosen so far out of the arenas [N, D], one per hook point."""
        target = self._filling[-1]
        pairs = list(zip(arena, target.values, strict=True))
        if self._kernels is None:
            pieces = [
                partial(_gather, *pair, torch.from_numpy(rows[first : first + n]), target.numbers, at)
                for pair in pairs
                for rows, first, n, at in self._chosen
            ]
        else:
            words = [(source.numpy().view(np.uint64), values.numpy().view(np.uint64)) for source, values in pairs]
            pieces = [
                partial(draw, source, rows, first + i, min(PIECE, n - i), values, target.numbers.numpy(), at + i)
                for draw in (self._kernels.draw_rows,)
                for source, values in words
                for rows, first, n, at in self._chosen
                for i in range(0, n, PIECE)
            ]
        target.copies.append(_Copy(pieces, self._threads, self._n_helpers))
        self._chosen.clear()

    def wait(self) -> None:
        """Wait until all of these rows are copied."""
        for filling in self._filling:
            filling.wait()

    def take(self) -> Batch:
        """The batch that was begun first, filled."""
        filled = self._filling.popleft()
        filled.wait()
        self._idle.append(filled)
        return filled.batch


class _BatchSet:
    """A batch, its images and tokens side by side, and what is being copied into it."""

    def __init__(self, n_rows: int, d_model: int, dtype: torch.dtype, n_hook_points: int, pin: bool) -> None:
        self.numbers = torch.empty(2, n_rows, dtype=torch.int64)
        self.values = [torch.empty(n_rows, d_model, dtype=dtype, pin_memory=pin) for _ in range(n_hook_points)]
        self.batch = Batch(self.values[0], self.numbers[0], self.numbers[1], tuple(self.values[1:]))
        self.copies: list[_Copy] = []

    def wait(self) -> None:
        for copy in self.copies:
            copy.wait()
        self.copies.clear()


class _Copy:
    """Pieces of a batch, which threads take from one list; the thread that waits for them helps."""

    def __init__(self, pieces: Sequence[Callable[[], None]], threads: ThreadPoolExecutor, n_helpers: int) -> None:
        self._pieces, self._numbers = pieces, count()
        self._helpers = [threads.submit(self._work) for _ in range(min(n_helpers, len(pieces)))]

    def wait(self) -> None:
        self._work()
        for helper in self._helpers:
            if not helper.cancel():
                helper.result()

    def _work(self) -> None:
        while (number := next(self._numbers)) < len(self._pieces):
            self._pieces[number]()


def _gather(source: Tensor, target: Tensor, rows: Tensor, numbers: Tensor, at: int) -> None:
    """What the kernel does to one piece, by torch."""
    target, places = target[at : at + len(rows)], rows[:, 0].contiguous()
    numbers[:, at : at + len(rows)] = rows[:, 1:].T
    if source.element_size() * source.shape[1] % 4 == 0:  # gathering 32-bit words is 2.5 times faster
        source, target = source.view(torch.int32), target.view(torch.int32)
    torch.index_select(source, 0, places, out=target)
