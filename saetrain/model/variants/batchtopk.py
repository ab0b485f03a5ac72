"""batchtopk: the k x B largest pre-activations of a batch, so that a token takes as many as it needs.

Inference sees tokens one by one: there a threshold takes over, which follows the smallest active value of the training
batches (Bussmann et al. 2024, arXiv 2412.06410).
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saetrain.model.active_latents import Code, Lap, select_batch_topk
from saetrain.model.variants.topk import TopK

if TYPE_CHECKING:
    from saetrain.model.sae import SAE

THRESHOLD_RATE = 0.01
"""How fast the threshold follows. The decay of 0.999 that other packages use takes thousands of steps to settle."""


class BatchTopK(TopK):
    exact_k = False

    def add_parameters(self, sae: "SAE") -> None:
        sae.register_buffer("threshold", torch.zeros(()))

    def floor(self, sae: "SAE") -> Tensor:
        return sae.threshold

    def select(self, sae: "SAE", centered: Tensor, *, bfloat16: bool, max_share: float, lap: Lap) -> Code:
        """Moves the threshold of inference on."""
        guess, weights = float(sae.threshold), (sae.encoder, sae.b_enc)
        code, smallest = select_batch_topk(centered, *weights, sae.config.k, guess, bfloat16=bfloat16, lap=lap)
        sae.threshold.fill_(smallest if guess <= 0 else guess + THRESHOLD_RATE * (smallest - guess))
        return code


VARIANT = BatchTopK()
