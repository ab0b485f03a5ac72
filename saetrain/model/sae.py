"""SAE: the network. Variants differ in the function f from pre-activations z to values; see saetrain/model/variants.

    x' = (x - mean) * scale                      normalization, fixed before training
    z  = encoder (x' - b_dec) + b_enc
    x^ = (decoder^T f(z) + b_dec) / scale + mean

An SAE of another package may normalize each token by its own size before that (token_size.py), and its pre-activations
over the latents of a token (latent_norm.py).

Source: PatchSAE (arXiv 2412.05276) footnote 2 for the biases and the centering.
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from safetensors.torch import load, load_file
from torch import Tensor, nn
from torch.nn import functional as F

from actcache import CorruptError, SettingsError
from actcache.text import is_utf8
from saetrain.config import ResolvedSAEConfig
from saetrain.model.active_latents import count, select_above, select_topk
from saetrain.model.latent_norm import LatentNorm
from saetrain.model.token_size import TokenSize, measure_tokens
from saetrain.model.variants import find_variant

OPTIONAL = ("norms", "latent_gain", "latent_shift")
"""Buffers [F] that only some SAEs of other packages have."""


class SAE(nn.Module):
    """A sparse autoencoder over rows [B, D].

    Parameters: encoder [F, D], b_enc [F], decoder [F, D] (the dictionary, with rows of norm 1), b_dec [D]; also
    threshold [F] for jumprelu, and log_scale [F] and b_mag [F] for gated.
    Buffers: mean [D], scale []; also threshold [] for batchtopk. An SAE of another package may have more: norms [F], if
    its decoder rows had different norms: its values are multiplied by them after they were selected, so that a value is
    the length of what its latent adds, as in an SAE trained here; and latent_gain and latent_shift [F], if a LayerNorm
    over the latents follows its encoder.
    """

    mean: Tensor
    scale: Tensor
    threshold: Tensor
    norms: Tensor | None
    latent_gain: Tensor | None
    latent_shift: Tensor | None
    log_scale: nn.Parameter
    b_mag: nn.Parameter

    def __init__(self, config: ResolvedSAEConfig, d_model: int, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.variant = find_variant(config.variant)
        self.d_model = d_model
        generator = torch.Generator().manual_seed(seed)
        decoder = F.normalize(torch.randn(config.n_latents, d_model, generator=generator))
        self.decoder = nn.Parameter(decoder)
        self.encoder = nn.Parameter(self.variant.init_encoder(decoder, generator))
        self.b_enc = nn.Parameter(torch.zeros(config.n_latents))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("mean", torch.zeros(d_model))
        self.register_buffer("scale", torch.ones(()))
        for name in OPTIONAL:
            self.register_buffer(name, None)  # and so in no file, unless it is set
        self._latent_norm: LatentNorm | None = None
        self.variant.add_parameters(self)

    @classmethod
    def load(cls, path: str | Path, config: ResolvedSAEConfig, d_model: int | None = None) -> "SAE":
        """Read `sae.safetensors`. Raises CorruptError if it is truncated or has other shapes."""
        try:
            tensors = load_file(path) if is_utf8(path) else load(Path(path).read_bytes())
            shape = tuple(tensors["decoder"].shape)
            if shape != (config.n_latents, d_model or shape[-1]):  # before memory is taken for what the settings claim
                raise ValueError(f"decoder is {shape}, but the settings say {(config.n_latents, d_model)}")
            sae = cls(config, shape[1])
            sae.add_optional(tensors)
            sae.load_state_dict(tensors)
        except (OSError, safetensors.SafetensorError, KeyError, RuntimeError, ValueError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CorruptError(f"{path} could not be read as an SAE ({reason}). Train it again.") from error
        return sae.requires_grad_(False).eval()

    def add_optional(self, names: Collection[str]) -> None:
        """Make room for the optional buffers among `names`. Raises ValueError for a half of a LayerNorm."""
        if ("latent_gain" in names) != ("latent_shift" in names):
            raise ValueError("latent_gain and latent_shift belong together")
        for name in OPTIONAL:
            if name in names:
                setattr(self, name, torch.ones(self.config.n_latents))

    def set_normalization(self, mean: NDArray[np.float64], mean_square: float) -> None:
        """Center on `mean` [D] and scale so that E||x'||^2 = D, given E||x - mean||^2 = `mean_square`."""
        self.mean.copy_(torch.from_numpy(mean))
        self.scale.fill_((self.d_model / max(mean_square, 1e-12)) ** 0.5)

    def normalize(self, x: Tensor, *, like: Tensor | None = None) -> Tensor:
        """Activations [B, D] of any float dtype -> x' in float32.

        Args:
            like: the activations [B, D] whose sizes apply, where the SAE normalizes each token by its size: those that
                x is a reconstruction of. By default x itself.
        """
        x = x.float()
        if self.config.per_token:
            size = self._measure(x if like is None else like)
            x = (x - size.shift) / size.divisor
        return (x - self.mean) * self.scale

    def denormalize(self, x: Tensor, *, like: Tensor | None = None) -> Tensor:
        """x' -> activations.

        Args:
            like: the activations that x' came from, or of the same sizes, in the shape of x'. An SAE that normalizes
                each token by its size needs them and others ignore them.

        Raises:
            SettingsError: this SAE needs `like`.
        """
        x = x / self.scale + self.mean
        if not self.config.per_token:
            return x
        size = self._measure(like)
        return x * size.factor + size.shift

    def units(self, like: Tensor) -> Tensor:
        """How far x' moves where an activation moves by 1: [], or [B, 1] for an SAE that normalizes each token.

        It is infinite for a token of size 0, which no code can move.

        Args:
            like: the activations [B, D] of the tokens.
        """
        return self.scale / self._measure(like).factor if self.config.per_token else self.scale

    def _measure(self, like: Tensor | None) -> TokenSize:
        if like is None:
            raise SettingsError(
                f"This SAE normalizes each token by its own size ({self.config.normalize}), so a reconstruction needs "
                "the activations that were encoded. Give them as like=."
            )
        return measure_tokens(self.config.normalize, like)

    def activate(self, z: Tensor, latents: Tensor | slice = slice(None)) -> Tensor:
        """The values f(z) of entries above the floor: [N] of the given latents, or [B, F]."""
        values = self.variant.activate(self, z, latents)
        return values if self.norms is None else values * self.norms[latents]

    @torch.no_grad()
    def encoder_inputs(self, x: Tensor) -> Tensor:
        """Activations [B, D] -> the rows that the weight of `encoder_weights` multiplies: x' - b_dec [B, D], or [B, D +
        1] with a LayerNorm over the latents."""
        centered = self.normalize(x).sub_(self.b_dec)
        norm = self._find_latent_norm()
        return centered if norm is None else norm.scale_rows(centered)

    def encoder_weights(self) -> tuple[Tensor, Tensor]:
        """Weight and bias [F] of the product that gives the pre-activations of a token."""
        norm = self._find_latent_norm()
        return (self.encoder.detach(), self.b_enc.detach()) if norm is None else (norm.weight, norm.bias)

    def _find_latent_norm(self) -> LatentNorm | None:
        if self.latent_gain is None or self.latent_shift is None:
            return None
        if self._latent_norm is None or self._latent_norm.weight.device != self.encoder.device:
            self._latent_norm = LatentNorm.of(self.encoder, self.b_enc, self.latent_gain, self.latent_shift)
        return self._latent_norm

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Activations [B, D] -> the active entries (row, latent, value), sorted by row, then latent, in float32."""
        if not len(x):
            return x.new_empty(0, dtype=torch.int64), x.new_empty(0, dtype=torch.int64), x.new_empty(0).float()
        inputs, (weight, bias) = self.encoder_inputs(x), self.encoder_weights()
        if self.variant.exact_k:
            code = select_topk(inputs, weight, bias, self.config.k)
        else:
            code = select_above(inputs, weight, bias, self.variant.floor(self))
        rows, latents, values = code.rows, code.latents, self.activate(code.values, code.latents)
        active = values > 0
        if not active.all():
            rows, latents, values = rows[active], latents[active], values[active]
        return rows, latents, values

    @torch.no_grad()
    def decode(
        self, rows: Tensor, latents: Tensor, values: Tensor, n_rows: int, *, like: Tensor | None = None
    ) -> Tensor:
        """Active entries -> reconstructed activations [n_rows, D].

        Args:
            like: the activations [n_rows, D] that were encoded, as `denormalize` takes them.

        Raises:
            SettingsError: this SAE needs `like`, or `like` has another number of rows.
        """
        if like is not None and len(like) != n_rows:
            raise SettingsError(f"like must be the {n_rows:,} rows that were encoded, got {len(like):,} rows.")
        return self.denormalize(self.decode_normalized(rows, latents, values, n_rows), like=like)

    @torch.no_grad()
    def decode_normalized(self, rows: Tensor, latents: Tensor, values: Tensor, n_rows: int) -> Tensor:
        """Active entries -> the reconstruction of x' [n_rows, D], in the units that `normalize` gives."""
        starts = F.pad(count(rows, n_rows).cumsum(0), (1, 0))[:-1]
        summed = F.embedding_bag(latents, self.decoder, starts, per_sample_weights=values, mode="sum")
        return summed.add_(self.b_dec)
