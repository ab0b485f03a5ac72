"""spread: a function on parts of a range, in as many threads as torch uses."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def spread(function: Callable[[int, int], T], edges: Sequence[int]) -> list[T]:
    """Call function(first, last) between consecutive edges, for the first part in this thread.

    The function must release the interpreter's lock to gain by it. Returns the results in order.
    """
    parts = [(first, last) for first, last in pairwise(edges) if last > first]
    if not parts:
        return []
    others = [_pool(torch.get_num_threads()).submit(function, first, last) for first, last in parts[1:]]
    try:
        own = function(*parts[0])
    finally:
        results = [other.result() for other in others]
    return [own, *results]


def cut_rows(n_rows: int) -> list[int]:
    """Edges of equal parts, one for each thread."""
    n = max(1, min(torch.get_num_threads(), n_rows))
    return [n_rows * i // n for i in range(n + 1)]


def cut_latents(starts: Tensor, first: int, last: int) -> list[int]:
    """Edges of parts of the latents first..last that have about the same number of entries. starts: [F + 1]."""
    n = torch.get_num_threads()
    low, high = int(starts[first]), int(starts[last])
    wanted = torch.tensor([low + (high - low) * i // n for i in range(1, n)], dtype=torch.int64)
    inner = torch.searchsorted(starts, wanted).clamp_(first, last).tolist()
    return [first, *inner, last]


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="kernels")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has no threads of its parent
