"""ActivationLoader: an endless stream of shuffled batches from one store, or from several of one model.

The batches depend only on the stores, the chosen images and (seed, batch_size, n_streams, pool_tokens), not on the
number of threads or processes. `batches(step)` continues exactly where a run of `step` batches stopped. Failed,
held-out and unwanted images never appear. Memory is allocated once per stream of batches. Threads read windows ahead,
chunk by chunk, straight into their pool. An error in a thread is raised here and names the shard, and no thread is left
once the generator is closed.
"""

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import gcd
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache import HookPoint, SettingsError, open_stores
from actcache.options import check_number
from actcache.store import StoreGroup, Stores, Tokens, aligned_empty
from saetrain.data.batch import Batch, BatchMemory
from saetrain.data.chunks import Units, order_rows
from saetrain.data.order import Window, count_steps, plan_epoch, split_images, window_order

PREFETCHED = 2
"""Number of windows that are read ahead of those in use."""


class ActivationLoader:
    """Shuffled training batches.

    loader = ActivationLoader(store, 10, batch_size=4096, seed=0)
    for batch in loader.batches(): ...

    Args:
        store: one store, or several of one model.
        layer: one hook point, or several; a batch then holds the same rows of each.
        tokens: all (CLS, if the model has it, and patches), patch or cls.
        images: stored positions to draw from; None draws from the training images.
        pool_tokens: number of tokens in memory. If all tokens fit, they are shuffled in one permutation, else in
            windows of n_streams streams.
        n_streams: number of virtual streams, lowered to a divisor of batch_size.
        rank, world_size: rank r gets the rows of the streams v with v % world_size == r, so that all ranks together
            see what one process would see.
        pin_memory: whether batches are in page-locked memory, for copies to a GPU.
        n_threads: number of threads that read, and help to fill a batch while there is nothing to read; affects speed
            only.
        check: compare each chunk with its recorded checksum when it is first read. Training at 20,000 tokens/s loses
            0.2 % by it; reading alone loses a third.
    """

    def __init__(
        self,
        store: Stores | StoreGroup,
        layer: int | HookPoint | Sequence[int | HookPoint] | None = None,
        *,
        tokens: Tokens = "all",
        batch_size: int = 4096,
        seed: int = 0,
        images: NDArray[np.int64] | None = None,
        pool_tokens: int = 1 << 18,
        n_streams: int = 8,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        n_threads: int = 2,
        check: bool = False,
    ) -> None:
        self.store = open_stores(store)
        layers = layer if isinstance(layer, list | tuple) else [cast("int | HookPoint | None", layer)]
        self.hook_points = tuple(self.store.hook_point(each) for each in layers)
        batch_size = check_number("batch_size", batch_size, int, at_least=1)
        seed = check_number("seed", seed, int, at_least=0)
        pool_tokens = check_number("pool_tokens", pool_tokens, int, at_least=0)
        n_streams = check_number("n_streams", n_streams, int, at_least=1)
        n_threads = check_number("n_threads", n_threads, int, at_least=1)
        self.batch_size, self.seed, self.pool_tokens = batch_size, seed, pool_tokens
        self.n_streams = gcd(batch_size, n_streams)
        if self.n_streams % world_size:
            raise SettingsError(
                f"{world_size} processes cannot share {self.n_streams} streams. Choose --batch-size and --n-streams so "
                "that the number of processes divides both."
            )
        self.rank, self.world_size, self.pin_memory, self.n_threads = rank, world_size, pin_memory, n_threads
        if images is None:
            images, _ = split_images([member.n_images for member in self.store.stores])
        images = images[self.store.valid[images]]
        self._units = Units(self.store, self.hook_points, images, tokens, check=check)
        if self.n_rows < batch_size:
            raise SettingsError(
                f"{self.store.path} has {self.n_rows:,} training tokens, fewer than one batch of {batch_size:,}. "
                "Lower --batch-size or extract more images."
            )
        self._whole: tuple[list[Tensor], NDArray[np.int64]] | None = None  # all rows, where they fit in memory

    @property
    def n_rows(self) -> int:
        """Number of training tokens in an epoch."""
        return int(self._units.counts.sum())

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch."""
        return count_steps(self.n_rows, self.batch_size)

    @property
    def fits(self) -> bool:
        """Whether all rows are held in memory at once."""
        return self.n_rows <= self.pool_tokens

    def batches(self, step: int = 0) -> Generator[Batch, None, None]:
        """Yield batches from number `step` on, without end. Each rank gets batch_size / world_size rows of a batch."""
        part = self.batch_size // self.n_streams
        streams = range(self.rank, self.n_streams, self.world_size)
        source = _Whole(self, streams) if self.fits else _Windows(self, streams)
        memory = BatchMemory(
            part * len(streams), self.store.layout.d_model, _torch_dtype(self.store),
            n_hook_points=len(self.hook_points), pin=self.pin_memory, threads=source.threads,
            n_helpers=self.n_threads - 1,
        )  # fmt: skip
        epoch, step = divmod(step, self.steps_per_epoch)
        try:
            while True:
                source.begin(epoch, step)
                for number in range(step, self.steps_per_epoch):
                    failed = _begin_batch(memory, source, streams, number * part, part)
                    if number > step:  # the batch before, while this one is copied
                        batch = memory.take()
                        source.recycle()
                        yield batch
                    if failed is not None:
                        raise failed
                batch = memory.take()
                source.recycle(spent=True)
                yield batch
                epoch, step = epoch + 1, 0
        finally:
            source.close()


def _begin_batch(
    memory: BatchMemory, source: "_Whole | _Windows", streams: range, first: int, n_rows: int
) -> Exception | None:
    """Begin to copy the rows first..first + n_rows of each stream. Returns the error of reading them, if there is one.

    The batch before is whole, and must not be lost by it.
    """
    memory.begin()
    try:
        for slot, stream in enumerate(streams):
            row, end, at = first, first + n_rows, slot * n_rows
            while row < end:
                if not source.has(stream, row):  # all pools hold rows that have to be copied first
                    memory.copy(source.arena)
                    memory.wait()
                    source.recycle(spent=True)
                pool, offset, n = source.find(stream, row, end)
                memory.choose(pool.rows, offset, n, at)
                row, at = row + n, at + n
    except Exception as error:
        return error
    memory.copy(source.arena)
    return None


class _Pool:
    """A part of the arena: the rows of some units, which are read once and then drawn in a fixed order."""

    def __init__(self, units: Units, arena: list[Tensor], base: int) -> None:
        self.units, self.base = units, base
        self.arrays = [array.numpy() for array in arena]
        self.read, self.rows = (np.empty((0, 3), dtype=np.int64) for _ in range(2))
        self.n_rows = 0

    def fill(self, units: NDArray[np.int64], skip: NDArray[np.int64], stop: NDArray[np.int64]) -> None:
        """Read units, and keep the rows skip..stop of the wanted rows of each."""
        sizes = self.units.sizes[units]
        offsets = self.base + np.cumsum(sizes) - sizes
        for unit, offset, size in zip(units.tolist(), offsets.tolist(), sizes.tolist(), strict=True):
            for hook, array in zip(self.units.hook_points, self.arrays, strict=True):
                self.units.read(unit, hook, array[offset : offset + size])
        self.n_rows = int((stop - skip).sum())
        self.read = _enlarge(self.read, self.n_rows)
        self.units.list_rows(units, skip, stop, offsets, out=self.read[: self.n_rows])

    def permute(self, order: NDArray[np.int64]) -> None:
        """Set the order in which rows are drawn."""
        self.rows = _enlarge(self.rows, self.n_rows)
        order_rows(self.read[: self.n_rows], order, self.rows[: self.n_rows])


def _enlarge(rows: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Memory for n rows, the same again if it is enough: new memory costs a fault for each of its pages."""
    return rows if len(rows) >= n else np.empty((n, 3), dtype=np.int64)


def _make_arena(loader: ActivationLoader, n_rows: int) -> list[Tensor]:
    """Allocate [n_rows, D] for each hook point, aligned to a page."""
    shape = (n_rows, loader.store.layout.d_model)
    return [torch.from_numpy(aligned_empty(shape, loader.store.dtype)) for _ in loader.hook_points]


class _Whole:
    """All rows, which the loader reads once and keeps; each epoch only permutes them again."""

    def __init__(self, loader: ActivationLoader, streams: range) -> None:
        self.loader, units = loader, loader._units
        if loader._whole is None:
            arena = _make_arena(loader, int(units.sizes.sum()))
            pool = _Pool(units, arena, 0)
            pool.fill(np.arange(len(units.counts)), np.zeros_like(units.counts), units.counts)
            loader._whole = arena, pool.read
        self.arena, read = loader._whole
        self.pool = _Pool(units, self.arena, 0)  # a pool with its own order, since two generators may run side by side
        self.pool.read, self.pool.n_rows = read, len(read)
        self.threads = ThreadPoolExecutor(loader.n_threads, thread_name_prefix="loader")  # no thread before it is used
        self.length = loader.steps_per_epoch * (loader.batch_size // loader.n_streams)

    def begin(self, epoch: int, step: int) -> None:
        self.pool.permute(window_order(self.loader.n_rows, seed=self.loader.seed, epoch=epoch, stream=0, window=0))

    def has(self, stream: int, row: int) -> bool:
        return True

    def find(self, stream: int, row: int, end: int) -> tuple[_Pool, int, int]:
        return self.pool, stream * self.length + row, end - row

    def recycle(self, *, spent: bool = False) -> None:
        pass

    def close(self) -> None:
        self.threads.shutdown(cancel_futures=True)


class _Windows:
    """The windows of an epoch, read ahead in the order in which they are needed, into pools that are reused."""

    def __init__(self, loader: ActivationLoader, streams: range) -> None:
        self.loader, self.streams = loader, streams
        self.threads = ThreadPoolExecutor(loader.n_threads, thread_name_prefix="loader")
        self.arena: list[Tensor] = []
        self.capacity = 0
        self.free: list[_Pool] = []
        self.spent: list[_Pool] = []  # by rows that are not copied yet
        self.left: list[_Pool] = []  # spent before the last batch was begun
        self.ahead: dict[int, deque[tuple[Window, Future[_Pool]]]] = {stream: deque() for stream in streams}

    def begin(self, epoch: int, step: int) -> None:
        """Plan an epoch, and start to read the windows that its step `step` needs first."""
        loader = self.loader
        part = loader.batch_size // loader.n_streams
        plan = plan_epoch(
            loader._units.counts,
            batch_size=loader.batch_size,
            n_streams=loader.n_streams,
            window_rows=max(1, loader.pool_tokens // (loader.n_streams + PREFETCHED)),
            seed=loader.seed,
            epoch=epoch,
        )
        windows = [w for stream in self.streams for w in plan[stream]]
        largest = max(int(loader._units.sizes[window.units].sum()) for window in windows)
        self.free += [done.result() for queue in self.ahead.values() for _, done in queue]
        for queue in self.ahead.values():
            queue.clear()
        if largest > self.capacity:
            n_pools = len(self.streams) + PREFETCHED
            self.capacity, self.arena = largest, _make_arena(loader, n_pools * largest)
            self.free = [_Pool(loader._units, self.arena, number * largest) for number in range(n_pools)]
        self.epoch = epoch
        needed = [window for window in windows if window.start + window.n_rows > step * part]
        self.schedule = deque(sorted(needed, key=lambda window: (window.start // part, window.stream)))
        self._read_ahead()

    def has(self, stream: int, row: int) -> bool:
        """Whether the window of this row has been read or is being read."""
        queue = self.ahead[stream]
        while queue and row >= queue[0][0].start + queue[0][0].n_rows:
            _, done = queue.popleft()
            self.spent.append(done.result())
        return bool(queue)

    def recycle(self, *, spent: bool = False) -> None:
        """Read the next windows into the pools that were used up before the last batch was begun, whose rows must have
        been copied; with `spent`, into all that are used up.
        """
        self.free += self.left
        self.left, self.spent = self.spent, []
        if spent:
            self.recycle()
        else:
            self._read_ahead()

    def find(self, stream: int, row: int, end: int) -> tuple[_Pool, int, int]:
        """The pool of a stream's row `row`, its offset there, and how many rows follow in this window, up to `end`."""
        window, ready = self.ahead[stream][0]
        return ready.result(), row - window.start, min(end, window.start + window.n_rows) - row

    def close(self) -> None:
        self.threads.shutdown(cancel_futures=True)

    def _read_ahead(self) -> None:
        while self.free and self.schedule:
            window = self.schedule.popleft()
            self.ahead[window.stream].append((window, self.threads.submit(self._read, window, self.free.pop())))

    def _read(self, window: Window, pool: _Pool) -> _Pool:
        pool.fill(window.units, window.skip, window.stop)
        seed, stream, number = self.loader.seed, window.stream, window.number
        pool.permute(window_order(window.n_rows, seed=seed, epoch=self.epoch, stream=stream, window=number))
        return pool


def _torch_dtype(store: StoreGroup) -> torch.dtype:
    return {2: torch.float16, 4: torch.float32}[store.dtype.itemsize]
