"""relu: PatchSAE (Lim et al. 2025, arXiv 2412.05276): ReLU, an L1 penalty, and a loss normalized by each row's norm.

The row weight is 1 / (B D ||x||): PatchSAE's code does not square the norm, and its l1 of 8e-5 belongs to that.
"""

import torch
from torch import Tensor

from saetrain.model.variants.variant import Variant


class ReLU(Variant):
    def init_encoder(self, decoder: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the encoder independently of the decoder, and so small that the first reconstruction is near 0."""
        bound = (6 / len(decoder)) ** 0.5
        return torch.empty_like(decoder).uniform_(-bound, bound, generator=generator)

    def row_weight(self, squares: Tensor, variance: Tensor, n_rows: Tensor, d_model: int) -> Tensor:
        return 1 / (n_rows * d_model * squares.sqrt().clamp_min(1e-6))


VARIANT = ReLU()
