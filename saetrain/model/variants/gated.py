"""gated: z decides which latents are active, a second path decides how strongly (Rajamanoharan et al. 2024, arXiv
2404.16014).

The value is ReLU(exp(log_scale) (z - b_enc) + b_mag) where z > 0. The L1 penalty acts on ReLU(z), which must also
reconstruct the rows by itself, with a dictionary that takes no gradient.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from saetrain.model.variants.variant import THRESHOLD_STEP, Variant

if TYPE_CHECKING:
    from saetrain.model.sae import SAE


class Gated(Variant):
    has_thresholds = True

    def add_parameters(self, sae: "SAE") -> None:
        sae.log_scale = nn.Parameter(torch.zeros(sae.config.n_latents))
        sae.b_mag = nn.Parameter(torch.zeros(sae.config.n_latents))

    def activate(self, sae: "SAE", z: Tensor, latents: Tensor | slice) -> Tensor:
        return ((z - sae.b_enc[latents]) * sae.log_scale.exp()[latents] + sae.b_mag[latents]).relu()

    def penalize(self, sae: "SAE", z: Tensor, latents: Tensor | slice, share: Tensor) -> tuple[Tensor, Tensor]:
        values = self.activate(sae, z, latents) * (z > 0)
        return values, share * z.relu().float().sum()

    def gate_values(self, z: Tensor) -> Tensor:
        return z.relu()

    def start_thresholds(self, sae: "SAE", threshold: float) -> None:
        sae.b_enc.sub_(threshold)

    def lower_thresholds(self, sae: "SAE", dead: Tensor) -> None:
        sae.b_enc.add_(THRESHOLD_STEP * dead)

    def reset_latents(self, sae: "SAE", index: Tensor, alive: Tensor) -> None:
        sae.log_scale[index], sae.b_mag[index] = 0, 0


VARIANT = Gated()
