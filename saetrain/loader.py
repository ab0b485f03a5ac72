"""ActivationLoader: a store, or several of one model, in; shuffled batches out, without end.

Promises: the batch stream depends on the store, the split and (seed, batch_size, pool_tokens) only; `batches(step)`
continues exactly where a run of `step` batches left off; failed and held-out images never appear; a stream allocates
its pools and its batch once. A reading thread fills one pool while the other is consumed; its error surfaces here.
"""

from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from actcache import HookPoint, SettingsError, StoreGroup, Stores, Tokens, open_stores
from saetrain.order import plan_windows, split_images, window_order


class Batch(NamedTuple):
    """One batch. The tensors are overwritten by the next one."""

    activations: Tensor  # [B, D], the store's dtype
    image: Tensor  # [B] int64, stored position
    token: Tensor  # [B] int64, CLS is 0


class _Window(NamedTuple):
    rows: Tensor  # [N, D], a view of a pool
    images: Tensor  # [N / tokens]
    order: Tensor  # [N] permutation


class ActivationLoader:
    """Shuffled training batches of one hook point.

    loader = ActivationLoader(store, 10, batch_size=4096, seed=0)
    for batch in loader.batches(): ...
    """

    def __init__(
        self,
        store: Stores | StoreGroup,
        layer: int | HookPoint | None = None,
        *,
        tokens: str = "all",
        batch_size: int = 4096,
        seed: int = 0,
        pool_tokens: int = 1 << 18,
    ) -> None:
        self.store = open_stores(store)
        self.hook_point = self.store.hook_point(layer)
        self.tokens = cast(Tokens, tokens)
        self.tokens_per_image = self.store.n_read_tokens(self.tokens)
        self.batch_size = batch_size
        self.seed = seed
        self.pool_tokens = pool_tokens
        if batch_size < 1:
            raise SettingsError(f"--batch-size must be at least 1, got {batch_size}.")
        positions, _ = split_images([member.n_images for member in self.store.stores])
        self._images = positions[self.store.valid[positions]]
        self._blocks = self.store.blocks(self._images)
        if self.n_rows < batch_size:
            raise SettingsError(
                f"{self.store.path} has {self.n_rows:,} training tokens, fewer than one batch of {batch_size:,}. "
                "Lower --batch-size or extract more images."
            )
        self._all_rows: Tensor | None = None  # once they have been read whole

    @property
    def n_rows(self) -> int:
        """Rows of one epoch, before the partial last batch is dropped."""
        return len(self._images) * self.tokens_per_image

    @property
    def steps_per_epoch(self) -> int:
        return self.n_rows // self.batch_size

    def batches(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """Batches start_step, start_step + 1, ... of the endless stream of epochs."""
        epoch, step = divmod(start_step, self.steps_per_epoch)
        d_model, first_token = self.store.layout.d_model, 0 if self.tokens != "patch" else 1
        activations = torch.empty(self.batch_size, d_model, dtype=_torch_dtype(self.store))
        rows = torch.empty(self.batch_size, dtype=torch.int64)
        image = torch.empty_like(rows)
        pools: dict[int, Tensor] = {}  # this stream's own: two streams may run side by side
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as reader:
            while True:
                skip, filled, left = step * self.batch_size, 0, self.steps_per_epoch - step
                for window in self._windows(epoch, skip, reader, pools):
                    position = min(skip, len(window.order))
                    skip -= position
                    while position < len(window.order) and left:
                        n = min(self.batch_size - filled, len(window.order) - position)
                        part = slice(filled, filled + n)
                        torch.index_select(window.rows, 0, window.order[position : position + n], out=activations[part])
                        rows[part] = window.order[position : position + n]
                        image[part] = window.images[rows[part] // self.tokens_per_image]
                        filled += n
                        position += n
                        if filled == self.batch_size:
                            yield Batch(activations, image, rows % self.tokens_per_image + first_token)
                            filled, left = 0, left - 1
                epoch, step = epoch + 1, 0

    def _windows(
        self, epoch: int, skip_rows: int, reader: ThreadPoolExecutor, pools: dict[int, Tensor]
    ) -> Iterator[_Window]:
        """The windows of an epoch in order, one read ahead. Windows wholly before `skip_rows` are not read."""
        plan = plan_windows(
            self._blocks,
            tokens_per_image=self.tokens_per_image,
            block_images=self.store.layout.chunk_images,
            pool_tokens=self.pool_tokens,
            seed=self.seed,
            epoch=epoch,
        )
        if len(plan) == 1:
            yield self._whole(epoch)
            return
        first = 0
        while first < len(plan) and skip_rows >= len(plan[first]) * self.tokens_per_image:
            skip_rows -= len(plan[first]) * self.tokens_per_image
            rows = len(plan[first]) * self.tokens_per_image
            empty = torch.empty(0, dtype=torch.int64)
            yield _Window(empty, empty, torch.empty(rows, dtype=torch.int64))  # wholly skipped by the caller
            first += 1
        ahead: Future[_Window] | None = None
        for window in range(first, len(plan)):
            current = ahead or reader.submit(self._read, plan[window], epoch, window, pools)
            ready = current.result()
            ahead = None
            if window + 1 < len(plan):
                ahead = reader.submit(self._read, plan[window + 1], epoch, window + 1, pools)
            yield ready

    def _read(self, images: np.ndarray, epoch: int, window: int, pools: dict[int, Tensor]) -> _Window:
        order = window_order(len(images) * self.tokens_per_image, seed=self.seed, epoch=epoch, window=window)
        return _Window(self._fill(pools, window % 2, images), torch.from_numpy(images), torch.from_numpy(order))

    def _whole(self, epoch: int) -> _Window:
        """All rows, read once and kept: only the permutation is new each epoch."""
        if self._all_rows is None:
            self._all_rows = self._fill({}, 0, self._images)
        order = window_order(self.n_rows, seed=self.seed, epoch=epoch, window=0)
        return _Window(self._all_rows, torch.from_numpy(self._images), torch.from_numpy(order))

    def _fill(self, pools: dict[int, Tensor], slot: int, images: np.ndarray) -> Tensor:
        """Read images into pool `slot`, which grows to the largest window and is then reused."""
        n_rows = len(images) * self.tokens_per_image
        pool = pools.get(slot)
        if pool is None or len(pool) < n_rows:
            pool = torch.empty(n_rows, self.store.layout.d_model, dtype=_torch_dtype(self.store))
            pools[slot] = pool
        out = pool[:n_rows].view(len(images), self.tokens_per_image, -1).numpy()
        self.store.read(self.hook_point, images=images, tokens=self.tokens, out=out)
        return pool[:n_rows]


def _torch_dtype(store: StoreGroup) -> torch.dtype:
    return {2: torch.float16, 4: torch.float32}[store.dtype.itemsize]
