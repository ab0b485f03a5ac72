"""The batch that is being filled: which rows it takes from which places, and the copy of these rows.

With a compiler, the caller's thread and the loader's threads take pieces of a batch from one list, so that a thread
that waits for nothing else copies rows (`row_kernels.py`). Without one, `torch.index_select` copies them.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache.compiler import find_kernels

PIECE = 512
"""Rows that a thread copies at a time, 0.3 ms: the last piece holds up the others for that long at most."""

WORD = 8


class Batch(NamedTuple):
    """One batch. The next batch overwrites its tensors."""

    activations: Tensor  # [B, D] in the dtype of the store, at the first hook point
    image: Tensor  # [B] int64, the stored position over all stores
    token: Tensor  # [B] int64: 0 is CLS, 1 + row * columns + column is a patch
    others: tuple[Tensor, ...] = ()  # each [B, D]: the same rows at the other hook points


class BatchMemory:
    """The memory of the batch being filled: two that alternate where a copy to a GPU may still be running."""

    def __init__(self, n_rows: int, d_model: int, dtype: torch.dtype, *, n_hook_points: int, pin: bool) -> None:
        self._chosen: list[tuple[NDArray[np.int64], int, int, int]] = []
        self._sets = [_BatchSet(n_rows, d_model, dtype, n_hook_points, pin) for _ in range(2 if pin else 1)]
        self._kernels = find_kernels("saetrain.data.row_kernels") if d_model * dtype.itemsize % WORD == 0 else None

    def choose(self, rows: NDArray[np.int64], first: int, n: int, at: int) -> None:
        """Put the rows first..first + n of `rows` [N, 3], (place in the arena, image, token), at the places at..at + n
        of the batch.
        """
        self._chosen.append((rows, first, n, at))

    def gather(self, arena: list[Tensor], threads: ThreadPoolExecutor, n_helpers: int) -> None:
        """Copy the rows chosen so far out of the arenas [N, D], one per hook point.

        Args:
            threads: those that may help, which are `n_helpers` at most and only where they have nothing else to do.
        """
        batch, numbers = self._sets[0].batch, self._sets[0].numbers
        pairs = list(zip(arena, (batch.activations, *batch.others), strict=True))
        if self._kernels is None:
            for rows, first, n, at in self._chosen:
                chosen = torch.from_numpy(rows[first : first + n])
                numbers[:, at : at + n] = chosen[:, 1:].T
                for source, target in pairs:
                    _gather(source, chosen[:, 0].contiguous(), target[at : at + n])
        else:
            words = [(source.numpy().view(np.uint64), target.numpy().view(np.uint64)) for source, target in pairs]
            pieces = [
                (source, rows, first + i, min(PIECE, n - i), target, numbers.numpy(), at + i)
                for source, target in words
                for rows, first, n, at in self._chosen
                for i in range(0, n, PIECE)
            ]
            _share(self._kernels.draw_rows, pieces, threads, min(n_helpers, len(pieces) - 1))
        self._chosen.clear()

    def take(self) -> Batch:
        """The filled batch. The next one is filled from its beginning."""
        batch = self._sets[0].batch
        self._sets.reverse()
        return batch


class _BatchSet:
    """A batch, and its images and tokens side by side."""

    def __init__(self, n_rows: int, d_model: int, dtype: torch.dtype, n_hook_points: int, pin: bool) -> None:
        self.numbers = torch.empty(2, n_rows, dtype=torch.int64)
        values = [torch.empty(n_rows, d_model, dtype=dtype, pin_memory=pin) for _ in range(n_hook_points)]
        self.batch = Batch(values[0], self.numbers[0], self.numbers[1], tuple(values[1:]))


def _gather(source: Tensor, places: Tensor, target: Tensor) -> None:
    if source.element_size() * source.shape[1] % 4 == 0:  # gathering 32-bit words is 2.5 times faster
        source, target = source.view(torch.int32), target.view(torch.int32)
    torch.index_select(source, 0, places, out=target)


def _share(kernel: Any, pieces: Sequence[tuple[Any, ...]], threads: ThreadPoolExecutor, n_helpers: int) -> None:
    """Call the kernel for all pieces in this thread, and in others that are free before it is done."""
    numbers = count()

    def work() -> None:
        while (number := next(numbers)) < len(pieces):
            kernel(*pieces[number])

    helpers = [threads.submit(work) for _ in range(n_helpers)]
    work()
    for helper in helpers:
        if not helper.cancel():
            helper.result()
