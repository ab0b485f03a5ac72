"""Pure arithmetic of the format: (image, token) <-> shard, block, chunk, byte range. No file is touched here.

A *block* is `chunk_images` consecutive images. A chunk of the patches array is one block x one patch row x d_model.
Inside a shard the raw chunks lie token-major: all blocks of patch row 0, then all of row 1, ... and then the index.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from actcache.errors import SettingsError
from actcache.options import check_number

INDEX_ABSENT = 2**64 - 1
"""Offset and length of an absent chunk in a zarr shard index."""

Tokens = Literal["all", "patch", "cls"]
"""Which tokens of an image are read. Without CLS, `all` is the same as `patch`; registers are never among them."""

KNOWN_ARRAYS = ("patches", "cls", "registers", "extra")
"""Every array that a hook point may have; a store has `StoreLayout.arrays` of them."""

PREFIX_KINDS = ("cls", "reg", "dist")
"""Kinds of the tokens that come before the patches: CLS, a register, and DeiT's distillation token."""


@dataclass(frozen=True)
class StoreLayout:
    """Shapes of one store. All hook points share it.

    Attributes:
        grid: patch rows and columns; token 1 + row * columns + column is the patch at (row, column).
        n_extra: prompt tokens of an adapted model, which come after the patches; 0 for a plain model.
        itemsize: bytes per value.
        prefix: the kinds of the special tokens, in the order in which they come before the patches in the stream.
    """

    n_images: int
    grid: tuple[int, int]
    d_model: int
    chunk_images: int
    shard_images: int
    n_extra: int = 0
    itemsize: int = 2
    prefix: tuple[str, ...] = ("cls",)

    def check(self) -> None:
        """Raise ValueError unless the format allows this layout. Sizes are not limited."""
        for name, value, least in (
            ("n_images", self.n_images, 1),
            ("grid", self.grid[0], 1),
            ("grid", self.grid[1], 1),
            ("d_model", self.d_model, 1),
            ("chunk_images", self.chunk_images, 1),
            ("shard_images", self.shard_images, 1),
            ("n_extra", self.n_extra, 0),
        ):
            if type(value) is not int or not least <= value < 2**62:
                raise ValueError(f"{name} must be an integer of at least {least}, got {str(value)[:80]}")
        if self.shard_images % self.chunk_images:
            raise ValueError(f"shard_images {self.shard_images} is not a multiple of chunk_images {self.chunk_images}")
        if "cls" in self.prefix[1:] or not set(self.prefix) <= set(PREFIX_KINDS):
            shown = str(list(self.prefix))[:80]
            raise ValueError(f"prefix must hold {', '.join(PREFIX_KINDS)}, and cls only in front, got {shown}")

    @property
    def n_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @cached_property
    def has_cls(self) -> bool:
        return self.prefix[:1] == ("cls",)

    @cached_property
    def n_registers(self) -> int:
        """Special tokens other than CLS, which have an array of their own and no number."""
        return len(self.prefix) - self.has_cls

    @property
    def n_tokens(self) -> int:
        """Numbers that an image's tokens take: 0 for CLS, which may be absent, and 1 to P for the patches."""
        return 1 + self.n_patches

    @property
    def n_stream(self) -> int:
        """Tokens of the stream that a block takes: special tokens, patches and prompts."""
        return len(self.prefix) + self.n_patches + self.n_extra

    def token_kind(self, tokens: str) -> Tokens:
        """What `tokens` names here: `patch` instead of `all` where there is no CLS.

        Raises:
            SettingsError: no such kind of token, or `cls` where there is no CLS.
        """
        if tokens not in get_args(Tokens):
            raise SettingsError(f"--tokens must be one of {', '.join(get_args(Tokens))}, got {tokens!r}.")
        if tokens == "cls" and not self.has_cls:
            others = ", ".join(self.prefix) or "none"
            raise SettingsError(
                f"--tokens cls asks for CLS, but the model of this store has none (its special tokens: {others}). "
                "Use --tokens all or patch."
            )
        return "patch" if tokens == "all" and not self.has_cls else cast(Tokens, tokens)

    def n_read_tokens(self, tokens: str) -> int:
        """Number of tokens per image that are read. Raises SettingsError: see `token_kind`."""
        return {"all": self.n_tokens, "patch": self.n_patches, "cls": 1}[self.token_kind(tokens)]

    def token_places(self, tokens: str) -> tuple[slice, ...]:
        """Where the tokens that are read lie in the stream, in their order. Raises SettingsError: see `token_kind`."""
        kind, first = self.token_kind(tokens), len(self.prefix)
        cls, patches = slice(0, 1), slice(first, first + self.n_patches)
        if kind == "all":
            return (slice(0, patches.stop),) if first == 1 else (cls, patches)
        return (cls if kind == "cls" else patches,)

    @property
    def n_shards(self) -> int:
        return -(-self.n_images // self.shard_images)

    @property
    def blocks_per_shard(self) -> int:
        return self.shard_images // self.chunk_images

    def shard_range(self, shard: int) -> range:
        """The images of a shard."""
        first = shard * self.shard_images
        return range(first, min(first + self.shard_images, self.n_images))

    def n_blocks(self, shard: int) -> int:
        """Blocks that exist in a shard; the last shard may have fewer."""
        return -(-len(self.shard_range(shard)) // self.chunk_images)

    def block_range(self, shard: int, block: int) -> range:
        """The images of a block; the last block may be short (its chunks are padded with zeros)."""
        images = self.shard_range(shard)
        first = images.start + block * self.chunk_images
        return range(first, min(first + self.chunk_images, images.stop))

    def chunk_shape(self, array: str) -> tuple[int, ...]:
        """Chunk of `patches`, `cls`, `registers` or `extra`."""
        if array == "patches":
            return (self.chunk_images, self.grid[1], self.d_model)
        if array == "cls":
            return (self.chunk_images, self.d_model)
        return (self.chunk_images, self.n_registers if array == "registers" else self.n_extra, self.d_model)

    def array_shape(self, array: str) -> tuple[int, ...]:
        """Shape of a whole array."""
        tokens = {"patches": (self.n_patches,), "registers": (self.n_registers,), "extra": (self.n_extra,), "cls": ()}
        return (self.n_images, *tokens[array], self.d_model)

    def n_rows(self, array: str) -> int:
        """Chunks along the token axis."""
        return self.grid[0] if array == "patches" else 1

    def chunk_bytes(self, array: str) -> int:
        return math.prod(self.chunk_shape(array)) * self.itemsize

    def index_bytes(self, array: str) -> int:
        """Two uint64 (offset, length) for each chunk of a full shard, then a crc32c of 4 bytes."""
        return 16 * self.blocks_per_shard * self.n_rows(array) + 4

    def chunk_offset(self, array: str, shard: int, block: int, row: int) -> int:
        """Byte offset of a raw chunk in its shard."""
        return (row * self.n_blocks(shard) + block) * self.chunk_bytes(array)

    def shard_bytes(self, array: str, shard: int) -> int:
        """Size of a raw shard file, index included."""
        return self.n_blocks(shard) * self.n_rows(array) * self.chunk_bytes(array) + self.index_bytes(array)

    def raw_index(self, array: str, shard: int) -> NDArray[np.uint64]:
        """Index of a raw shard, [blocks_per_shard * n_rows, 2], in zarr's C order (block, row)."""
        index = np.full((self.blocks_per_shard, self.n_rows(array), 2), INDEX_ABSENT, dtype="<u8")
        n_blocks, chunk_bytes = self.n_blocks(shard), self.chunk_bytes(array)
        block, row = np.meshgrid(np.arange(n_blocks), np.arange(self.n_rows(array)), indexing="ij")
        index[:n_blocks, :, 0] = (row * n_blocks + block) * chunk_bytes
        index[:n_blocks, :, 1] = chunk_bytes
        return index.reshape(-1, 2)

    def arrays(self) -> tuple[str, ...]:
        """The arrays of a hook point, in the order in which they are written."""
        there = {"patches": True, "cls": self.has_cls, "registers": self.n_registers, "extra": self.n_extra}
        return tuple(array for array in KNOWN_ARRAYS if there[array])

    def statistics_kinds(self) -> tuple[str, ...]:
        """The kinds of tokens of which records hold statistics."""
        return ("cls", "patch") if self.has_cls else ("patch",)


def choose_shape(n_images: int, shard_images: int | None = None) -> tuple[int, int]:
    """(chunk_images, shard_images) for a store.

    Large stores have chunks of 64 images and shards of 256 to 1024; below 1,024 images, chunks of 16 keep the padding
    of the last block small. With a sixteenth of the images per shard there are enough shards to work in parallel.

    Raises:
        SettingsError: `shard_images` is not a positive multiple of 16.
    """
    if shard_images is None:
        chunk = 64 if n_images >= 1024 else 16
        return chunk, min(1024, max(256, -(-n_images // 16 // chunk) * chunk))
    shard_images = check_number("shard_images", shard_images, int, at_least=16)
    if shard_images % 16:
        raise SettingsError(f"--shard-images must be a positive multiple of 16, got {shard_images}.")
    return (64 if n_images >= 1024 and shard_images % 64 == 0 else 16), shard_images
