"""The loss of an SAE on normalized rows x [B, D], and its gradients.

    L = sum over rows of w ||x - x^||^2  +  penalty  +  revival of dead latents

w: 1 / sum over the batch of ||x - mean x||^2, so that the first term is the unexplained share of the variance (Gao et
    al. 2024). relu has PatchSAE's own weight.
penalty: depends on the variant, see saetrain/model/variants.
prefixes: with nested dictionaries, the first term is the mean over them (Bussmann et al. 2025).
revival: AuxK, which reconstructs the residual from the k_aux strongest dead latents, in units of the residual's own
    variance (Gao et al. 2024, A.2), or PatchSAE's ghost gradients.

If few latents are active, everything behind the encoder GEMM is computed for active entries only (`_add_sparse`). If
many are, as in the first steps of relu, plain autograd over blocks of rows computes it (`_add_dense`), which is also
the reference for the tests. Sums run over the rows of all processes.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from actcache.models import precise_dtype
from saetrain.config import ResolvedTrainConfig
from saetrain.distributed import all_sum
from saetrain.model import SAE, Code, Lap, gradient, no_lap, preactivations, reconstruct, select_topk

DENSE_ROWS = 1024
DENSE_SHARE = {"bfloat16": 0.04, "float32": 0.15}
"""Share of active entries above which dense products are faster (2 cores with AVX-512 bf16, d_model 768)."""
DENSE_SHARE_CUDA = 0.01
DENSE_SHARE_MPS = -1.0
"""Always dense: Apple's GPUs have no sparse matrices."""


class Loss(NamedTuple):
    """The parts of the loss of one batch, over all processes, and the latents that fired."""

    total: Tensor  # []
    reconstruction: Tensor  # []
    sparsity: Tensor  # []: the weighted penalty
    revival: Tensor  # []: the weighted loss of AuxK or ghost gradients
    squared_error: Tensor  # []: sum over the batch, in normalized units
    variance: Tensor  # []: sum of squares of x - mean x
    n_active: Tensor  # []
    n_rows: Tensor  # []
    fired: Tensor  # [F] bool


def add_gradients(
    sae: SAE, x: Tensor, dead: Tensor, config: ResolvedTrainConfig, *, weight: float | None = None, lap: Lap = no_lap
) -> Loss:
    """Add the gradients of a batch's loss to the `.grad` of the parameters.

    Also updates the threshold that batchtopk uses for inference.

    Args:
        dead: [F] bool.
        config: only its precision, aux and ghost are used.
        weight: of the penalty; None takes l1 of the SAE.
    """
    bfloat16 = config.precision == "bfloat16"
    batch = _measure(sae, x, sae.config.l1 if weight is None else weight)
    code, share = _select(sae, x, bfloat16=bfloat16, lap=lap)
    if share > _dense_share(x, bfloat16):
        parts = _add_dense(sae, batch, code, bfloat16=bfloat16)
    else:
        parts = _add_sparse(sae, batch, code, lap)
    lap("backward")
    revival = x.new_zeros(())
    if (config.aux or config.ghost) and dead.any():
        revival = _revive(sae, batch, parts, dead, config)
        lap("revival")
    dtype, squared = precise_dtype(x.device), torch.linalg.vector_norm(parts.residual).square()
    sums = torch.stack([part.to(dtype) for part in (*parts.sums, squared, revival)])
    reconstruction, sparsity, n_active, squared_error, revival = all_sum(sums)
    if sae.variant.penalizes_l0(sae.config):
        sparsity, _ = sae.variant.l0_penalty(sae.config, batch.weight, n_active, batch.n_rows)
    fired = all_sum(parts.fired.int()) > 0
    total = reconstruction + sparsity + revival
    return Loss(total, reconstruction, sparsity, revival, squared_error, batch.variance, n_active, batch.n_rows, fired)


class _Batch(NamedTuple):
    """Rows, with the units of their loss, which count the rows of all processes."""

    x: Tensor  # [B, D]
    row_weight: Tensor  # [B] or []: w
    weight: float  # of the penalty
    n_rows: Tensor  # []
    variance: Tensor  # []

    def block(self, rows: slice) -> "_Batch":
        row_weight = self.row_weight[rows] if self.row_weight.ndim else self.row_weight
        return self._replace(x=self.x[rows], row_weight=row_weight)


class _Parts(NamedTuple):
    sums: tuple[Tensor, Tensor, Tensor]  # reconstruction, penalty, active entries of this process
    residual: Tensor  # [B, D]: x - x^
    fired: Tensor  # [F] bool


def _measure(sae: SAE, x: Tensor, weight: float) -> _Batch:
    dtype = precise_dtype(x.device)
    squares = torch.linalg.vector_norm(x, dim=1).to(dtype).square()
    sums = all_sum(torch.cat([x.sum(0, dtype=dtype), squares.sum()[None], squares.new_full((1,), len(x))]))
    n_rows, variance = sums[-1], (sums[-2] - sums[:-2].square().sum() / sums[-1]).clamp_min(1e-12)
    row_weight = sae.variant.row_weight(squares, variance, n_rows, sae.d_model)
    return _Batch(x, row_weight.float(), weight, n_rows, variance)


def _dense_share(x: Tensor, bfloat16: bool) -> float:
    if x.device.type == "mps":
        return DENSE_SHARE_MPS
    if x.device.type == "cuda":
        return DENSE_SHARE_CUDA
    return DENSE_SHARE["bfloat16" if bfloat16 else "float32"]


@torch.no_grad()
def _select(sae: SAE, x: Tensor, *, bfloat16: bool, lap: Lap) -> tuple[Code, float]:
    """The candidates for active entries, and their share; of the first rows only if that share is too high."""
    max_share = _dense_share(x, bfloat16)
    code = sae.variant.select(sae, x - sae.b_dec, bfloat16=bfloat16, max_share=max_share, lap=lap)
    return code, len(code.values) / max(1, (len(code.starts) - 1) * sae.config.n_latents)


def _activate(sae: SAE, z: Tensor, latents: Tensor | slice, batch: _Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Values, penalty and number of active entries, for entries [N] of `latents` or for a block [b, F] of all."""
    values, penalty = sae.variant.penalize(sae, z, latents, batch.weight / batch.n_rows.float())
    return values, penalty, (values > 0).sum()


def _l0_slope(sae: SAE, batch: _Batch, n_active: Tensor) -> Tensor:
    """The derivative of the penalty with respect to the number of active entries of all processes."""
    n_active = all_sum(n_active.to(precise_dtype(n_active.device)).detach().clone())
    return sae.variant.l0_penalty(sae.config, batch.weight, n_active, batch.n_rows)[1]


def _add_sparse(sae: SAE, batch: _Batch, code: Code, lap: Lap) -> _Parts:
    """Add the gradients that come from the entries of a code."""
    config, x = sae.config, batch.x
    z = preactivations(x, sae.b_dec, sae.encoder, sae.b_enc, code)
    values, penalty, n_active = _activate(sae, z, code.latents, batch)
    of = x, batch.row_weight, code
    reconstruction, residual = reconstruct(values, sae.decoder, sae.b_dec, *of, prefixes=config.nested)
    lap("decode")
    if (gate := sae.variant.gate_values(z)) is not None:
        penalty = penalty + reconstruct(gate, sae.decoder, sae.b_dec.detach(), *of, trained=False)[0]
    if sae.variant.penalizes_l0(config):
        penalty = penalty * _l0_slope(sae, batch, n_active)
    torch.autograd.backward(reconstruction + penalty)
    n_fired = torch.zeros(config.n_latents, dtype=torch.int32, device=x.device)
    n_fired.index_add_(0, code.latents, (values.detach() > 0).int())
    return _Parts((reconstruction.detach(), penalty.detach(), n_active), residual, n_fired > 0)


def _add_dense(sae: SAE, batch: _Batch, code: Code, *, bfloat16: bool) -> _Parts:
    """Add the same gradients by plain autograd, over blocks of rows with all latents. `code` is what top-k selected."""
    config, total = sae.config, batch.x
    slope = None
    if sae.variant.penalizes_l0(config):
        slope = _l0_slope(sae, batch, _count_dense(sae, batch, bfloat16=bfloat16))
    residuals, sums = torch.empty_like(total), []
    fired = torch.zeros(config.n_latents, dtype=torch.bool, device=total.device)
    ends = [*code.starts[:-1:DENSE_ROWS].tolist(), len(code.latents)] if config.top_k else []
    for first in range(0, len(total), DENSE_ROWS):
        rows = slice(first, min(first + DENSE_ROWS, len(total)))
        part = batch.block(rows)
        with torch.autocast(total.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            z = F.linear(part.x - sae.b_dec, sae.encoder, sae.b_enc)
            values, penalty, n_active = _activate(sae, z, slice(None), part)
            if config.top_k:
                number = first // DENSE_ROWS
                values = values * _latent_mask(code, first, slice(ends[number], ends[number + 1]), z)
                n_active = (values > 0).sum()
            edges = [0, *(config.nested or (config.n_latents,))]
            decoding: Tensor = sae.b_dec
            reconstruction = z.new_zeros((), dtype=torch.float32)
            for low, high in pairwise(edges):
                decoding = decoding + (values[:, low:high] @ sae.decoder[low:high]).float()
                residual = part.x - decoding
                reconstruction = reconstruction + (part.row_weight * residual.square().sum(1)).sum() / (len(edges) - 1)
            if (gate := sae.variant.gate_values(z)) is not None:
                aside = part.x - ((gate @ sae.decoder.detach()).float() + sae.b_dec.detach())
                penalty = penalty + (part.row_weight * aside.square().sum(1)).sum()
        if slope is not None:
            penalty = penalty * slope
        torch.autograd.backward(reconstruction + penalty)
        residuals[rows] = residual.detach()
        fired |= (values.detach() > 0).any(0)
        sums.append(torch.stack([reconstruction.detach(), penalty.detach(), n_active.float()]))
    reconstruction, penalty, n_active = torch.stack(sums).to(precise_dtype(total.device)).sum(0)
    return _Parts((reconstruction, penalty, n_active), residuals, fired)


@torch.no_grad()
def _count_dense(sae: SAE, batch: _Batch, *, bfloat16: bool) -> Tensor:
    """The number of entries above the floor."""
    count = torch.zeros((), dtype=torch.int64, device=batch.x.device)
    for first in range(0, len(batch.x), DENSE_ROWS):
        with torch.autocast(batch.x.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            z = F.linear(batch.x[first : first + DENSE_ROWS] - sae.b_dec, sae.encoder, sae.b_enc)
        count += (z > sae.variant.floor(sae)).sum()
    return count


def _latent_mask(code: Code, first: int, entries: slice, z: Tensor) -> Tensor:
    """The entries of the rows from `first` on of a code, as a mask [b, F]."""
    mask = torch.zeros(z.shape, dtype=torch.bool, device=z.device)
    return mask.index_put_((code.rows[entries] - first, code.latents[entries]), mask.new_ones(()))


# ---------------------------------------------------------------------------------------------------------------------
# Revival of dead latents


def _revive(sae: SAE, batch: _Batch, parts: _Parts, dead: Tensor, config: ResolvedTrainConfig) -> Tensor:
    """Add the gradients of AuxK or of ghost gradients to the dead latents. Returns the loss of this process."""
    index = dead.nonzero().squeeze(1)
    encoder, b_enc, decoder = (p.detach()[index].requires_grad_() for p in (sae.encoder, sae.b_enc, sae.decoder))
    x, residual = batch.x - sae.b_dec.detach(), parts.residual
    bfloat16 = config.precision == "bfloat16"
    if config.ghost:
        loss = _add_ghost(x, residual, batch, encoder, b_enc, decoder, bfloat16=bfloat16)
    else:
        precise = residual.to(precise_dtype(x.device))
        sums = all_sum(torch.cat([precise.sum(0), precise.square().sum()[None]]))
        variance = (sums[-1] - sums[:-1].square().sum() / batch.n_rows).clamp_min(1e-12)
        scale = config.aux / variance.float()
        loss = _add_aux(x, residual, scale, encoder, b_enc, decoder, sae.d_model // 2, bfloat16=bfloat16)
    for parameter, part in ((sae.encoder, encoder), (sae.b_enc, b_enc), (sae.decoder, decoder)):
        assert part.grad is not None
        gradient(parameter).index_add_(0, index, part.grad)
    if config.ghost:  # in PatchSAE these reach b_dec too, through x - b_dec
        assert b_enc.grad is not None
        gradient(sae.b_dec).sub_(b_enc.grad @ encoder.detach())
    return loss


def _add_aux(
    x: Tensor, residual: Tensor, scale: Tensor, encoder: Tensor, b_enc: Tensor, decoder: Tensor, k: int, *,
    bfloat16: bool,
) -> Tensor:  # fmt: skip
    """scale * ||residual - reconstruction from the k strongest latents||^2, sparse or dense."""
    k = min(k, len(encoder))
    if k / len(encoder) <= _dense_share(x, bfloat16):
        code = select_topk(x, encoder, b_enc, k, bfloat16=bfloat16)
        nothing = x.new_zeros(x.shape[1])
        values = preactivations(x, nothing, encoder, b_enc, code).relu()
        loss, _ = reconstruct(values, decoder, nothing, residual, scale, code)
        torch.autograd.backward(loss)
        return loss.detach()
    total = x.new_zeros(())
    for first in range(0, len(x), DENSE_ROWS):
        rows = slice(first, first + DENSE_ROWS)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            z = F.linear(x[rows], encoder, b_enc)
            if k < len(encoder):
                z = z * torch.zeros_like(z).scatter(1, z.detach().topk(k, dim=1, sorted=False).indices, 1.0)
            decoding = (z.relu() @ decoder).float()
        loss = scale * (residual[rows] - decoding).square().sum()
        torch.autograd.backward(loss)
        total += loss.detach()
    return total


def _add_ghost(
    x: Tensor, residual: Tensor, batch: _Batch, encoder: Tensor, b_enc: Tensor, decoder: Tensor, *, bfloat16: bool
) -> Tensor:
    """PatchSAE's ghost gradients: g = exp(z_dead) decoder_dead, scaled to half the norm of the residual. The loss is
    the error of g as a reconstruction of the residual, scaled elementwise to the error of the reconstruction itself.
    """
    total = x.new_zeros(())
    for first in range(0, len(x), DENSE_ROWS):
        rows = slice(first, first + DENSE_ROWS)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            ghost = (F.linear(x[rows], encoder, b_enc).exp() @ decoder).float()
        target = residual[rows]
        norm = target.norm(dim=1, keepdim=True)
        ghost = ghost * (norm / (1e-6 + 2 * ghost.norm(dim=1, keepdim=True))).detach()
        error = (ghost - target).square() / norm.clamp_min(1e-6)
        row_weight = batch.row_weight[rows, None]
        reference = row_weight * target.square()
        loss = (error * (reference / (error + 1e-6)).detach()).sum()
        torch.autograd.backward(loss)
        total += loss.detach()
    return total
