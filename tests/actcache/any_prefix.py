"""Stores of any prefix whose values say where they belong: (image, kind, row, column), exact in float16.

A value that is read in the wrong place names the place that it comes from. No model is involved.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from small_store import make_settings, write_store

CLS, PATCH, PROMPT, REGISTER = 1, 2, 3, 4
D_MODEL = 4


def encode_places(
    n_images: int, prefix: Sequence[str], grid: tuple[int, int], n_extra: int = 0, hook: int = 0
) -> NDArray[np.float32]:
    """[I, T, 4] in the order of the stream: image + 1, kind of token plus 8 x hook, row, column.

    Of special tokens and prompts, the row is their number in the prefix or among the prompts.
    """
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    special = [(CLS if kind == "cls" else REGISTER, number, 0) for number, kind in enumerate(prefix)]
    patches = [(PATCH, row, column) for row, column in zip(rows.tolist(), columns.tolist(), strict=True)]
    tokens = np.array([*special, *patches, *((PROMPT, number, 0) for number in range(n_extra))], dtype=np.float32)
    tokens[:, 0] += 8 * hook
    images = np.broadcast_to(np.arange(1, n_images + 1, dtype=np.float32)[:, None, None], (n_images, len(tokens), 1))
    return np.concatenate([images, np.broadcast_to(tokens, (n_images, *tokens.shape))], axis=2)


def write_places(
    path: Path, prefix: Sequence[str], *, n_images: int = 40, grid: tuple[int, int] = (2, 3), n_extra: int = 0,
    failed: dict[int, str] | None = None, n_shards: int | None = None, tidy: bool = True, **other: Any,
) -> dict[str, Any]:  # fmt: skip
    """A store of these values; returns the fields of its settings."""
    fields = make_settings(n_images, grid=list(grid), d_model=D_MODEL, n_extra=n_extra, **other)
    if tuple(prefix) != ("cls",):
        fields["prefix"] = list(prefix)
    values = {
        hook: encode_places(n_images, prefix, grid, n_extra, number).astype(fields["dtype"])
        for number, hook in enumerate(fields["hook_points"])
    }
    write_store(path, fields, failed=failed, n_shards=n_shards, tidy=tidy, values=values)
    return fields


def encode_one_hot(n_images: int, prefix: Sequence[str], grid: tuple[int, int]) -> NDArray[np.float32]:
    """[I, T, D] in the order of the stream: channel `token` is image + 1, with the token numbered as in codes.

    Registers have no number; they take the channels from 1 + P on. So a latent that reads one channel knows one place.
    """
    n_patches = grid[0] * grid[1]
    numbers = iter(range(1 + n_patches, 1 + n_patches + len(prefix)))
    channels = [0 if kind == "cls" else next(numbers) for kind in prefix] + list(range(1, 1 + n_patches))
    values = np.zeros((n_images, len(channels), 1 + n_patches + len(prefix)), dtype=np.float32)
    values[:, np.arange(len(channels)), channels] = np.arange(1, n_images + 1)[:, None]
    return values


def write_one_hot(
    path: Path, prefix: Sequence[str], *, n_images: int = 40, grid: tuple[int, int] = (2, 3),
    failed: dict[int, str] | None = None, **other: Any,
) -> None:  # fmt: skip
    """A store of these values at one hook point."""
    values = encode_one_hot(n_images, prefix, grid)
    fields = make_settings(n_images, grid=list(grid), d_model=values.shape[2], **other)
    if tuple(prefix) != ("cls",):
        fields["prefix"] = list(prefix)
    write_store(path, fields, failed=failed, values={fields["hook_points"][0]: values.astype(fields["dtype"])})
