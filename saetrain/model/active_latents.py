"""Selecting the active latents of rows: the encoder GEMM in blocks of 256 rows, searched while they are in cache.

From centered rows x [B, D], encoder [F, D] and b_enc [F], the functions here make a `Code`, the active (latent, value)
pairs of each row: the k largest, those above a threshold, or the largest of a whole batch. They compute no gradients
and never hold a (B, F) array.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from actcache.compiler import find_kernels
from actcache.models import has_cpu_bfloat16
from saetrain.distributed import all_gather, all_sum, rank, world_size
from saetrain.model.threads import cut_rows, spread

BLOCK_ROWS = 256
GPU_BLOCK_BYTES = 1 << 28
"""Pre-activations of a block on a GPU, which has no cache to stay in, but for which the host waits once a block."""
Lap = Callable[[str], None]
"""Called with the name of the part of a step that has just ended, so that a caller can measure its time."""


@dataclass(frozen=True)
class Code:
    """The active latents of rows, row after row. An entry whose value is not above 0 is not active."""

    starts: Tensor  # [B + 1] int64
    latents: Tensor  # [N] int64
    values: Tensor  # [N] float32: pre-activations

    @cached_property
    def rows(self) -> Tensor:
        """[N]: the row of each entry."""
        counts = self.starts.diff()
        rows = torch.arange(len(counts), device=counts.device)
        return torch.repeat_interleave(rows, counts, output_size=len(self.latents))

    def by_latent(self, n_latents: int) -> tuple[Tensor, Tensor]:
        """Starts [F + 1] and order [N] of the entries, sorted by latent and then by row."""
        if "_by_latent" not in self.__dict__:
            counts = count(self.latents, n_latents)
            narrow = (
                torch.int16 if n_latents <= 1 << 15 else torch.int32
            )  # torch uses a radix sort for these: a fifth of the time that int64 takes
            order = torch.argsort(self.latents.to(narrow), stable=True)
            self.__dict__["_by_latent"] = F.pad(counts.cumsum(0), (1, 0)), order
        starts_and_order: tuple[Tensor, Tensor] = self.__dict__["_by_latent"]
        return starts_and_order

    def keep(self, mask: Tensor) -> "Code":
        """The code of the entries where `mask` [N] is true."""
        kept = mask.nonzero().squeeze(1)
        return Code(F.pad(mask.cumsum(0), (1, 0))[self.starts], self.latents[kept], self.values[kept])

    def by_prefix(self, prefixes: Sequence[int]) -> tuple["Code", Tensor]:
        """Split the rows by nested dictionary: rows 0..B hold the latents of the first prefix, rows B..2B those that
        the second prefix adds, and so on.

        Returns:
            The code of m B rows, and the order [N] of its entries among the entries of this code.
        """
        edges = torch.tensor(prefixes).to(self.latents.device, non_blocking=True)
        n_rows = len(self.starts) - 1
        row = torch.bucketize(self.latents, edges, right=True) * n_rows + self.rows
        order = torch.argsort(row, stable=True)
        starts = F.pad(count(row, n_rows * len(prefixes)).cumsum(0), (1, 0))
        return Code(starts, self.latents[order], self.values[order]), order


def count(numbers: Tensor, n: int) -> Tensor:
    """How often each number below n occurs, [n] int64. The host waits for a GPU in bincount, which finds the largest.

    The sums are int32, because older versions of torch do not add int64 on MPS.
    """
    if numbers.device.type == "cpu":
        return torch.bincount(numbers, minlength=n)
    ones = torch.ones_like(numbers, dtype=torch.int32)
    return torch.zeros(n, dtype=torch.int32, device=numbers.device).index_add_(0, numbers, ones).long()


class Entries(NamedTuple):
    """Entries of some rows, row after row."""

    counts: Tensor  # [b] int64: entries of each row
    latents: Tensor  # [n] int64
    values: Tensor  # [n] float32


class Blocks:
    """Pre-activations [b, F] of 256 rows at a time (more on a GPU), in memory that the next block reuses, and searches
    in them.

    bfloat16 is 4-7 times faster where the hardware supports it; the values are rounded to 8 bits. On a CPU, compiled
    kernels search (kernels/selection.py), or numpy as their reference and where there is no compiler. Both compare the
    bits of the numbers, because positive floats have the same order as their bits.
    """

    def __init__(self, x: Tensor, encoder: Tensor, b_enc: Tensor, bfloat16: bool) -> None:
        self.dtype = torch.bfloat16 if bfloat16 else torch.float32
        self.bits = torch.int16 if bfloat16 else torch.int32
        self.x, self.on_cpu, self.n_latents = x.to(self.dtype), x.device.type == "cpu", len(encoder)
        fitting = max(BLOCK_ROWS, GPU_BLOCK_BYTES // (self.dtype.itemsize * len(encoder)))
        self.n_rows = BLOCK_ROWS if self.on_cpu else min(fitting, max(1, len(x)))
        self.product = make_product(encoder.to(self.dtype), b_enc.to(self.dtype), self.n_rows, len(x))
        self.kernels = find_kernels("saetrain.model.kernels.selection") if self.on_cpu else None
        self.mask = np.empty((BLOCK_ROWS, len(encoder)) if self.on_cpu else 0, dtype=np.bool_)

    def __iter__(self) -> Iterator[Tensor]:
        return (self.product(rows) for rows in torch.split(self.x, self.n_rows))

    def above(self, z: Tensor, threshold: Tensor) -> list[Entries]:
        """The entries above a threshold [], [F] or [b, 1]."""
        if not self.on_cpu or bool((threshold < 0).any()):
            rows, latents = torch.nonzero(z > threshold, as_tuple=True)
            return [Entries(count(rows, len(z)), latents, z[rows, latents].float())]
        floor = threshold.to(self.dtype).view(self.bits).numpy()
        return spread(partial(self._find_above, z.view(self.bits).numpy(), floor), cut_rows(len(z)))

    def _find_above(self, bits: NDArray[Any], floor: NDArray[Any], first: int, last: int) -> Entries:
        part, part_floor = bits[first:last], floor[first:last] if floor.ndim == 2 else floor
        if self.kernels is None:
            places = np.flatnonzero(np.greater(part, part_floor, out=self.mask[first:last]))
            return self._entries(len(part), places, part.reshape(-1)[places])
        counts = np.empty(len(part), np.int64)
        latents, found = self.kernels.select_above(part, np.atleast_2d(part_floor), counts)
        return Entries(torch.from_numpy(counts), torch.from_numpy(latents), self._values(found))

    def largest(self, z: Tensor, k: int) -> list[Entries]:
        """The k largest entries of each row, where they are above 0; among equal ones the first."""
        size = group_size(self.n_latents, k) if self.on_cpu else 0
        if self.kernels is None and not size:
            top = z.topk(k, dim=1, sorted=False)
            return [keep_positive(top.values, top.indices)]
        bits = z.view(self.bits)
        if self.kernels is not None:
            return spread(partial(self._select_largest, self.kernels, bits.numpy(), k), cut_rows(len(z)))
        return spread(partial(self._find_largest, bits, *self._bound(bits, k, size), k), cut_rows(len(z)))

    def _select_largest(self, kernels: ModuleType, bits: NDArray[Any], k: int, first: int, last: int) -> Entries:
        counts = np.empty(last - first, np.int64)
        latents, values = np.empty((last - first, k), np.int64), np.empty((last - first, k), bits.dtype)
        kernels.select_largest(bits[first:last], k, latents, values, counts)
        kept = slice(None) if counts.min() == k else np.arange(k) < counts[:, None]
        found = torch.from_numpy(latents[kept].reshape(-1)), self._values(values[kept].reshape(-1))
        return Entries(torch.from_numpy(counts), *found)

    def _bound(self, bits: Tensor, k: int, size: int) -> tuple[Tensor, NDArray[Any]]:
        """The maxima of groups of 8 latents, and a lower bound [b, 1] of the k-th largest entry of each row: the k-th
        largest of the maxima of groups of `size` latents."""
        eights = bits.view(len(bits), 8, -1).amax(1)  # latents i, i + F / 8, ...
        maxima = eights.view(len(bits), size // 8, -1).amax(1).numpy()
        return eights, np.maximum(np.partition(maxima, -k, axis=1)[:, -k, None], 1)

    def _find_largest(
        self, bits: Tensor, eights: Tensor, floor: NDArray[Any], k: int, first: int, last: int
    ) -> Entries:
        """Examine the members of the groups whose maxima reach the bound: only a few more than k groups of 8 do."""
        part, part_floor, n_groups = bits[first:last].numpy(), floor[first:last], self.n_latents // 8
        at = np.flatnonzero(eights[first:last].numpy() >= part_floor)
        row = at // n_groups
        places = (at + row * (self.n_latents - n_groups))[:, None] + np.arange(0, self.n_latents, n_groups)
        values = part.reshape(-1).take(places)
        kept = np.flatnonzero(values >= part_floor[row])
        shift = 8 * values.itemsize
        pairs = np.sort(places.reshape(-1)[kept] << shift | values.reshape(-1)[kept])
        places, values = pairs >> shift, pairs.astype(values.dtype)  # the low bits
        chosen = largest(places // self.n_latents, values, len(part), k)
        return self._entries(len(part), places[chosen], values[chosen])

    def _entries(self, n_rows: int, places: NDArray[np.int64], bits: NDArray[Any]) -> Entries:
        counts = np.diff(np.searchsorted(places, np.arange(n_rows + 1) * self.n_latents))
        return Entries(torch.from_numpy(counts), torch.from_numpy(places % self.n_latents), self._values(bits))

    def _values(self, bits: NDArray[Any]) -> Tensor:
        return torch.from_numpy(bits).view(self.dtype).float()


def keep_positive(values: Tensor, latents: Tensor) -> Entries:
    """The entries above 0 of what topk returns, both [b, k], sorted by latent."""
    latents, order = latents.sort(dim=1)
    values = values.gather(1, order)
    kept = values > 0
    at = torch.nonzero(kept.view(-1)).squeeze(1)
    return Entries(kept.sum(1), latents.view(-1)[at], values.reshape(-1)[at].float())


def make_product(weight: Tensor, offset: Tensor, n_rows: int, n_all: int) -> Callable[[Tensor], Tensor]:
    """Make the function x [b, D] -> x weight^T + offset [b, F], whose result the next call may overwrite; b <= n_rows.

    On a CPU, the weight is reordered for the hardware once for all n_all rows, instead of at every call.
    bfloat16 with AMX: 4,096 rows take 34 ms where addmm takes 44, and with 49,152 latents 165 ms where it takes 240.
    float32 with AVX2 (AMD): 560 ms where addmm takes 900. torch has no public name for this.
    """
    known = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    fits = has_cpu_bfloat16() if weight.dtype == torch.bfloat16 else n_all > 2 * BLOCK_ROWS
    if known and fits and weight.device.type == "cpu":
        ordered = torch.ops.mkldnn._reorder_linear_weight(weight, BLOCK_ROWS)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, ordered, offset, "none", [], "")
    out = torch.empty(n_rows, len(weight), dtype=weight.dtype, device=weight.device)
    return lambda x: torch.addmm(offset, x, weight.T, out=out[: len(x)])


def largest(rows: NDArray[np.int64], values: NDArray[Any], n_rows: int, k: int) -> NDArray[np.bool_] | slice:
    """Mark the positive entries that are among the k largest of their row; among equal entries the first ones."""
    starts = np.searchsorted(rows, np.arange(n_rows + 1))
    width = int(np.diff(starts).max())
    if width <= k:
        return slice(None)
    table = np.zeros((n_rows, width), values.dtype)
    table[rows, np.arange(len(rows)) - starts[rows]] = values
    floor = np.partition(table, width - k, axis=1)[:, width - k]
    over, ties = values > floor[rows], values == floor[rows]
    room = k - np.bincount(rows[over], minlength=n_rows)
    number = np.cumsum(ties)
    before = np.concatenate([[0], number])[starts[:-1]]
    kept: NDArray[np.bool_] = over | (ties & (number - before[rows] <= room[rows]))
    return kept


def join(entries: list[Entries]) -> Code:
    """Join the entries of consecutive rows into one code."""
    counts, latents, values = (torch.cat(part) for part in zip(*entries, strict=True))
    return Code(F.pad(counts.cumsum(0), (1, 0)), latents, values)


def group_size(n_latents: int, k: int) -> int:
    """The number of latents in a group, such that there are at least 4 k groups of equal size; 0 if that is impossible.

    The k-th largest maximum of the groups bounds the k-th largest of all entries from below.
    """
    return next((size for size in (64, 32, 16, 8) if n_latents % size == 0 and n_latents // size >= 4 * k), 0)


def no_lap(name: str) -> None:
    """The lap callback that does nothing."""


@torch.no_grad()
def select_topk(
    x: Tensor, encoder: Tensor, b_enc: Tensor, k: int, *, bfloat16: bool = False, lap: Lap = no_lap
) -> Code:
    """Select the k largest pre-activations of each row, where they are above 0, sorted by latent."""
    blocks, entries = Blocks(x, encoder, b_enc, bfloat16), list[Entries]()
    for z in blocks:
        lap("encode")
        entries += blocks.largest(z, k)
        lap("select")
    return join(entries)


@torch.no_grad()
def select_above(
    x: Tensor,
    encoder: Tensor,
    b_enc: Tensor,
    threshold: float | Tensor,
    *,
    bfloat16: bool = False,
    max_share: float = 1.0,
    lap: Lap = no_lap,
) -> Code:
    """Select the pre-activations above a threshold, one for all or [F], sorted by latent.

    Args:
        max_share: if a larger share of the first block is above the threshold, the code covers only that block. The
            caller sees from it that sparse products would not pay off.
    """
    blocks, entries = Blocks(x, encoder, b_enc, bfloat16), []
    floor = threshold if isinstance(threshold, Tensor) else torch.full((), threshold, device=x.device)
    floor = floor.to(x.device, torch.float32)
    for number, z in enumerate(blocks):
        lap("encode")
        entries += blocks.above(z, floor)
        lap("select")
        if number == 0 and sum(len(part.latents) for part in entries) > max_share * z.numel():
            break
    return join(entries)


@torch.no_grad()
def select_batch_topk(
    x: Tensor, encoder: Tensor, b_enc: Tensor, k: int, guess: float, *, bfloat16: bool = False, lap: Lap = no_lap
) -> tuple[Code, float]:
    """Select the k x B largest positive pre-activations of a batch (BatchTopK; Bussmann et al. 2024, arXiv 2412.06410).

    The batch is that of all processes together. Among equal values the first ones are taken.

    Args:
        guess: a threshold that about k entries per row exceed, such as that of the last batch. Entries above 0.8 of it
            are collected and cut to size; if they are too few, all positive entries are. 0 derives a guess from the
            first block.

    Returns:
        The code, and the smallest value in it.
    """
    if guess <= 0:
        z = torch.addmm(b_enc, x[:BLOCK_ROWS], encoder.T).flatten()
        own = z.topk(min(k * min(len(x), BLOCK_ROWS), len(z))).values[-1:]
        guess = max(0.0, float(torch.cat(all_gather(own)).min()))
    code = select_above(x, encoder, b_enc, 0.8 * guess, bfloat16=bfloat16, lap=lap)
    candidates = all_gather(code.values)
    wanted = k * (len(x) if world_size() == 1 else int(all_sum(torch.tensor(len(x), device=x.device))))
    if sum(map(len, candidates)) < wanted and guess > 0:
        code = select_above(x, encoder, b_enc, 0.0, bfloat16=bfloat16, lap=lap)
        candidates = all_gather(code.values)
    everything = torch.cat(candidates)
    if len(everything) > wanted:
        floor = everything.topk(wanted, sorted=False).values.min()
        room = wanted - (everything > floor).sum()
        for values in candidates[: rank()]:
            room -= (values == floor).sum()
        ties = code.values == floor
        code = code.keep((code.values > floor) | (ties & (ties.cumsum(0) <= room)))
        lap("select")
        return code, float(floor)
    return code, float(everything.min()) if len(everything) else 0.0
