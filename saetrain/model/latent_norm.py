"""LayerNorm over the latents of a token, between the encoder and the activation, without an array of rows x latents.

    y = encoder (x' - b_dec) + b_enc
    z = gain (y - mean y) / sqrt(var y + 1e-5) + shift         mean and variance over the F latents of a token

y is linear in q = (x' - b_dec, 1), and so is y - mean y = A q, where A [F, D + 1] is [encoder, b_enc] less the mean of
its rows. Hence var y = q^T (A^T A / F) q = ||R q||^2 with a root R [D + 1, D + 1] of that small matrix, and

    z = (gain A) (q / sqrt(||R q||^2 + 1e-5)) + shift

is what an encoder `gain A` with the bias `shift` makes of rows that are divided by the deviation of their
pre-activations. Everything that selects latents works on these as on any other encoder.

Source: torch.nn.LayerNorm as overcomplete's MLPEncoder puts it after its linear layer (`modules.py`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-5
BLOCK_LATENTS = 4096


@dataclass(frozen=True)
class LatentNorm:
    """The encoder that a LayerNorm over its latents makes of another one."""

    weight: Tensor  # [F, D + 1]
    bias: Tensor  # [F]
    root: Tensor  # [D + 1, D + 1]

    @classmethod
    @torch.no_grad()
    def of(cls, encoder: Tensor, b_enc: Tensor, gain: Tensor, shift: Tensor) -> "LatentNorm":
        """From encoder [F, D], b_enc, gain and shift [F]. It computes the root in float64, block by block."""
        affine = torch.cat([encoder.detach(), b_enc.detach()[:, None]], dim=1)
        affine = affine - affine.cpu().mean(0, dtype=torch.float64).float().to(affine.device)
        gram = torch.zeros(affine.shape[1], affine.shape[1], dtype=torch.float64)
        for part in torch.split(affine, BLOCK_LATENTS):
            block = part.cpu().double()
            gram += block.T @ block
        values, vectors = torch.linalg.eigh(gram / len(affine))
        root = (vectors * values.clamp_min(0).sqrt()).T.float().to(affine.device)
        return cls(affine.mul_(gain[:, None]), shift, root)

    def scale_rows(self, centered: Tensor) -> Tensor:
        """x' - b_dec [B, D] -> the rows [B, D + 1] that `weight` multiplies."""
        rows = F.pad(centered, (0, 1), value=1.0)
        variance = (rows @ self.root.T).square().sum(1, keepdim=True)
        return rows / (variance + EPS).sqrt()
