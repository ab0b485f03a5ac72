"""Units: the pieces that are read at once, and the rows that each of them contains.

Given stores, images and a kind of token, this module says for each unit how many of the wanted rows it contains, where
they are in its memory and which (image, token) each one is, and it reads the unit. A unit is one chunk (a block of
images x one patch row, or the CLS tokens of the block), whatever the codec and wherever the store is, so the order of
rows depends on neither.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from actcache import ActivationStore, HookPoint
from actcache.store import StoreGroup, Tokens

CLS = -1
"""Stands in place of the number of a patch row."""


class Units:
    """Units in a fixed order: by store, then block, then patch row, with CLS last.

    Attributes:
        counts: [U] number of wanted rows.
        sizes: [U] rows of memory that a unit needs.
    """

    def __init__(
        self,
        store: StoreGroup,
        hook_points: Sequence[HookPoint],
        images: NDArray[np.int64],
        tokens: Tokens,
        *,
        check: bool = False,
    ) -> None:
        """`images` are the wanted stored positions over all stores, ascending; `check` as in `read_chunk`."""
        self.store, self.hook_points, self.tokens, self.check = store, tuple(hook_points), tokens, check
        self._blocks = store.blocks(images)
        n_rows, n_columns = store.layout.grid
        kind = store.layout.token_kind(tokens)
        self._parts = [*(range(n_rows) if kind != "cls" else ()), *((CLS,) if kind != "patch" else ())]
        per_image = np.array([1 if part == CLS else n_columns for part in self._parts])
        wanted = np.array([len(block) for block in self._blocks])
        whole = np.array([self._member(block).layout.chunk_images for block in self._blocks])
        self.counts = (wanted[:, None] * per_image).ravel()
        self.sizes = (whole[:, None] * per_image).ravel()
        self._per_image = per_image

    def rows(self, unit: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The place in the unit's memory, the image and the token of each wanted row."""
        number, part = divmod(unit, len(self._parts))
        images, n = self._blocks[number], int(self._per_image[part])
        inside = (images - self._start(images)) % self._member(images).layout.chunk_images
        place = (inside[:, None] * n + np.arange(n)).ravel()
        first_token = 0 if self._parts[part] == CLS else 1 + self._parts[part] * n
        return place, np.repeat(images, n), np.tile(np.arange(first_token, first_token + n), len(images))

    def read(self, unit: int, hook: HookPoint, out: NDArray[np.generic]) -> None:
        """Read a unit into `out` [size, D]. Raises a CorruptError that names the shard."""
        number, part = divmod(unit, len(self._parts))
        images, row = self._blocks[number], self._parts[part]
        member, array = self._member(images), "cls" if row == CLS else "patches"
        block = (int(images[0]) - self._start(images)) // member.layout.chunk_images
        chunk = out.reshape(member.layout.chunk_shape(array))
        member.read_chunk(hook, block, max(row, 0), chunk, array=array, check=self.check)

    def _start(self, images: NDArray[np.int64]) -> int:
        """The first image of the store that contains a block."""
        return int(self.store.starts[self._index(images)])

    def _member(self, images: NDArray[np.int64]) -> ActivationStore:
        return self.store.stores[self._index(images)]

    def _index(self, images: NDArray[np.int64]) -> int:
        return int(np.searchsorted(self.store.starts, images[0], side="right")) - 1
