"""Sparse forward and backward of a code: no (tokens x latents) array outlives a block of rows.

In: centered rows x [B, D], encoder [F, D], b_enc [F], decoder [F, D]. Out: the active (latent, value) pairs of each
row, k of them or any number, and their decoding. The encoder GEMM runs over blocks of 256 rows, whose active entries
are found while the block is in cache; everything after costs O(active D), on one sparse layout for all variants.
`preactivations` and `decode` are the two ends that autograd sees; what lies between (an activation, a penalty) is plain
torch on [N] entries. Gradients of encoder and decoder are added to `.grad` in place: 300 MB a step are not allocated.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saetrain.processes import all_gather, all_sum, rank

BLOCK_ROWS = 256
Lap = Callable[[str], None]
"""Told what has just been done, by who measures time."""


@dataclass(frozen=True)
class Code:
    """The active latents of rows, row after row. A value that is not above 0 is not active."""

    starts: Tensor  # [B + 1] int64
    latents: Tensor  # [N] int64
    values: Tensor  # [N] float32: pre-activations

    @cached_property
    def rows(self) -> Tensor:
        """[N]: the row of each entry."""
        counts = self.starts.diff()
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)

    def by_latent(self, n_latents: int) -> tuple[Tensor, Tensor]:
        """(starts [F + 1], order [N]): the entries sorted by latent, rows ascending."""
        if "_by_latent" not in self.__dict__:
            counts = torch.bincount(self.latents, minlength=n_latents)
            order = torch.argsort(self.latents, stable=True)
            self.__dict__["_by_latent"] = F.pad(counts.cumsum(0), (1, 0)), order
        found: tuple[Tensor, Tensor] = self.__dict__["_by_latent"]
        return found

    def keep(self, mask: Tensor) -> "Code":
        """The entries where `mask` [N] is true."""
        counts = torch.bincount(self.rows[mask], minlength=len(self.starts) - 1)
        return Code(F.pad(counts.cumsum(0), (1, 0)), self.latents[mask], self.values[mask])

    def by_prefix(self, prefixes: Sequence[int]) -> tuple["Code", Tensor]:
        """The entries of the first prefix's latents as rows 0..B, those added by the second as rows B..2B, ...

        Returns:
            (code of m B rows, order [N]: which entry each one was).
        """
        edges = torch.tensor(prefixes, device=self.latents.device)
        n_rows = len(self.starts) - 1
        row = torch.bucketize(self.latents, edges, right=True) * n_rows + self.rows
        order = torch.argsort(row, stable=True)
        starts = F.pad(torch.bincount(row, minlength=n_rows * len(prefixes)).cumsum(0), (1, 0))
        return Code(starts, self.latents[order], self.values[order]), order


# ---------------------------------------------------------------------------------------------------------------------
# Selection: no gradients


def _blocks(x: Tensor, encoder: Tensor, b_enc: Tensor, bfloat16: bool, lap: Lap) -> Any:
    """(rows, pre-activations [b, F]) of 256 rows at a time, in memory that the next block takes over.

    bfloat16 is 4-7 times faster where the hardware has it; the values are rounded to 8 bits.
    """
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    weight, offset, rows = encoder.to(dtype).T, b_enc.to(dtype), x.to(dtype)
    out = torch.empty(BLOCK_ROWS, len(encoder), dtype=dtype, device=x.device)
    for first in range(0, len(x), BLOCK_ROWS):
        block = slice(first, min(first + BLOCK_ROWS, len(x)))
        z = out[: block.stop - first]
        torch.addmm(offset, rows[block], weight, out=z)
        lap("encode")
        yield block, z


def _silent(name: str) -> None:
    pass


@torch.no_grad()
def select_topk(
    x: Tensor, encoder: Tensor, b_enc: Tensor, k: int, *, bfloat16: bool = False, lap: Lap = _silent
) -> Code:
    """The k largest pre-activations of each row, whatever their sign."""
    latents = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    values = torch.empty(len(x), k, dtype=torch.float32, device=x.device)
    for block, z in _blocks(x, encoder, b_enc, bfloat16, lap):
        top = z.topk(k, dim=1, sorted=False)
        values[block] = top.values
        latents[block] = top.indices
        lap("select")
    starts = torch.arange(0, len(x) * k + 1, k, device=x.device)
    return Code(starts, latents.flatten(), values.flatten())


@torch.no_grad()
def select_above(
    x: Tensor,
    encoder: Tensor,
    b_enc: Tensor,
    threshold: float | Tensor,
    *,
    bfloat16: bool = False,
    max_share: float = 1.0,
    lap: Lap = _silent,
) -> Code:
    """Pre-activations above a threshold, one for all or [F].

    Args:
        max_share: when more of the first block's entries are above, only that block is looked at: the code covers its
            rows alone, and the caller sees that it is too dense to be worth while.
    """
    counts, latents, values = [], [], []
    for block, z in _blocks(x, encoder, b_enc, bfloat16, lap):
        active = torch.nonzero(z > (threshold.to(z.dtype) if isinstance(threshold, Tensor) else threshold))
        counts.append(torch.bincount(active[:, 0], minlength=len(z)))
        latents.append(active[:, 1])
        values.append(z[active[:, 0], active[:, 1]].float())
        lap("select")
        if block.start == 0 and len(active) > max_share * z.numel():
            break
    return Code(F.pad(torch.cat(counts).cumsum(0), (1, 0)), torch.cat(latents), torch.cat(values))


@torch.no_grad()
def select_batch_topk(
    x: Tensor, encoder: Tensor, b_enc: Tensor, k: int, guess: float, *, bfloat16: bool = False, lap: Lap = _silent
) -> tuple[Code, float]:
    """The k x B largest positive pre-activations of the batch (BatchTopK; Bussmann et al. 2024, arXiv 2412.06410).

    Of the batches of all processes together. Of equal values the first ones are taken.

    Args:
        guess: a threshold that about k a row exceed, such as the last batch's. Entries above 0.8 of it are collected
            and cut to size; when they are too few, all positive ones are. 0 makes a guess from the first block.

    Returns:
        (code, the smallest value that was kept).
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


# ---------------------------------------------------------------------------------------------------------------------
# The two ends that take gradients


class _PreActivations(torch.autograd.Function):
    """x - b_dec, encoder, b_enc -> z of the entries. With S [F, B] the gradient of z, one entry an active pair:
    d encoder = S (x - b_dec), d b_enc = S 1, d b_dec = -encoder^T d b_enc.
    """

    @staticmethod
    def forward(ctx: Any, b_enc: Tensor, b_dec: Tensor, x: Tensor, encoder: Tensor, code: Code) -> Tensor:
        ctx.x, ctx.b_dec, ctx.encoder, ctx.code = x, b_dec.detach(), encoder, code
        return code.values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, encoder, code = ctx.x, ctx.encoder, ctx.code
        starts, order = code.by_latent(len(encoder))
        gradient = _csr(starts, code.rows[order], grads[0][order], (len(encoder), len(x)))
        _add_product(encoder, gradient, x - ctx.b_dec)
        grad_bias = (gradient @ x.new_ones(len(x), 1)).squeeze(1)
        return grad_bias, -(grad_bias @ encoder.detach()), None, None, None


class _Decode(torch.autograd.Function):
    """values, decoder -> their decoding. With S [F, B] the values and g the gradient: d values = <g, decoder[latent]>,
    d decoder = S g.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, decoder: Tensor, code: Code, trained: bool) -> Tensor:
        ctx.values, ctx.decoder, ctx.code, ctx.trained = values.detach(), decoder, code, trained
        return F.embedding_bag(
            code.latents, decoder.detach(), code.starts[:-1], per_sample_weights=values.detach(), mode="sum"
        )

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad, code, decoder = grads[0].contiguous(), ctx.code, ctx.decoder
        shape = (len(grad), len(decoder))
        pattern = _csr(code.starts, code.latents, torch.zeros_like(ctx.values), shape)
        grad_values = torch.sparse.sampled_addmm(pattern, grad, decoder.detach().T, beta=0.0).values()
        if ctx.trained:
            starts, order = code.by_latent(len(decoder))
            _add_product(decoder, _csr(starts, code.rows[order], ctx.values[order], shape[::-1]), grad)
        return grad_values, None, None, None


def preactivations(x: Tensor, b_dec: Tensor, encoder: Tensor, b_enc: Tensor, code: Code) -> Tensor:
    """z of the entries of a code that was selected from x - b_dec by encoder and b_enc: [N]. x takes no gradient."""
    z: Tensor = _PreActivations.apply(b_enc, b_dec, x, encoder, code)
    return z


def decode(values: Tensor, decoder: Tensor, code: Code, *, trained: bool = True) -> Tensor:
    """Sum of the active decoder rows, weighted by `values` [N]: [B, D]. `trained`: the decoder takes a gradient."""
    decoding: Tensor = _Decode.apply(values, decoder, code, trained)
    return decoding


def _add_product(parameter: Tensor, matrix: Tensor, rows: Tensor) -> None:
    """parameter.grad += matrix @ rows."""
    grad = gradient(parameter)
    torch.addmm(grad, matrix, rows, out=grad)


def gradient(parameter: Tensor) -> Tensor:
    """parameter.grad, zeros where there is none yet."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _csr(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)
