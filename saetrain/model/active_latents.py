"""Selecting the active latents of rows: the encoder GEMM in blocks of 256 rows, searched while they are in cache.

From centered rows x [B, D], encoder [F, D] and b_enc [F], the functions here make a `Code`, the active (latent, value)
pairs of each row: the k largest, those above a threshold, or the largest of a whole batch. They compute no gradients
and never hold a (B, F) array.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from actcache.models import has_cpu_bfloat16
from saetrain.distributed import all_gather, all_sum, rank

BLOCK_ROWS = 256
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
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)

    def by_latent(self, n_latents: int) -> tuple[Tensor, Tensor]:
        """Starts [F + 1] and order [N] of the entries, sorted by latent and then by row."""
        if "_by_latent" not in self.__dict__:
            counts = torch.bincount(self.latents, minlength=n_latents)
            narrow = (
                torch.int16 if n_latents <= 1 << 15 else torch.int32
            )  # torch uses a radix sort for these: a fifth of the time that int64 takes
            order = torch.argsort(self.latents.to(narrow), stable=True)
            self.__dict__["_by_latent"] = F.pad(counts.cumsum(0), (1, 0)), order
        starts_and_order: tuple[Tensor, Tensor] = self.__dict__["_by_latent"]
        return starts_and_order

    def keep(self, mask: Tensor) -> "Code":
        """The code of the entries where `mask` [N] is true."""
        counts = torch.bincount(self.rows[mask], minlength=len(self.starts) - 1)
        return Code(F.pad(counts.cumsum(0), (1, 0)), self.latents[mask], self.values[mask])

    def by_prefix(self, prefixes: Sequence[int]) -> tuple["Code", Tensor]:
        """Split the rows by nested dictionary: rows 0..B hold the latents of the first prefix, rows B..2B those that
        the second prefix adds, and so on.

        Returns:
            The code of m B rows, and the order [N] of its entries among the entries of this code.
        """
        edges = torch.tensor(prefixes, device=self.latents.device)
        n_rows = len(self.starts) - 1
        row = torch.bucketize(self.latents, edges, right=True) * n_rows + self.rows
        order = torch.argsort(row, stable=True)
        starts = F.pad(torch.bincount(row, minlength=n_rows * len(prefixes)).cumsum(0), (1, 0))
        return Code(starts, self.latents[order], self.values[order]), order


class Entries(NamedTuple):
    """Entries of some rows [b, F], row after row."""

    n_rows: int
    places: Tensor  # [n] int64: row * F + latent
    values: Tensor  # [n] float32


class Blocks:
    """Pre-activations [b, F] of 256 rows at a time, in memory that the next block reuses, and searches in them.

    bfloat16 is 4-7 times faster where the hardware supports it; the values are rounded to 8 bits. On a CPU, numpy
    compares the bits of the numbers, because positive floats have the same order as their bits: 16-bit integers of a
    batch are compared in 2 ms, where torch takes 20 ms for bfloat16.
    """

    def __init__(self, x: Tensor, encoder: Tensor, b_enc: Tensor, bfloat16: bool) -> None:
        self.dtype = torch.bfloat16 if bfloat16 else torch.float32
        self.bits = torch.int16 if bfloat16 else torch.int32
        self.x, self.on_cpu = x.to(self.dtype), x.device.type == "cpu"
        self.product = make_product(encoder.to(self.dtype), b_enc.to(self.dtype))
        self.mask = np.empty((BLOCK_ROWS, len(encoder)) if self.on_cpu else 0, dtype=np.bool_)

    def __iter__(self) -> Iterator[Tensor]:
        return (self.product(rows) for rows in torch.split(self.x, BLOCK_ROWS))

    def above(self, pool: ThreadPoolExecutor, z: Tensor, threshold: Tensor) -> list[Entries]:
        """The entries above a threshold [], [F] or [b, 1]."""
        if not self.on_cpu or bool((threshold < 0).any()):
            places = torch.nonzero((z > threshold).view(-1)).squeeze(1)
            return [Entries(len(z), places, z.view(-1)[places].float())]
        bits, floor = z.view(self.bits).numpy(), threshold.to(self.dtype).view(self.bits).numpy()

        def find(rows: slice) -> Entries:
            part, part_floor = bits[rows], floor[rows] if floor.ndim == 2 else floor
            places = np.flatnonzero(np.greater(part, part_floor, out=self.mask[rows]))
            return self._entries(len(part), places, part.reshape(-1)[places])

        return list(pool.map(find, cut(len(z))))

    def largest(self, pool: ThreadPoolExecutor, z: Tensor, k: int, size: int) -> list[Entries]:
        """The k largest entries of each row, where they are above 0.

        The k-th largest of the maxima of groups of `size` latents bounds the k-th largest pre-activation from below.
        Only a few more than k groups of 8 reach that bound, and only their members are examined again.
        """
        bits, n_latents = z.view(self.bits), z.shape[1]
        n_groups = n_latents // 8
        eights = bits.view(len(z), 8, n_groups).amax(1)  # latents i, i + n_groups, ...
        maxima = eights.view(len(z), size // 8, -1).amax(1).numpy()
        floor = np.maximum(np.partition(maxima, -k, axis=1)[:, -k, None], 1)  # [b, 1]

        def find(rows: slice) -> Entries:
            part, part_floor = bits[rows].numpy(), floor[rows]
            at = np.flatnonzero(eights[rows].numpy() >= part_floor)
            row = at // n_groups
            places = (at + row * (n_latents - n_groups))[:, None] + np.arange(0, n_latents, n_groups)
            values = part.reshape(-1).take(places)
            kept = np.flatnonzero(values >= part_floor[row])
            shift = 8 * values.itemsize
            pairs = np.sort(places.reshape(-1)[kept] << shift | values.reshape(-1)[kept])
            places, values = pairs >> shift, pairs.astype(values.dtype)  # the low bits
            chosen = largest(places // n_latents, values, len(part), k)
            return self._entries(len(part), places[chosen], values[chosen])

        return list(pool.map(find, cut(len(z))))

    def _entries(self, n_rows: int, places: NDArray[np.int64], bits: NDArray[Any]) -> Entries:
        return Entries(n_rows, torch.from_numpy(places), torch.from_numpy(bits).view(self.dtype).float())


def cut(n_rows: int) -> list[slice]:
    """Divide rows among the threads."""
    n = min(torch.get_num_threads(), n_rows)
    return [slice(n_rows * i // n, n_rows * (i + 1) // n) for i in range(n)]


def make_product(weight: Tensor, offset: Tensor) -> Callable[[Tensor], Tensor]:
    """Make the function x [b, D] -> x weight^T + offset [b, F], whose result the next call may overwrite.

    On a CPU, a bfloat16 weight is reordered for the hardware once instead of at every call: with AMX, 4,096 rows take
    34 ms where addmm takes 44, and with 49,152 latents 165 ms where it takes 240. torch has no public name for this.
    """
    ordering = has_cpu_bfloat16() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    if ordering and weight.dtype == torch.bfloat16 and weight.device.type == "cpu":
        ordered = torch.ops.mkldnn._reorder_linear_weight(weight, BLOCK_ROWS)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, ordered, offset, "none", [], "")
    out = torch.empty(BLOCK_ROWS, len(weight), dtype=weight.dtype, device=weight.device)
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


def join(n_latents: int, entries: list[Entries]) -> Code:
    """Join the entries of consecutive rows into one code."""
    edges = [torch.arange(0, part.n_rows * n_latents + 1, n_latents, device=part.places.device) for part in entries]
    counts = [torch.searchsorted(part.places, edge).diff() for part, edge in zip(entries, edges, strict=True)]
    latents = torch.cat([part.places for part in entries]).remainder_(n_latents)
    return Code(F.pad(torch.cat(counts).cumsum(0), (1, 0)), latents, torch.cat([part.values for part in entries]))


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
    n_latents, blocks, entries = len(encoder), Blocks(x, encoder, b_enc, bfloat16), list[Entries]()
    size = group_size(n_latents, k)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for z in blocks:
            lap("encode")
            if size and blocks.on_cpu:
                entries += blocks.largest(pool, z, k, size)
            else:
                top = z.topk(k, dim=1, sorted=False)
                rows = torch.arange(0, z.numel(), n_latents, device=z.device)[:, None]
                places = (top.indices + rows)[top.values > 0].sort().values
                entries.append(Entries(len(z), places, z.view(-1)[places].float()))
            lap("select")
    return join(n_latents, entries)


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
    floor = torch.as_tensor(threshold, dtype=torch.float32, device=x.device)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for number, z in enumerate(blocks):
            lap("encode")
            entries += blocks.above(pool, z, floor)
            lap("select")
            if number == 0 and sum(len(part.places) for part in entries) > max_share * z.numel():
                break
    return join(len(encoder), entries)


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
    wanted = k * int(all_sum(torch.tensor(len(x), device=x.device)))
    if sum(map(len, candidates)) < wanted and guess > 0:
        code = select_above(x, encoder, b_enc, 0.0, bfloat16=bfloat16, lap=lap)
        candidates = all_gather(code.values)
    everything = torch.cat(candidates)
    if len(everything) > wanted:
        floor = everything.topk(wanted, sorted=False).values.min()
        room = wanted - int((everything > floor).sum())
        room -= sum(int((values == floor).sum()) for values in candidates[: rank()])
        ties = code.values == floor
        code = code.keep((code.values > floor) | (ties & (ties.cumsum(0) <= room)))
        lap("select")
        return code, float(floor)
    return code, float(everything.min()) if len(everything) else 0.0
