"""What an SAE is punished for: tensors in, scalar out.

topk, batchtopk: L = ||x' - x^'||^2 / ||x' - mean x'||^2 over the batch, plus AuxK: the residual, reconstructed from the
k_aux strongest dead latents, with the residual's own variance as the unit (Gao et al. 2024, arXiv 2406.04093, A.2).
relu: PatchSAE's code, `reconstruction` = mean over tokens and channels of (x^ - x)^2 / ||x||_2 (the norm is not
squared), plus l1 * mean over tokens of ||z||_1. lambda = 8e-5 is meaningful with this normalization only.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from saetrain.sae import SAE
from saetrain.sparse import Ragged, autoencode, flatten, select_batch_topk, select_topk, topk_autoencode

THRESHOLD_RATE = 0.01
"""How fast batchtopk's threshold of inference follows the smallest active value of a batch (0.999 as decay of peers
takes thousands of steps to settle)."""


class Loss(NamedTuple):
    """Parts of one batch's loss, and which latents fired."""

    total: Tensor  # []
    reconstruction: Tensor  # []
    sparsity: Tensor  # []: AuxK or L1, weighted
    squared_error: Tensor  # []: sum over the batch, in normalized units
    n_active: Tensor  # []
    fired: Tensor  # [F] bool


def topk_loss(sae: SAE, x: Tensor, dead: Tensor, *, aux: float, bfloat16: bool) -> Loss:
    """Loss of a top-k or batch-top-k SAE on normalized rows x [B, D]; `dead` [F] bool."""
    code = _select(sae, x, bfloat16=bfloat16)
    decoding, _ = autoencode(x, sae.encoder, sae.bias(), sae.decoder, code)
    residual = x - sae.b_dec - decoding
    squared_error = residual.square().sum()
    reconstruction = squared_error / _total_variance(x)
    revival = x.new_zeros(())
    if aux and dead.any():
        revival = aux * _aux_loss(sae, x, residual.detach(), dead, bfloat16=bfloat16)
    active = code.values > 0
    fired = torch.zeros(len(sae.b_enc), dtype=torch.bool, device=x.device)
    fired[code.latents[active]] = True
    return Loss(
        reconstruction + revival,
        reconstruction.detach(),
        revival.detach(),
        squared_error.detach(),
        active.sum(),
        fired,
    )


@torch.no_grad()
def _select(sae: SAE, x: Tensor, *, bfloat16: bool) -> Ragged:
    """The active entries of a batch. For batchtopk the running threshold of inference is moved towards its smallest."""
    if sae.config.variant == "topk":
        return flatten(select_topk(x, sae.encoder, sae.bias(), sae.config.k, bfloat16=bfloat16))
    guess = float(sae.threshold)
    code, smallest = select_batch_topk(x, sae.encoder, sae.bias(), sae.config.k, guess, bfloat16=bfloat16)
    sae.threshold.fill_(smallest if guess <= 0 else guess + THRESHOLD_RATE * (smallest - guess))
    return code


def _aux_loss(sae: SAE, x: Tensor, residual: Tensor, dead: Tensor, *, bfloat16: bool) -> Tensor:
    """AuxK: share of the residual's variance that the strongest dead latents leave unexplained."""
    index = dead.nonzero().squeeze(1)
    k_aux = min(len(index), sae.d_model // 2)
    decoding, _ = topk_autoencode(
        x, sae.encoder[index], sae.bias()[index], sae.decoder[index], k_aux, bfloat16=bfloat16
    )
    return (residual - decoding).square().sum() / _total_variance(residual)


def relu_loss(sae: SAE, x: Tensor, *, bfloat16: bool) -> Loss:
    """PatchSAE's loss on rows x [B, D]; dense autograd."""
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=bfloat16):
        z = F.linear(x, sae.encoder, sae.bias()).relu()
        decoding = (z @ sae.decoder).float() + sae.b_dec
    squares = (decoding - x).square()
    reconstruction = (squares / x.norm(dim=1, keepdim=True).clamp_min(1e-6)).mean()
    sparsity = sae.config.l1 * z.float().sum(1).mean()
    active = z > 0
    return Loss(
        reconstruction + sparsity,
        reconstruction.detach(),
        sparsity.detach(),
        squares.detach().sum(),
        active.sum(),
        active.any(0),
    )


def _total_variance(x: Tensor) -> Tensor:
    return (x - x.mean(0)).square().sum().clamp_min(1e-12)
