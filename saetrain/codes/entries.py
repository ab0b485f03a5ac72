"""Entries: codes in memory, by row or by latent."""

from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ShardCodes:
    """The codes of one shard, in both orders. `first_row` is the global row of `indptr[0]`."""

    first_row: int
    indptr: NDArray[np.int64]  # [rows + 1]
    latent: NDArray[np.unsignedinteger]  # [nnz], ascending within a row
    value: NDArray[np.float16]  # [nnz]
    latent_indptr: NDArray[np.int64]  # [F + 1]
    row: NDArray[np.unsignedinteger]  # [nnz], global, ascending within a latent
    latent_value: NDArray[np.float16]  # [nnz]


@dataclass(frozen=True)
class LatentCodes:
    """Entries of consecutive latents, sorted by latent, then row. The first of these latents has number 0 here."""

    latent_indptr: NDArray[np.int64]  # [n latents + 1]
    row: NDArray[np.unsignedinteger]  # [nnz], global, ascending within a latent
    latent_value: NDArray[np.float16]  # [nnz]


SomeCodes = TypeVar("SomeCodes", ShardCodes, LatentCodes)


class RowCodes(NamedTuple):
    """Entries of some rows, sorted by row."""

    row: NDArray[np.int64]  # [nnz], global
    latent: NDArray[np.int64]  # [nnz], ascending within a row
    value: NDArray[np.float16]  # [nnz]


def has_zeros(values: NDArray[np.float16]) -> bool:
    """Whether one of the values, which are not negative, is 0. Their bits tell it in 0.02 ns each, `all()` in 1.05."""
    return bool(values.size) and int(values.view(np.uint16).min()) == 0


def drop_zeros(codes: SomeCodes) -> SomeCodes:
    """Leave out entries whose value is 0: a latent that does not fire is not an entry, whoever wrote the file."""
    if not has_zeros(codes.latent_value):
        return codes
    by_latent, by_row = codes.latent_value != 0, {}
    if isinstance(codes, ShardCodes):
        keep = codes.value != 0
        before = np.concatenate([[0], np.cumsum(keep)])
        by_row = {"indptr": before[codes.indptr], "latent": codes.latent[keep], "value": codes.value[keep]}
    before = np.concatenate([[0], np.cumsum(by_latent)])
    return replace(
        codes,
        latent_indptr=before[codes.latent_indptr],
        row=codes.row[by_latent],
        latent_value=codes.latent_value[by_latent],
        **by_row,
    )
