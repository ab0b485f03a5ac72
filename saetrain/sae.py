"""SAE: what the network is. Variants differ in their activation only.

    x' = (x - mean) * scale                      normalization, fixed before training
    z  = activation(encoder (x' - b_dec) + b_enc)
    x^ = (decoder^T z + b_dec) / scale + mean

Source: PatchSAE (arXiv 2412.05276) footnote 2 for biases and centering; Gao et al. 2024 for top-k.
"""

from pathlib import Path

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from actcache import CorruptError
from saetrain.config import SAEConfig
from saetrain.sparse import select_above, select_topk


class SAE(nn.Module):
    """A sparse autoencoder over rows [B, D].

    Parameters: encoder [F, D], b_enc [F], decoder [F, D] (unit rows: the dictionary), b_dec [D].
    Buffers: mean [D], scale []; batchtopk: threshold [], the pre-activation above which a latent is active when rows
    are encoded one by one.
    """

    mean: Tensor
    scale: Tensor
    threshold: Tensor

    def __init__(self, config: SAEConfig, d_model: int, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.d_model = d_model
        generator = torch.Generator().manual_seed(seed)
        decoder = F.normalize(torch.randn(config.size, d_model, generator=generator))
        encoder = decoder.clone()
        if config.variant == "relu":  # PatchSAE: independent, and so small that the first decoding is near 0
            bound = (6 / config.size) ** 0.5
            encoder = torch.empty_like(decoder).uniform_(-bound, bound, generator=generator)
        self.decoder = nn.Parameter(decoder)
        self.encoder = nn.Parameter(encoder)
        self.b_enc = nn.Parameter(torch.zeros(config.size))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("mean", torch.zeros(d_model))
        self.register_buffer("scale", torch.ones(()))
        if config.variant == "batchtopk":
            self.register_buffer("threshold", torch.zeros(()))

    @classmethod
    def load(cls, path: str | Path, config: SAEConfig) -> "SAE":
        """Read `sae.safetensors`. Raises CorruptError when it is truncated or of other shapes."""
        try:
            tensors = load_file(path)
            sae = cls(config, tensors["decoder"].shape[1])
            sae.load_state_dict(tensors)
        except (OSError, safetensors.SafetensorError, KeyError, RuntimeError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CorruptError(f"{path} cannot be read as an SAE ({reason}). Train it again.") from error
        return sae.requires_grad_(False).eval()

    def set_normalization(self, mean: NDArray[np.float64], mean_square: float) -> None:
        """Center on `mean` [D] and scale so that E||x'||^2 = D, from E||x - mean||^2 = `mean_square`."""
        self.mean.copy_(torch.from_numpy(mean))
        self.scale.fill_((self.d_model / max(mean_square, 1e-12)) ** 0.5)

    def normalize(self, x: Tensor) -> Tensor:
        """[B, D] of any float dtype -> x', float32."""
        return (x.float() - self.mean) * self.scale

    def denormalize(self, x: Tensor) -> Tensor:
        """x' -> activations."""
        return x / self.scale + self.mean

    def bias(self) -> Tensor:
        """b_enc - encoder b_dec [F]: subtracts b_dec from the input without touching the rows."""
        return self.b_enc - self.encoder @ self.b_dec

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Activations [B, D] -> the active entries (row, latent, value), sorted by row, then latent; float32 math."""
        x, bias = self.normalize(x), self.bias()
        if self.config.variant == "topk":
            code = select_topk(x, self.encoder, bias, self.config.k)
            latents, order = code.latents.sort(dim=1)
            values = code.values.gather(1, order)
            rows, columns = torch.nonzero(values, as_tuple=True)
            return rows, latents[rows, columns], values[rows, columns]
        if not len(x):
            return x.new_empty(0, dtype=torch.int64), x.new_empty(0, dtype=torch.int64), x.new_empty(0)
        threshold = float(self.threshold) if self.config.variant == "batchtopk" else 0.0
        ragged = select_above(x, self.encoder, bias, threshold)
        return ragged.rows(), ragged.latents, ragged.values

    @torch.no_grad()
    def decode(self, rows: Tensor, latents: Tensor, values: Tensor, n_rows: int) -> Tensor:
        """Active entries -> reconstructed activations [n_rows, D]."""
        starts = F.pad(torch.bincount(rows, minlength=n_rows).cumsum(0), (1, 0))[:-1]
        summed = F.embedding_bag(latents, self.decoder, starts, per_sample_weights=values, mode="sum")
        return self.denormalize(summed + self.b_dec)
