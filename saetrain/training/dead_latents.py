"""Initial weights from data, and the revival of dead latents: rows in, weights changed in place.

Nothing here takes gradients, and everything is a function of the rows and of (seed, step).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from saetrain.model import SAE

BLEND = 0.8
"""Weight of the token in a direction of `init=data`; the rest is random (Anthropic, October 2025; saev's default)."""
ENCODER_SHARE = 0.2
"""Norm of the encoder row of a resampled latent, relative to the mean norm of living rows (Bricken et al. 2023)."""


@torch.no_grad()
def init_from_rows(sae: SAE, rows: Tensor, *, seed: int) -> None:
    """Point the dictionary at tokens: decoder row = encoder row = the direction of a row, blended with a random one.

    Args:
        rows: [n, D] normalized; they repeat if n < F.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = F.normalize(torch.randn(sae.decoder.shape, generator=generator)).to(rows.device)
    chosen = rows[torch.arange(len(sae.decoder), device=rows.device) % len(rows)] - sae.b_dec
    direction = F.normalize(BLEND * F.normalize(chosen) + (1 - BLEND) * noise)
    sae.decoder.copy_(direction)
    sae.encoder.copy_(direction)


@torch.no_grad()
def init_thresholds(sae: SAE, rows: Tensor) -> None:
    """Start the thresholds such that target_l0 latents of a row are active: training is sparse from its first step.

    All latents get the same threshold, the quantile over `rows` [n, D] and all latents.
    """
    rows = rows[: max(1, (1 << 22) // sae.config.n_latents)]
    z = F.linear(rows - sae.b_dec, sae.encoder, sae.b_enc).flatten()
    n_active = min(len(z), max(1, round(sae.config.expected_l0 * len(rows))))
    threshold = float(z.topk(n_active, sorted=False).values.min().clamp_min(0))
    sae.variant.start_thresholds(sae, threshold)


@torch.no_grad()
def lower_thresholds(sae: SAE, dead: Tensor) -> None:
    """Lower the thresholds of dead latents (jumprelu, gated) by a small step.

    Anthropic's pre-activation loss (January 2025) has the same effect: Adam turns a gradient of constant sign into
    steps of constant size. AuxK alone cannot move a threshold or a gate that is never crossed.
    """
    sae.variant.lower_thresholds(sae, dead)


@torch.no_grad()
def resample(sae: SAE, rows: Tensor, dead: Tensor, *, seed: int, step: int) -> Tensor:
    """Point dead latents at badly reconstructed rows, which are drawn with probabilities proportional to their error.

    Source: resampling in Bricken et al. 2023, "Towards Monosemanticity". The decoder row becomes the direction of the
    row's residual, the encoder row the same at a fifth of the mean norm of living rows, and the bias 0.

    Args:
        rows: [n, D] normalized.
        dead: [F] bool.

    Returns:
        The latents [n] that were replaced.
    """
    index = dead.nonzero().squeeze(1)
    if not len(index):
        return index
    code = sae.encode(sae.denormalize(rows))
    residual = rows - sae.normalize(sae.decode(*code, len(rows)))
    weight = residual.square().sum(1).cpu().double()
    generator = torch.Generator().manual_seed(hash((seed, step)) & 0x7FFFFFFF)
    index = index[: len(rows)]
    chosen = torch.multinomial(weight.clamp_min(1e-12), len(index), generator=generator).to(rows.device)
    direction = F.normalize(residual[chosen])
    alive = sae.encoder[~dead]
    norm = alive.norm(dim=1).mean() if len(alive) else torch.ones((), device=rows.device)
    sae.decoder[index] = direction
    sae.encoder[index] = direction * (ENCODER_SHARE * norm)
    sae.b_enc[index] = 0
    sae.variant.reset_latents(sae, index, ~dead)
    return index
