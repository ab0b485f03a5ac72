"""The settings, the seal and the commit records of codes, as records that are checked when they are read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np

from actcache import HookPoint, SettingsError
from actcache.preprocess import Preprocess
from saetrain.config import Tokens

DTYPES = {
    "indptr": ("<i8",),
    "latent": ("<u2", "<u4"),
    "value": ("<f2",),
    "latent_indptr": ("<i8",),
    "row": ("<u4", "<u8"),
    "latent_value": ("<f2",),
}
"""The arrays of a shard, and the dtypes that each of them may have."""

_POSITIVE = {"at_least": 1}


@dataclass(frozen=True)
class CodesSettings:
    """The settings of codes; docs/reference/format.md explains them."""

    rows_id: str
    hook_point: str
    tokens: Tokens
    dtypes: Mapping[str, str]
    preprocess: Mapping[str, object]
    n_images: int = field(metadata=_POSITIVE)
    n_tokens: int = field(metadata=_POSITIVE)
    grid: tuple[int, int] = field(metadata=_POSITIVE)
    n_latents: int = field(metadata=_POSITIVE)
    shard_sizes: tuple[int, ...] = field(metadata=_POSITIVE)

    def __post_init__(self) -> None:
        HookPoint.parse(self.hook_point)
        if self.preprocess:  # a store that no model made has none
            Preprocess.from_json(self.preprocess)
        if self.n_tokens != 1 + self.grid[0] * self.grid[1]:
            raise SettingsError(f"n_tokens must be 1 + {self.grid[0]} x {self.grid[1]} (grid), got {self.n_tokens}")
        if sum(self.shard_sizes) != self.n_images:
            raise SettingsError(f"shard_sizes must add up to {self.n_images} (n_images), got {sum(self.shard_sizes)}")
        dtypes = self.numpy_dtypes
        for name, largest in (("latent", self.n_latents - 1), ("row", self.n_images * self.n_tokens - 1)):
            if largest > np.iinfo(dtypes[name]).max:
                raise SettingsError(f"dtypes.{name} must hold {largest}, got {self.dtypes[name]}")

    @property
    def numpy_dtypes(self) -> dict[str, np.dtype[Any]]:
        """The dtype of each array. Raises SettingsError for one that the format does not allow."""
        known: dict[str, np.dtype[Any]] = {}
        for name, allowed in DTYPES.items():
            spelling = self.dtypes.get(name, "absent")
            matching = [dtype for dtype in map(np.dtype, allowed) if spelling in (dtype.str, dtype.name)]
            if not matching:
                raise SettingsError(f"dtypes.{name} must be {' or '.join(allowed)}, got {spelling[:40]!r}")
            known[name] = matching[0]
        return known


class CodesSummary(TypedDict):
    """What is known of codes once they are complete."""

    n_entries: int
    failed: dict[str, str]  # image -> why it could not be read
    n_underflowed: int | None  # codes that are 0 in float16 and were left out; None: the writer did not count them


@dataclass(frozen=True)
class CodesSeal:
    """What the manifest says of codes: image -> why it could not be read."""

    failed: Mapping[int, str]
    n_entries: int = field(metadata={"at_least": 0})
    n_underflowed: int | None = field(default=None, metadata={"at_least": 0})  # None: the writer did not count them
    patch_size: tuple[int, int] | None = field(default=None, metadata=_POSITIVE)  # None: not recorded


@dataclass(frozen=True)
class CodesRecord:
    """The commit record of a shard."""

    files: Mapping[str, object]
    n_entries: int = field(metadata={"at_least": 0})
    n_underflowed: int | None = field(default=None, metadata={"at_least": 0})
