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
from actcache.compiler import find_kernels
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
        self._images, self._edges = images, np.concatenate([[0], np.cumsum(wanted)])
        store_of = np.searchsorted(store.starts, images, side="right") - 1
        sizes = np.array([member.layout.chunk_images for member in store.stores])
        self._inside = (images - store.starts[store_of]) % sizes[store_of]  # place of each image in its block
        self._first_token = np.array([0 if part == CLS else 1 + part * n_columns for part in self._parts])
        self.counts = (wanted[:, None] * per_image).ravel()
        self.sizes = (whole[:, None] * per_image).ravel()
        self._per_image = per_image

    def list_rows(
        self,
        units: NDArray[np.int64],
        skip: NDArray[np.int64],
        stop: NDArray[np.int64],
        offsets: NDArray[np.int64],
        *,
        out: NDArray[np.int64],
    ) -> None:
        """List the rows skip..stop of the wanted rows of each unit, unit after unit.

        Args:
            offsets: where the memory of each unit begins.
            out: [n, 3] (place, image, token).
        """
        number, part = np.divmod(units, len(self._parts))
        arguments = self._edges[number], self._per_image[part], self._first_token[part], skip, stop, offsets
        kernels = find_kernels("saetrain.data.row_kernels")
        (list_rows if kernels is None else kernels.list_rows)(self._images, self._inside, *arguments, out)

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


def list_rows(
    images: NDArray[np.int64], inside: NDArray[np.int64], edge: NDArray[np.int64], per_image: NDArray[np.int64],
    first_token: NDArray[np.int64], skip: NDArray[np.int64], stop: NDArray[np.int64], offset: NDArray[np.int64],
    out: NDArray[np.int64],
) -> None:  # fmt: skip
    """What the kernel of the same name computes, in numpy."""
    n = stop - skip
    row = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n - skip, n)
    edge, per_image, first_token, offset = (np.repeat(column, n) for column in (edge, per_image, first_token, offset))
    position, column = np.divmod(row, per_image)
    image = edge + position
    out[:, 0] = offset + inside[image] * per_image + column
    out[:, 1], out[:, 2] = images[image], first_token + column


def order_rows(rows: NDArray[np.int64], order: NDArray[np.int64], out: NDArray[np.int64]) -> None:
    """Put row order[i] of `rows` [n, 3] at place i of `out` [n, 3]."""
    if (kernels := find_kernels("saetrain.data.row_kernels")) is not None:
        kernels.order_rows(rows, order, out)
    else:
        np.take(rows, order, axis=0, out=out)
