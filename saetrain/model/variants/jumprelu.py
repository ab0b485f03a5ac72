"""jumprelu: z where z > threshold, with one trained threshold per latent (Rajamanoharan et al. 2024, arXiv 2407.14435).

Two penalties: quadratic, weight (l0 / target_l0 - 1)^2, and tanh, weight times the mean over rows of the sum of
tanh(4 value) (Anthropic, January 2025).
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saetrain.model.variants.variant import THRESHOLD_STEP, Variant

if TYPE_CHECKING:
    from saetrain.config import ResolvedSAEConfig
    from saetrain.model.sae import SAE

INITIAL_THRESHOLD = 0.1
"""In units of x' (Anthropic, January 2025); training sets it from its first batch."""
TANH_SCALE = 4.0


class _Jump(torch.autograd.Function):
    """z where z > threshold (`value`) or 1 there (step); pseudo-derivatives of the threshold from the entries in a
    window of `bandwidth` around it (Rajamanoharan et al. 2024, eq. 11, 12).
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float, value: bool) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth, ctx.value = bandwidth, value
        is_open = z > threshold
        return z * is_open if value else is_open.to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        z, threshold = ctx.saved_tensors
        window = ((z - threshold).abs() <= ctx.bandwidth / 2) * (-1 / ctx.bandwidth) * grads[0]
        if not ctx.value:
            return None, window.sum_to_size(threshold.shape), None, None
        grad_threshold = (window * threshold).sum_to_size(threshold.shape)
        return grads[0] * (z > threshold), grad_threshold, None, None


class JumpReLU(Variant):
    has_thresholds = True

    def add_parameters(self, sae: "SAE") -> None:
        sae.threshold = nn.Parameter(torch.full((sae.config.n_latents,), INITIAL_THRESHOLD))

    def floor(self, sae: "SAE") -> Tensor:
        return sae.threshold

    def training_floor(self, sae: "SAE") -> Tensor:
        """Entries in the window below a threshold still give it gradients."""
        return sae.threshold - sae.config.bandwidth / 2

    def penalize(self, sae: "SAE", z: Tensor, latents: Tensor | slice, share: Tensor) -> tuple[Tensor, Tensor]:
        threshold, bandwidth = sae.threshold[latents], sae.config.bandwidth
        values: Tensor = _Jump.apply(z, threshold, bandwidth, True)
        if self.penalizes_l0(sae.config):
            return values, _Jump.apply(z, threshold, bandwidth, False).float().sum()
        return values, share * torch.tanh(TANH_SCALE * values).float().sum()

    def penalizes_l0(self, config: "ResolvedSAEConfig") -> bool:
        return config.penalty == "quadratic"

    def l0_penalty(
        self, config: "ResolvedSAEConfig", weight: float, n_active: Tensor, n_rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        excess = n_active / n_rows / config.expected_l0 - 1
        return weight * excess.square(), (2 * weight * excess / (config.expected_l0 * n_rows)).float()

    def start_thresholds(self, sae: "SAE", threshold: float) -> None:
        sae.threshold.fill_(threshold)

    def lower_thresholds(self, sae: "SAE", dead: Tensor) -> None:
        sae.threshold.sub_(THRESHOLD_STEP * dead).clamp_min_(0)

    def reset_latents(self, sae: "SAE", index: Tensor, alive: Tensor) -> None:
        sae.threshold[index] = sae.threshold[alive].mean() if alive.any() else 0.0

    def after_update(self, sae: "SAE") -> None:
        sae.threshold.clamp_min_(0.0)


VARIANT = JumpReLU()
