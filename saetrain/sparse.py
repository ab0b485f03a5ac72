"""Sparse forward and backward of a top-k code: no (tokens x latents) array outlives a block of rows.

In: centered rows x [B, D], encoder [F, D], bias [F], decoder [F, D]. Out: the k active (latent, value) pairs of each
row and their decoding. The encoder GEMM runs over blocks of 256 rows, whose top k is taken while the block is in
cache; everything after costs O(B k D). `topk_dense` is the reference the tests compare values and gradients with.
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


class _TopKAutoencode(torch.autograd.Function):
    """x, encoder, bias, decoder -> decoding and code; gradients of encoder, bias and decoder from active latents only.

    With G_v = dL/dvalues = <g, decoder[latent]> where value > 0 (ReLU), and S the sparse [F, B] matrix of one entry an
    active pair: d decoder = S(values) g, d encoder = S(G_v) x, d bias = S(G_v) 1.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, encoder: Tensor, bias: Tensor, decoder: Tensor, k: int, bfloat16: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        code = select_topk(x, encoder, bias, k, bfloat16=bfloat16)
        ctx.save_for_backward(x, decoder, *code)
        ctx.mark_non_differentiable(code.latents, code.values)
        return decode(code, decoder), code.latents, code.values

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad = grads[0].contiguous()  # [B, D]
        x, decoder, latents, values = ctx.saved_tensors
        n_latents, (n_rows, k) = len(decoder), latents.shape
        rows = torch.arange(0, n_rows * k + 1, k, device=x.device)
        pattern = _csr(rows, latents.flatten(), torch.zeros_like(values).flatten(), (n_rows, n_latents))
        grad_values = torch.sparse.sampled_addmm(pattern, grad, decoder.T, beta=0.0).values()
        grad_values = grad_values * (values.flatten() > 0)
        order = torch.argsort(latents.flatten(), stable=True)
        counts = torch.bincount(latents.flatten(), minlength=n_latents)
        starts = F.pad(counts.cumsum(0), (1, 0))
        row_of = order // k
        shape = (n_latents, n_rows)
        grad_decoder = _csr(starts, row_of, values.flatten()[order], shape) @ grad
        grad_encoder = _csr(starts, row_of, grad_values[order], shape) @ x
        grad_bias = torch.zeros(n_latents, device=x.device).index_add_(0, latents.flatten(), grad_values)
        return None, grad_encoder, grad_bias, grad_decoder, None, None


def topk_autoencode(
    x: Tensor, encoder: Tensor, bias: Tensor, decoder: Tensor, k: int, *, bfloat16: bool = False
) -> tuple[Tensor, Code]:
    """Encode, select and decode with sparse gradients. Returns (decoding [B, D], code). x takes no gradient."""
    decoding, latents, values = _TopKAutoencode.apply(x, encoder, bias, decoder, k, bfloat16)
    return decoding, Code(latents, values)


def topk_dense(x: Tensor, encoder: Tensor, bias: Tensor, decoder: Tensor, k: int) -> tuple[Tensor, Code]:
    """The same by plain autograd on dense tensors: the reference for `topk_autoencode`."""
    top = F.linear(x, encoder, bias).topk(k, dim=1, sorted=False)
    values = top.values.relu()
    dense = torch.zeros(len(x), len(decoder), device=x.device).scatter(1, top.indices, values)
    return dense @ decoder, Code(top.indices, values)


def _csr(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)
