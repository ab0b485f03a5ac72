"""Sparse forward and backward of a code: no (tokens x latents) array outlives a block of rows.

In: centered rows x [B, D], encoder [F, D], bias [F], decoder [F, D]. Out: the active (latent, value) pairs of each row,
k of them or any number, and their decoding. The encoder GEMM runs over blocks of 256 rows, whose active entries are
found while the block is in cache; everything after costs O(active D). `topk_dense` and `ragged_dense` are the
references the tests compare values and gradients with.
"""

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_ROWS = 256


class Code(NamedTuple):
    """The active latents of each row, in no particular order. A value of 0 is not active."""

    latents: Tensor  # [B, K] int64
    values: Tensor  # [B, K] float32, >= 0


def select_topk(x: Tensor, encoder: Tensor, bias: Tensor, k: int, *, bfloat16: bool = False) -> Code:
    """ReLU of the k largest pre-activations of each row. No gradients.

    Args:
        bfloat16: multiply in bfloat16 (4-7x faster where the hardware has it); values are then rounded to 8 bits.
    """
    latents = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    values = torch.empty(len(x), k, dtype=torch.float32, device=x.device)
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    weight, offset, rows = encoder.to(dtype).T, bias.to(dtype), x.to(dtype)
    for first in range(0, len(x), BLOCK_ROWS):
        block = slice(first, first + BLOCK_ROWS)
        top = torch.addmm(offset, rows[block], weight).topk(k, dim=1, sorted=False)
        values[block] = top.values.float()
        latents[block] = top.indices
    return Code(latents, values.relu_())


def decode(code: Code, decoder: Tensor) -> Tensor:
    """Sum of the active decoder rows, weighted: [B, D]."""
    return F.embedding_bag(code.latents, decoder, per_sample_weights=code.values, mode="sum")


class Ragged(NamedTuple):
    """A code with any number of active latents a row, row after row. A value of 0 is not active."""

    starts: Tensor  # [B + 1] int64
    latents: Tensor  # [N] int64
    values: Tensor  # [N] float32, >= 0

    def rows(self) -> Tensor:
        """[N]: the row of each entry."""
        n_rows = len(self.starts) - 1
        return torch.repeat_interleave(torch.arange(n_rows, device=self.starts.device), self.starts.diff())


def flatten(code: Code) -> Ragged:
    """The same entries, K a row."""
    n_rows, k = code.latents.shape
    starts = torch.arange(0, n_rows * k + 1, k, device=code.latents.device)
    return Ragged(starts, code.latents.flatten(), code.values.flatten())


def select_above(x: Tensor, encoder: Tensor, bias: Tensor, threshold: float, *, bfloat16: bool = False) -> Ragged:
    """Pre-activations above a threshold of at least 0, found while their block is in cache. No gradients."""
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    weight, offset, rows = encoder.to(dtype).T, bias.to(dtype), x.to(dtype)
    counts, latents, values = [], [], []
    for first in range(0, len(x), BLOCK_ROWS):
        z = torch.addmm(offset, rows[first : first + BLOCK_ROWS], weight)
        active = torch.nonzero(z > threshold)
        counts.append(torch.bincount(active[:, 0], minlength=len(z)))
        latents.append(active[:, 1])
        values.append(z[active[:, 0], active[:, 1]].float())
    starts = F.pad(torch.cat(counts).cumsum(0), (1, 0))
    return Ragged(starts, torch.cat(latents), torch.cat(values))


def select_batch_topk(
    x: Tensor, encoder: Tensor, bias: Tensor, k: int, guess: float, *, bfloat16: bool = False
) -> tuple[Ragged, float]:
    """The k x B largest positive pre-activations of the batch (BatchTopK; Bussmann et al. 2024, arXiv 2412.06410).

    Args:
        guess: a threshold that about k a row exceed, such as the last batch's. Entries above 0.8 of it are collected
            and cut to size; when they are too few, all positive ones are. 0 makes a guess from the first block.

    Returns:
        (code, the smallest value that was kept).
    """
    wanted = k * len(x)
    if guess <= 0:
        z = torch.addmm(bias, x[:BLOCK_ROWS], encoder.T).flatten()
        guess = max(0.0, float(z.topk(min(k * min(len(x), BLOCK_ROWS), len(z))).values[-1]))
    code = select_above(x, encoder, bias, 0.8 * guess, bfloat16=bfloat16)
    if len(code.values) < wanted and guess > 0:
        code = select_above(x, encoder, bias, 0.0, bfloat16=bfloat16)
    if len(code.values) > wanted:
        kept = code.values.topk(wanted, sorted=False).indices.sort().values  # in the order of rows
        counts = torch.bincount(code.rows()[kept], minlength=len(x))
        code = Ragged(F.pad(counts.cumsum(0), (1, 0)), code.latents[kept], code.values[kept])
    return code, float(code.values.min()) if len(code.values) else 0.0


class _Autoencode(torch.autograd.Function):
    """encoder, bias, decoder and a code -> decoding and values, with gradients from active entries only.

    With G_v = dL/dvalues + <dL/ddecoding, decoder[latent]> where value > 0 (ReLU), and S the sparse [F, B] matrix of
    one entry an active pair: d decoder = S(values) g, d encoder = S(G_v) x, d bias = S(G_v) 1.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, encoder: Tensor, bias: Tensor, decoder: Tensor, starts: Tensor, latents: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, decoder, starts, latents, v)
        return F.embedding_bag(latents, decoder, starts[:-1], per_sample_weights=v, mode="sum"), v.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad, extra = grads[0].contiguous(), grads[1]  # [B, D], [N]
        x, decoder, starts, latents, values = ctx.saved_tensors
        n_latents, n_rows = len(decoder), len(x)
        pattern = _csr(starts, latents, torch.zeros_like(values), (n_rows, n_latents))
        grad_values = torch.sparse.sampled_addmm(pattern, grad, decoder.T, beta=0.0).values()
        grad_values = (grad_values + extra) * (values > 0)
        order = torch.argsort(latents, stable=True)
        by_latent = F.pad(torch.bincount(latents, minlength=n_latents).cumsum(0), (1, 0))
        row_of = Ragged(starts, latents, values).rows()[order]
        shape = (n_latents, n_rows)
        grad_decoder = _csr(by_latent, row_of, values[order], shape) @ grad
        grad_encoder = _csr(by_latent, row_of, grad_values[order], shape) @ x
        grad_bias = torch.zeros(n_latents, device=x.device).index_add_(0, latents, grad_values)
        return None, grad_encoder, grad_bias, grad_decoder, None, None, None


def autoencode(x: Tensor, encoder: Tensor, bias: Tensor, decoder: Tensor, code: Ragged) -> tuple[Tensor, Tensor]:
    """(decoding [B, D], values [N]) of a code that was selected from x by encoder and bias; both take gradients.

    x takes none. Through `values` a penalty on the code reaches encoder and bias.
    """
    decoding, values = _Autoencode.apply(x, encoder, bias, decoder, *code)
    return decoding, values


def topk_autoencode(
    x: Tensor, encoder: Tensor, bias: Tensor, decoder: Tensor, k: int, *, bfloat16: bool = False
) -> tuple[Tensor, Code]:
    """Encode, select and decode with sparse gradients. Returns (decoding [B, D], code). x takes no gradient."""
    with torch.no_grad():
        code = select_topk(x, encoder, bias, k, bfloat16=bfloat16)
    return autoencode(x, encoder, bias, decoder, flatten(code))[0], code


def topk_dense(x: Tensor, encoder: Tensor, bias: Tensor, decoder: Tensor, k: int) -> tuple[Tensor, Code]:
    """The same by plain autograd on dense tensors: the reference for `topk_autoencode`."""
    top = F.linear(x, encoder, bias).topk(k, dim=1, sorted=False)
    values = top.values.relu()
    dense = torch.zeros(len(x), len(decoder), device=x.device).scatter(1, top.indices, values)
    return dense @ decoder, Code(top.indices, values)


def ragged_dense(x: Tensor, encoder: Tensor, bias: Tensor, decoder: Tensor, code: Ragged) -> tuple[Tensor, Tensor]:
    """`autoencode` by plain autograd on dense tensors, the selection taken from `code`."""
    rows = code.rows()
    z = F.linear(x, encoder, bias)
    kept = torch.zeros_like(z).index_put((rows, code.latents), torch.ones_like(code.values))
    dense = z.relu() * kept
    return dense @ decoder, dense[rows, code.latents]


def _csr(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)
