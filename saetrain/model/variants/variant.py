"""Variant: what an SAE computes between its pre-activations z and its values, and what training adds to the loss.

A variant has no state of its own: weights and settings are those of the SAE that it is given. The base class is a ReLU
with an L1 penalty; each variant overrides what it does differently. The methods work both on entries [N], where
`latents` is [N], and on blocks [b, F], where `latents` is a slice of all.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saetrain.model.active_latents import Code, Lap, select_above

if TYPE_CHECKING:
    from saetrain.config import ResolvedSAEConfig
    from saetrain.model.sae import SAE

THRESHOLD_STEP = 0.005
"""How far a dead latent's threshold is lowered in one step, in units of x'."""


class Variant:
    exact_k = False
    """Whether a token has at most k active latents when it is encoded alone."""
    has_thresholds = False
    """Whether training starts with thresholds that let target_l0 latents of a token fire."""

    # The network

    def init_encoder(self, decoder: Tensor, generator: torch.Generator) -> Tensor:
        """The encoder [F, D] at the start."""
        return decoder.clone()

    def add_parameters(self, sae: "SAE") -> None:
        """Register the parameters and buffers that only this variant has."""

    def floor(self, sae: "SAE") -> Tensor:
        """The threshold of inference, [] or [F]: only pre-activations above it are active."""
        return torch.zeros((), device=sae.encoder.device)

    def activate(self, sae: "SAE", z: Tensor, latents: Tensor | slice) -> Tensor:
        """The values of entries that are above the floor."""
        return z.relu()

    # The loss

    def row_weight(self, squares: Tensor, variance: Tensor, n_rows: Tensor, d_model: int) -> Tensor:
        """[B] or []: weight of a row's squared error, from ||x||^2 [B] and the variance of the batch."""
        return 1 / variance

    def select(self, sae: "SAE", centered: Tensor, *, bfloat16: bool, max_share: float, lap: Lap) -> Code:
        """The entries that may be active in training; only those of the first rows where they are too many."""
        weights, floor = (sae.encoder, sae.b_enc), self.training_floor(sae)
        return select_above(centered, *weights, floor, bfloat16=bfloat16, max_share=max_share, lap=lap)

    def training_floor(self, sae: "SAE") -> Tensor | float:
        """Entries at or below it take no gradient."""
        return 0.0

    def penalize(self, sae: "SAE", z: Tensor, latents: Tensor | slice, share: Tensor) -> tuple[Tensor, Tensor]:
        """(values, penalty []). `share` is the penalty's weight over the number of rows."""
        return self.activate(sae, z, latents), share * z.relu().float().sum()

    def penalizes_l0(self, config: "ResolvedSAEConfig") -> bool:
        """Whether the penalty is a function of the whole batch's l0, as `l0_penalty` computes it.

        `penalize` then returns the number of active entries, which carries the gradient.
        """
        return False

    def l0_penalty(
        self, config: "ResolvedSAEConfig", weight: float, n_active: Tensor, n_rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(penalty [], its derivative with respect to the number of active entries []) of a whole batch."""
        raise NotImplementedError

    def gate_values(self, z: Tensor) -> Tensor | None:
        """Values that must reconstruct the rows too, with a dictionary that takes no gradient; None for none."""
        return None

    # Thresholds and dead latents

    def start_thresholds(self, sae: "SAE", threshold: float) -> None:
        """Let only pre-activations above the threshold fire."""

    def lower_thresholds(self, sae: "SAE", dead: Tensor) -> None:
        """Let dead latents [F] bool fire more easily, by a small step."""

    def reset_latents(self, sae: "SAE", index: Tensor, alive: Tensor) -> None:
        """Set the own parameters of latents [n] whose weights were replaced. `alive`: [F] bool."""

    def after_update(self, sae: "SAE") -> None:
        """Bring the own parameters back into their range after an optimizer step."""
