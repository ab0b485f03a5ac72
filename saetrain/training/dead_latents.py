"""What an SAE starts from, and what dead latents are replaced by: rows in, weights changed in place.

Nothing here takes gradients; all of it is a function of the rows and of (seed, step).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from saetrain.model import SAE

BLEND = 0.8
"""Share of the token in a direction of `init=data`; the rest is random (Anthropic, October 2025; saev's default)."""
ENCODER_SHARE = 0.2
"""Norm of a resampled latent's encoder row, as share of the mean norm of the living ones (Bricken et al. 2023)."""


@torch.no_grad()
def init_from_rows(sae: SAE, rows: Tensor, *, seed: int) -> None:
    """Point the dictionary at tokens: decoder row = encoder row = direction of a row, blended with a random one.

    Args:
        rows: [n, D] normalized; taken again from the first where n < F.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = F.normalize(torch.randn(sae.decoder.shape, generator=generator)).to(rows.device)
    chosen = rows[torch.arange(len(sae.decoder), device=rows.device) % len(rows)] - sae.b_dec
    direction = F.normalize(BLEND * F.normalize(chosen) + (1 - BLEND) * noise)
    sae.decoder.copy_(direction)
    sae.encoder.copy_(direction)


@torch.no_grad()
def init_thresholds(sae: SAE, rows: Tensor) -> None:
    """Start jumprelu's thresholds, or gated's gate, where target_l0 latents of a row are active: sparse from the first
    step on. All latents get the same one, the quantile over `rows` [n, D] and all latents.
    """
    rows = rows[: max(1, (1 << 22) // sae.config.n_latents)]
    z = F.linear(rows - sae.b_dec, sae.encoder, sae.b_enc).flatten()
    wanted = min(len(z), max(1, round(sae.config.expected_l0 * len(rows))))
    threshold = float(z.topk(wanted, sorted=False).values.min().clamp_min(0))
    sae.variant.start_thresholds(sae, threshold)


@torch.no_grad()
def lower_thresholds(sae: SAE, dead: Tensor) -> None:
    """Let dead latents of jumprelu and gated fire more easily, by a small step.

    What Anthropic's pre-activation loss (January 2025) comes to under Adam, which turns a gradient of constant sign
    into steps of constant size; AuxK alone cannot move a threshold or a gate that is never crossed.
    """
    sae.variant.lower_thresholds(sae, dead)


@torch.no_grad()
def resample(sae: SAE, rows: Tensor, dead: Tensor, *, seed: int, step: int) -> Tensor:
    """Replace dead latents by rows that are badly reconstructed, drawn with their squared error as weight.

    Source: Bricken et al. 2023, "Towards Monosemanticity", resampling: decoder = direction of what is left of the row,
    encoder = the same at a fifth of the living rows' mean norm, bias 0.

    Args:
        rows: [n, D] normalized. dead: [F] bool.

    Returns:
        [n] the latents that were replaced.
    """
    index = dead.nonzero().squeeze(1)
    if not len(index):
        return index
    code = sae.encode(sae.denormalize(rows))
    residual = rows - sae.normalize(sae.decode(*code, len(rows)))
    weight = residual.square().sum(1).double().cpu()
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
