"""What an SAE is punished for. In: an SAE, normalized rows x [B, D]. Out: gradients, and the parts of the loss.

    L = sum over rows of w ||x - x^||^2  +  penalty  +  revival of dead latents

w: 1 / ||x - mean x||^2 of the batch, so that the first term is the unexplained share (Gao et al. 2024); relu:
    1 / (B D ||x||), PatchSAE's code (the norm is not squared), with which its l1 of 8e-5 is meaningful.
penalty: relu and gated l1 * mean over rows of ||z||_1; jumprelu l1 * (l0 / target_l0 - 1)^2 or l1 * mean sum of
    tanh(4 z). gated adds the reconstruction from ReLU(z) by a dictionary that takes no gradient.
prefixes: the first term is the mean over the nested dictionaries (Bussmann et al. 2025).
revival: AuxK, the residual reconstructed from the k_aux strongest dead latents, with the residual's own variance as
    unit (Gao et al. 2024, A.2), or PatchSAE's ghost gradients.

Where few latents are active, everything behind the encoder GEMM is computed for active entries only (`_add_sparse`);
where many are, as in the first steps of relu, by plain autograd over blocks of rows (`_add_dense`), which is also the
reference that tests compare with. Sums run over the rows of all processes.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from saetrain.config import VARIANTS, ResolvedTrainConfig
from saetrain.distributed import all_sum
from saetrain.model import (
    SAE,
    Code,
    Lap,
    decode,
    gradient,
    nested_error,
    no_lap,
    preactivations,
    select_above,
    select_batch_topk,
    select_topk,
)

THRESHOLD_RATE = 0.01
"""How fast batchtopk's threshold of inference follows the smallest active value of a batch (0.999 as decay of peers
takes thousands of steps to settle)."""
TANH_SCALE = 4.0
DENSE_ROWS = 1024
DENSE_SHARE = {"bfloat16": 0.04, "float32": 0.15}
"""Share of active entries above which dense products are faster (2 cores with AVX-512 bf16, d_model 768)."""
DENSE_SHARE_CUDA = 0.01


class Loss(NamedTuple):
    """Parts of one batch's loss, over all processes, and which latents fired."""

    total: Tensor  # []
    reconstruction: Tensor  # []
    sparsity: Tensor  # []: the penalty, weighted
    revival: Tensor  # []: AuxK or ghost gradients, weighted
    squared_error: Tensor  # []: sum over the batch, in normalized units
    variance: Tensor  # []: sum of squares of x - mean x
    n_active: Tensor  # []
    n_rows: Tensor  # []
    fired: Tensor  # [F] bool


def add_gradients(
    sae: SAE, x: Tensor, dead: Tensor, config: ResolvedTrainConfig, *, weight: float | None = None, lap: Lap = no_lap
) -> Loss:
    """Add the gradients of a batch's loss to the parameters' `.grad`.

    batchtopk's threshold of inference is moved on.

    Args:
        dead: [F] bool.
        config: its precision, aux and ghost are used.
        weight: of the penalty; the config's l1 when None.
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
    if dead.any() and (config.aux or config.ghost):
        revival = _revive(sae, batch, parts, dead, config)
        lap("revival")
    sums = [*parts.sums, parts.residual.square().sum(), revival]
    reconstruction, sparsity, n_active, squared_error, revival = all_sum(torch.stack([s.double() for s in sums]))
    if sae.config.variant == "jumprelu" and sae.config.penalty == "quadratic":
        sparsity = batch.weight * (batch.l0_ratio(n_active) - 1).square()
    fired = all_sum(parts.fired.int()) > 0
    total = reconstruction + sparsity + revival
    return Loss(total, reconstruction, sparsity, revival, squared_error, batch.variance, n_active, batch.n_rows, fired)


class _Batch(NamedTuple):
    """Rows and what their loss is measured by, over all processes."""

    x: Tensor  # [B, D]
    row_weight: Tensor  # [B] or []: w
    weight: float  # of the penalty
    n_rows: Tensor  # []
    variance: Tensor  # []
    target_l0: float | None

    def l0_ratio(self, n_active: Tensor) -> Tensor:
        assert self.target_l0 is not None
        return n_active / self.n_rows / self.target_l0

    def block(self, rows: slice) -> "_Batch":
        row_weight = self.row_weight[rows] if self.row_weight.ndim else self.row_weight
        return self._replace(x=self.x[rows], row_weight=row_weight)


class _Parts(NamedTuple):
    sums: tuple[Tensor, Tensor, Tensor]  # reconstruction, penalty, active entries of this process
    residual: Tensor  # [B, D]: x - x^
    fired: Tensor  # [F] bool


def _measure(sae: SAE, x: Tensor, weight: float) -> _Batch:
    squares = torch.linalg.vector_norm(x, dim=1).double().square()
    sums = all_sum(torch.cat([x.sum(0, dtype=torch.float64), squares.sum()[None], squares.new_tensor([len(x)])]))
    n_rows, variance = sums[-1], (sums[-2] - sums[:-2].square().sum() / sums[-1]).clamp_min(1e-12)
    if sae.config.variant == "relu":
        row_weight = 1 / (n_rows * sae.d_model * squares.sqrt().clamp_min(1e-6))
    else:
        row_weight = 1 / variance
    return _Batch(x, row_weight.float(), weight, n_rows, variance, sae.config.target_l0)


def _dense_share(x: Tensor, bfloat16: bool) -> float:
    if x.device.type == "cuda":
        return DENSE_SHARE_CUDA
    return DENSE_SHARE["bfloat16" if bfloat16 else "float32"]


@torch.no_grad()
def _select(sae: SAE, x: Tensor, *, bfloat16: bool, lap: Lap) -> tuple[Code, float]:
    """(candidates for active entries, their share). Where the share is too high, of the first rows only."""
    config, centered, weights = sae.config, x - sae.b_dec, (sae.encoder, sae.b_enc)
    options: dict[str, Any] = {"bfloat16": bfloat16, "lap": lap}
    if config.variant == "topk":
        code = select_topk(centered, *weights, config.k, **options)
    elif config.variant == "batchtopk":
        guess = float(sae.threshold)
        code, smallest = select_batch_topk(centered, *weights, config.k, guess, **options)
        sae.threshold.fill_(smallest if guess <= 0 else guess + THRESHOLD_RATE * (smallest - guess))
    else:
        floor = sae.threshold - config.bandwidth / 2 if config.variant == "jumprelu" else 0.0
        code = select_above(centered, *weights, floor, max_share=_dense_share(x, bfloat16), **options)
    return code, len(code.values) / max(1, (len(code.starts) - 1) * config.n_latents)


# ---------------------------------------------------------------------------------------------------------------------
# Activation and penalty: the same on entries [N] and on blocks [b, F]


class _Jump(torch.autograd.Function):
    """z where z > threshold (`value`) or 1 there (step); pseudo-derivatives of the threshold from the entries in a
    window of `bandwidth` around it (Rajamanoharan et al. 2024, eq. 11, 12).
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float, value: bool) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth, ctx.value = bandwidth, value
        open_ = z > threshold
        return z * open_ if value else open_.to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        z, threshold = ctx.saved_tensors
        window = ((z - threshold).abs() <= ctx.bandwidth / 2) * (-1 / ctx.bandwidth) * grads[0]
        if not ctx.value:
            return None, window.sum_to_size(threshold.shape), None, None
        grad_threshold = (window * threshold).sum_to_size(threshold.shape)
        return grads[0] * (z > threshold), grad_threshold, None, None


def _activate(sae: SAE, z: Tensor, latents: Tensor | slice, batch: _Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(values, penalty, how many are active); the entries are [N] of `latents`, or a block of all."""
    config = sae.config
    share = batch.weight / batch.n_rows.float()
    if config.variant != "jumprelu":
        values = sae.activate(z, latents)
        if config.variant == "gated":
            values = values * (z > 0)
        penalty = z.new_zeros(()) if VARIANTS[config.variant].top_k else share * z.relu().float().sum()
        return values, penalty, (values > 0).sum()
    threshold = sae.threshold[latents]
    values = _Jump.apply(z, threshold, config.bandwidth, True)
    n_active = (values > 0).sum()
    if config.penalty == "tanh":
        return values, share * torch.tanh(TANH_SCALE * values).float().sum(), n_active
    steps = _Jump.apply(z, threshold, config.bandwidth, False).float().sum()
    return values, steps, n_active  # its factor needs the l0 of the whole batch


def _quadratic_factor(batch: _Batch, n_active: Tensor) -> Tensor:
    """d weight (l0 / target - 1)^2 / d number of active entries."""
    assert batch.target_l0 is not None
    n_active = all_sum(n_active.double().detach().clone())
    return (2 * batch.weight * (batch.l0_ratio(n_active) - 1) / (batch.target_l0 * batch.n_rows)).float()


def _add_sparse(sae: SAE, batch: _Batch, code: Code, lap: Lap) -> _Parts:
    """Gradients from the entries of a code."""
    config, x = sae.config, batch.x
    z = preactivations(x, sae.b_dec, sae.encoder, sae.b_enc, code)
    values, penalty, n_active = _activate(sae, z, code.latents, batch)
    if config.nested:
        nested, order = code.by_prefix(config.nested)
        parts = decode(values[order], sae.decoder, nested)
    else:
        parts = decode(values, sae.decoder, code)
    reconstruction, residual = nested_error(parts, sae.b_dec, x, batch.row_weight, max(1, len(config.nested)))
    lap("decode")
    if config.variant == "gated":
        parts = decode(z.relu(), sae.decoder, code, trained=False)
        penalty = penalty + nested_error(parts, sae.b_dec.detach(), x, batch.row_weight)[0]
    if config.variant == "jumprelu" and config.penalty == "quadratic":
        penalty = penalty * _quadratic_factor(batch, n_active)
    torch.autograd.backward(reconstruction + penalty)
    fired = torch.zeros(config.n_latents, dtype=torch.bool, device=x.device)
    fired[code.latents[values.detach() > 0]] = True
    return _Parts((reconstruction.detach(), penalty.detach(), n_active), residual, fired)


def _add_dense(sae: SAE, batch: _Batch, code: Code, *, bfloat16: bool) -> _Parts:
    """The same by plain autograd over blocks of rows, all latents of each. The top-k variants' choice is `code`."""
    config, total = sae.config, batch.x
    factor = None
    if config.variant == "jumprelu" and config.penalty == "quadratic":
        factor = _quadratic_factor(batch, _count_dense(sae, batch, bfloat16=bfloat16))
    residuals, sums = torch.empty_like(total), []
    fired = torch.zeros(config.n_latents, dtype=torch.bool, device=total.device)
    for first in range(0, len(total), DENSE_ROWS):
        rows = slice(first, min(first + DENSE_ROWS, len(total)))
        part = batch.block(rows)
        with torch.autocast(total.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            z = F.linear(part.x - sae.b_dec, sae.encoder, sae.b_enc)
            values, penalty, n_active = _activate(sae, z, slice(None), part)
            if VARIANTS[config.variant].top_k:
                values = values * _mask(code, rows, z)
                n_active = (values > 0).sum()
            edges = [0, *(config.nested or (config.n_latents,))]
            decoding: Tensor = sae.b_dec
            reconstruction = z.new_zeros((), dtype=torch.float32)
            for low, high in pairwise(edges):
                decoding = decoding + (values[:, low:high] @ sae.decoder[low:high]).float()
                residual = part.x - decoding
                reconstruction = reconstruction + (part.row_weight * residual.square().sum(1)).sum() / (len(edges) - 1)
            if config.variant == "gated":
                aside = part.x - ((z.relu() @ sae.decoder.detach()).float() + sae.b_dec.detach())
                penalty = penalty + (part.row_weight * aside.square().sum(1)).sum()
        if factor is not None:
            penalty = penalty * factor
        torch.autograd.backward(reconstruction + penalty)
        residuals[rows] = residual.detach()
        fired |= (values.detach() > 0).any(0)
        sums.append(torch.stack([reconstruction.detach(), penalty.detach(), n_active.float()]))
    reconstruction, penalty, n_active = torch.stack(sums).double().sum(0)
    return _Parts((reconstruction, penalty, n_active), residuals, fired)


@torch.no_grad()
def _count_dense(sae: SAE, batch: _Batch, *, bfloat16: bool) -> Tensor:
    """Active entries of jumprelu."""
    count = torch.zeros((), dtype=torch.int64, device=batch.x.device)
    for first in range(0, len(batch.x), DENSE_ROWS):
        with torch.autocast(batch.x.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            z = F.linear(batch.x[first : first + DENSE_ROWS] - sae.b_dec, sae.encoder, sae.b_enc)
        count += (z > sae.threshold).sum()
    return count


def _mask(code: Code, rows: slice, z: Tensor) -> Tensor:
    """[b, F] bool: the entries of some rows of a code."""
    low, high = int(code.starts[rows.start]), int(code.starts[rows.stop])
    mask = torch.zeros(z.shape, dtype=torch.bool, device=z.device)
    mask[code.rows[low:high] - rows.start, code.latents[low:high]] = True
    return mask


# ---------------------------------------------------------------------------------------------------------------------
# Revival of dead latents


def _revive(sae: SAE, batch: _Batch, parts: _Parts, dead: Tensor, config: ResolvedTrainConfig) -> Tensor:
    """Gradients of AuxK or of ghost gradients, for the dead latents only; the loss of this process."""
    index = dead.nonzero().squeeze(1)
    encoder, b_enc, decoder = (p.detach()[index].requires_grad_() for p in (sae.encoder, sae.b_enc, sae.decoder))
    x, residual = batch.x - sae.b_dec.detach(), parts.residual
    bfloat16 = config.precision == "bfloat16"
    if config.ghost:
        loss = _add_ghost(x, residual, batch, encoder, b_enc, decoder, bfloat16=bfloat16)
    else:
        sums = all_sum(torch.cat([residual.double().sum(0), residual.double().square().sum()[None]]))
        variance = (sums[-1] - sums[:-1].square().sum() / batch.n_rows).clamp_min(1e-12)
        scale = config.aux / variance.float()
        loss = _add_aux(x, residual, scale, encoder, b_enc, decoder, sae.d_model // 2, bfloat16=bfloat16)
    for parameter, part in ((sae.encoder, encoder), (sae.b_enc, b_enc), (sae.decoder, decoder)):
        assert part.grad is not None
        gradient(parameter).index_add_(0, index, part.grad)
    if config.ghost:  # PatchSAE lets these reach b_dec too, through x - b_dec
        assert b_enc.grad is not None
        gradient(sae.b_dec).sub_(b_enc.grad @ encoder.detach())
    return loss


def _add_aux(
    x: Tensor, residual: Tensor, scale: Tensor, encoder: Tensor, b_enc: Tensor, decoder: Tensor, k: int, *,
    bfloat16: bool,
) -> Tensor:  # fmt: skip
    """scale * ||residual - its reconstruction from the k strongest latents||^2, sparse or dense."""
    k = min(k, len(encoder))
    if k / len(encoder) <= _dense_share(x, bfloat16):
        code = select_topk(x, encoder, b_enc, k, bfloat16=bfloat16)
        values = preactivations(x, x.new_zeros(x.shape[1]), encoder, b_enc, code).relu()
        loss = scale * (residual - decode(values, decoder, code)).square().sum()
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
    """PatchSAE's ghost gradients: g = exp(z_dead) decoder_dead, scaled to half of the residual's norm; the error of the
    residual's reconstruction by g, scaled elementwise to the error of the reconstruction itself.
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
