"""topk: the k largest pre-activations of each token, then ReLU (Gao et al. 2024, arXiv 2406.04093). No penalty."""

from typing import TYPE_CHECKING

from torch import Tensor

from saetrain.model.active_latents import Code, Lap, select_topk
from saetrain.model.variants.variant import Variant

if TYPE_CHECKING:
    from saetrain.model.sae import SAE


class TopK(Variant):
    exact_k = True

    def select(self, sae: "SAE", centered: Tensor, *, bfloat16: bool, max_share: float, lap: Lap) -> Code:
        return select_topk(centered, sae.encoder, sae.b_enc, sae.config.k, bfloat16=bfloat16, lap=lap)

    def penalize(self, sae: "SAE", z: Tensor, latents: Tensor | slice, share: Tensor) -> tuple[Tensor, Tensor]:
        return z.relu(), z.new_zeros(())


VARIANT = TopK()
