"""Units: what is read at once, and which rows it gives.

In: a store, or several, the images wanted, the tokens wanted. Out: for each unit how many wanted rows it gives, where
these lie in its memory, which (image, token) they are, and the reading itself. A unit of a raw local store is one
chunk (a block of images x one patch row, or the block's CLS tokens): one system call straight into the pool. Of a
compressed or remote store it is a whole block, since zarr would fetch all of it anyway.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from actcache import HookPoint, StoreGroup, Tokens

CLS = -1
"""In the place of a patch row."""


class Units:
    """Units in a fixed order: stores, then blocks, then patch rows; CLS last.

    Attributes:
        counts: [U] wanted rows.
        sizes: [U] rows of memory a unit takes.
    """

    def __init__(
        self, store: StoreGroup, hook_points: Sequence[HookPoint], images: NDArray[np.int64], tokens: Tokens
    ) -> None:
        """`images`: wanted stored positions over all stores, ascending."""
        self.store, self.hook_points, self.tokens = store, tuple(hook_points), tokens
        self.by_chunk = all(member.reads_chunks for member in store.stores)
        self._blocks = store.blocks(images)
        n_rows, n_columns = store.layout.grid
        self._parts = [CLS]
        if self.by_chunk:
            self._parts = [*(range(n_rows) if tokens != "cls" else ()), *((CLS,) if tokens != "patch" else ())]
        per_image = np.array([1 if part == CLS else n_columns for part in self._parts])
        n_tokens = store.n_read_tokens(tokens)  # refuses other words
        if not self.by_chunk:
            per_image = np.array([n_tokens])
        wanted = np.array([len(block) for block in self._blocks])
        whole = np.array([self._block_images(block) for block in self._blocks])
        self.counts = (wanted[:, None] * per_image).ravel()
        self.sizes = (whole[:, None] * per_image).ravel()
        self._per_image = per_image

    def rows(self, unit: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(place in the unit's memory, image, token) of its wanted rows."""
        number, part = divmod(unit, len(self._parts))
        images, n = self._blocks[number], int(self._per_image[part])
        inside = images - self._first(images)
        place = (inside[:, None] * n + np.arange(n)).ravel()
        if not self.by_chunk:
            first_token = 1 if self.tokens == "patch" else 0
        else:
            first_token = 0 if self._parts[part] == CLS else 1 + self._parts[part] * n
        return place, np.repeat(images, n), np.tile(np.arange(first_token, first_token + n), len(images))

    def read(self, unit: int, hook: HookPoint, out: NDArray[np.generic]) -> None:
        """Read a unit into `out` [size, D]. Raises CorruptError that names the shard."""
        number, part = divmod(unit, len(self._parts))
        images = self._blocks[number]
        first = self._first(images)
        index = int(np.searchsorted(self.store.starts, first, side="right")) - 1
        member, local = self.store.stores[index], first - int(self.store.starts[index])
        if self.by_chunk:
            row = self._parts[part]
            array = "cls" if row == CLS else "patches"
            block = local // member.layout.chunk_images
            shape = member.layout.chunk_shape(array)
            member.read_chunk(hook, block, max(row, 0), out.reshape(shape), array=array)
        else:
            span = slice(local, local + self._block_images(images))
            shape = (self._block_images(images), int(self._per_image[part]), member.layout.d_model)
            member.read(hook, images=span, tokens=self.tokens, out=out.reshape(shape))

    def _first(self, images: NDArray[np.int64]) -> int:
        """First image of the block that `images` lie in."""
        index = int(np.searchsorted(self.store.starts, images[0], side="right")) - 1
        start, size = int(self.store.starts[index]), self.store.stores[index].layout.chunk_images
        return start + (int(images[0]) - start) // size * size

    def _block_images(self, images: NDArray[np.int64]) -> int:
        """Images of memory a block takes: a chunk is always whole, zarr's last block is short."""
        index = int(np.searchsorted(self.store.starts, images[0], side="right")) - 1
        size = self.store.stores[index].layout.chunk_images
        return size if self.by_chunk else min(size, int(self.store.starts[index + 1]) - self._first(images))
