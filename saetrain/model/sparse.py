"""Sparse forward and backward pass of a code: no (tokens x latents) array outlives a block of rows.

From a code (see active_latents.py), the rows it was selected from, encoder and decoder, this module computes the code's
pre-activations and the error of its reconstruction at a cost of O(active D), in one sparse layout for all variants.
`preactivations` and `reconstruct` are autograd functions; whatever comes between them (an activation, a penalty) is
plain torch on [N] entries. The gradients of encoder and decoder are added to `.grad` in place, which saves 300 MB of
allocation per step.

On a CPU, compiled kernels compute the sums over entries (see kernels/entries.py); torch's sparse operations are their
reference, and take their place on a GPU and where there is no compiler.
"""

import warnings
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from actcache.compiler import find_kernels
from saetrain.model.active_latents import Code
from saetrain.model.threads import cut_latents, cut_rows, spread


class _PreActivations(torch.autograd.Function):
    """x - b_dec, encoder, b_enc -> z of the entries. Let S [F, B] hold the gradient of z at each active pair:
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
        centered, factors = x - ctx.b_dec, grads[0].contiguous()
        if (kernels := _kernels(centered, encoder, factors)) is not None:
            grad_bias = factors.new_empty(len(encoder))
            arrays = _arrays(starts, order, code.rows, factors, centered, gradient(encoder), grad_bias)
            edges = cut_latents(starts, 0, len(encoder))
            spread(partial(kernels.add_rows, *arrays), edges)
        else:
            matrix = csr(starts, code.rows[order], factors[order], (len(encoder), len(x)))
            _add_product(encoder, matrix, centered)
            grad_bias = (matrix @ x.new_ones(len(x), 1)).squeeze(1)
        return grad_bias, -(grad_bias @ encoder.detach()), None, None, None


class _Decode(torch.autograd.Function):
    """values, decoder -> the decoding. Let S [F, B] hold the values and let g be the gradient of the decoding:
    d values = <g, decoder[latent]>, d decoder = S g.
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
        starts, order = code.by_latent(len(decoder))
        matrix = csr(starts, code.rows[order], ctx.values[order], (len(decoder), len(grad)))
        # by latent, each dictionary row stays in cache: 17 ms, where by row it takes 45
        products = torch.sparse.sampled_addmm(matrix, decoder.detach(), grad.T, beta=0.0).values()
        grad_values = torch.empty_like(products)
        grad_values[order] = products
        if ctx.trained:
            _add_product(decoder, matrix, grad)
        return grad_values, None, None, None


class _Reconstruct(torch.autograd.Function):
    """values, b_dec, decoder -> sum of weight / m ||x - b_dec - decoding of prefix||^2 over m prefixes, by kernels.

    Let r_p be the residual of prefix p and G_p = -2 weight / m (r_p + r_p+1 + ... + r_m) the gradient of what its own
    latents add: d values = <G, decoder[latent]>, d decoder = S G with the values in S [F, B], d b_dec = sum of G_1.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, b_dec: Tensor, decoder: Tensor, x: Tensor, weight: Tensor, code: Code,
        prefixes: Sequence[int], trained: bool, kernels: ModuleType,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        m = len(prefixes)
        residuals, squares = x.new_empty(m, *x.shape), torch.empty(len(x), dtype=torch.float64)
        ctx.arrays = code.starts, code.latents, values.detach().contiguous(), decoder
        arrays = [*_arrays(*ctx.arrays), np.array(prefixes), *_arrays(x, b_dec, residuals, squares)]
        spread(partial(kernels.decode_rows, *arrays), cut_rows(len(x)))
        ctx.residuals, ctx.weight, ctx.code, ctx.kernels = residuals, weight.detach() / m, code, kernels
        ctx.prefixes, ctx.trained = prefixes, trained
        last = residuals[-1]
        ctx.mark_non_differentiable(last)
        return (ctx.weight * squares).sum().float(), last

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        code, residuals, (_, _, values, decoder) = ctx.code, ctx.residuals, ctx.arrays
        weight = (-2 * grads[0] * ctx.weight).expand(residuals.shape[1])
        starts, order = code.by_latent(len(decoder))
        rows, products = code.rows, torch.empty_like(values)
        entry_weight = weight[rows]
        for (first, last), residual in zip(pairwise([0, *ctx.prefixes]), residuals, strict=True):
            edges = cut_latents(starts, first, last)
            if ctx.trained:
                factors = values * entry_weight
                arrays = _arrays(starts, order, rows, factors, residual, decoder, gradient(decoder), products)
                kernel = ctx.kernels.multiply_and_add_rows
            else:
                arrays, kernel = _arrays(starts, order, rows, residual, decoder, products), ctx.kernels.multiply_rows
            spread(partial(kernel, *arrays), edges)
        return products.mul_(entry_weight), weight @ residuals[0], *[None] * 7


class _Error(torch.autograd.Function):
    """parts [m B, D], b_dec -> mean over the m partial sums of parts of weight ||x - b_dec - sum||^2.

    Everything happens in the memory of `parts`: with m prefixes, a step would else spend its time on (tokens x d_model)
    arrays.
    """

    @staticmethod
    def forward(ctx: Any, parts: Tensor, b_dec: Tensor, x: Tensor, weight: Tensor, m: int) -> tuple[Tensor, Tensor]:
        residuals = parts.view(m, *x.shape)
        torch.sub(x - b_dec, residuals[0], out=residuals[0])
        for i in range(1, m):
            torch.sub(residuals[i - 1], residuals[i], out=residuals[i])
        ctx.residuals, ctx.weight = residuals, weight / m
        squares = torch.linalg.vector_norm(residuals, dim=2).square_().sum(0)
        last = residuals[-1].clone()
        ctx.mark_non_differentiable(last)
        return (ctx.weight * squares).sum(), last

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        weight = (-2 * grads[0] * ctx.weight).expand(ctx.residuals.shape[1])[:, None]
        gradient = ctx.residuals.mul_(weight)
        for i in range(len(gradient) - 2, -1, -1):
            gradient[i] += gradient[i + 1]
        return gradient.view(-1, gradient.shape[2]), gradient[0].sum(0), None, None, None


def nested_error(parts: Tensor, b_dec: Tensor, x: Tensor, weight: Tensor, m: int = 1) -> tuple[Tensor, Tensor]:
    """Compute the mean over m nested decodings of sum weight ||x - b_dec - decoding||^2, and the last residual [B, D].

    Args:
        parts: [m B, D]: the first decoding, then what each further one adds to the one before; overwritten.
        weight: [B] or [].
    """
    error, residual = _Error.apply(parts, b_dec, x, weight, m)
    return error, residual


def preactivations(x: Tensor, b_dec: Tensor, encoder: Tensor, b_enc: Tensor, code: Code) -> Tensor:
    """The pre-activations [N] of a code that was selected from x - b_dec by encoder and b_enc. x takes no gradient."""
    z: Tensor = _PreActivations.apply(b_enc, b_dec, x, encoder, code)
    return z


def decode(values: Tensor, decoder: Tensor, code: Code, *, trained: bool = True) -> Tensor:
    """The sum [B, D] of the active decoder rows, weighted by `values` [N]. `trained`: the decoder takes a gradient."""
    decoding: Tensor = _Decode.apply(values, decoder, code, trained)
    return decoding


def reconstruct(
    values: Tensor, decoder: Tensor, b_dec: Tensor, x: Tensor, weight: Tensor, code: Code, *,
    prefixes: Sequence[int] = (), trained: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the error of a reconstruction, sum of weight ||x - b_dec - decoding||^2, and the last residual [B, D].

    Args:
        values: [N] of the entries of the code, which are sorted by latent in each row.
        weight: [B] or [].
        prefixes: numbers of latents, ascending, the last one all of them: the error is the mean over the decodings of
            the latents below each; () for one decoding by all.
        trained: whether the decoder takes a gradient.
    """
    if (kernels := _kernels(x, values, decoder)) is not None:
        edges = prefixes or (len(decoder),)
        found: tuple[Tensor, Tensor] = _Reconstruct.apply(
            values, b_dec, decoder, x, weight, code, edges, trained, kernels
        )
        return found
    if prefixes:
        code, order = code.by_prefix(prefixes)
        values = values[order]
    parts = decode(values, decoder, code, trained=trained)
    return nested_error(parts, b_dec, x, weight, max(1, len(prefixes)))


def _kernels(*tensors: Tensor) -> ModuleType | None:
    """The kernels over entries, if they can be used on all of these tensors."""
    if any(tensor.device.type != "cpu" or tensor.dtype != torch.float32 for tensor in tensors):
        return None
    return find_kernels("saetrain.model.kernels.entries")


def _arrays(*tensors: Tensor) -> list[Any]:
    return [tensor.detach().numpy() for tensor in tensors]


def _add_product(parameter: Tensor, matrix: Tensor, rows: Tensor) -> None:
    """parameter.grad += matrix @ rows."""
    grad = gradient(parameter)
    torch.addmm(grad, matrix, rows, out=grad)


def gradient(parameter: Tensor) -> Tensor:
    """parameter.grad, created as zeros if there is none yet."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def csr(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A sparse matrix in CSR layout, without checks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)
