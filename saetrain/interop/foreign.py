"""The parts of which every reader and writer is made: tensors under our names, and an SAE of ours from them.

`take_weights` and `build_sae` make the SAE from foreign tensors; `fold` and `give_weights` prepare an SAE of ours for
export, with its normalization folded into the weights.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from actcache import CorruptError, SettingsError
from saetrain.config import SAEConfig
from saetrain.interop.files import take
from saetrain.model import SAE

Names = Mapping[str, str]
"""Our name of a tensor -> its name in a format."""
_SHARED = {"encoder": "W_enc", "decoder": "W_dec", "b_dec": "b_dec"}
PLAIN: Names = {**_SHARED, "b_enc": "b_enc"}
GATED: Names = {**_SHARED, "b_enc": "b_gate", "log_scale": "r_mag", "b_mag": "b_mag"}
"""The names that most packages use."""
TRANSPOSED = ("W_enc", "decoder.weight", "decoder._weight", "enc", "encoder")
"""These are [D, F]; an encoder or decoder of another name is [F, D]."""

UNIFORM = 1e-5
"""Largest relative difference of the norms of decoder rows that counts as none; float32 rounds them by 1e-7."""


def take_weights(tensors: Mapping[str, object], path: Path, names: Names) -> dict[str, Tensor]:
    """Encoder and decoder [F, D], b_dec [D] and the biases and scales [F], under our names. Raises as `take`."""
    encoder = _turned(names["encoder"], take(tensors, path, {names["encoder"]: (None, None)})[names["encoder"]])
    n_latents, d_model = encoder.shape
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names.values(), (n_latents,))
    for ours, shape in (("encoder", (n_latents, d_model)), ("decoder", (n_latents, d_model)), ("b_dec", (d_model,))):
        shapes[names[ours]] = shape[::-1] if names[ours] in TRANSPOSED else shape
    taken = take(tensors, path, shapes)
    return {ours: _turned(name, taken[name]) for ours, name in names.items()}


def give_weights(weights: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """The inverse of `take_weights`, contiguous."""
    return {name: _turned(name, weights[ours]).contiguous() for ours, name in names.items()}


def _turned(name: str, tensor: Tensor) -> Tensor:
    return tensor.T if name in TRANSPOSED else tensor


def build_sae(
    variant: str, weights: Mapping[str, Tensor], *, centered: bool = True, k: int | None = None, normalize: str = "none"
) -> SAE:  # fmt: skip
    """An SAE of ours from encoder [F, D], decoder [F, D], b_dec [D] and the variant's own parts [F].

    Args:
        weights: also latent_gain and latent_shift [F], if a LayerNorm over the latents follows the encoder.
        centered: whether b_dec is subtracted before the encoder. If it is not, the biases absorb it, because
            E x + b = E (x - b_dec) + (b + E b_dec); for gated, b_mag absorbs it too, times exp(log_scale).
        normalize: `none`, or the normalization of each token (TOKEN_NORMALIZATIONS) whose result the weights read.
    """
    weights, (n_latents, d_model) = dict(weights), weights["encoder"].shape
    config = SAEConfig(variant, n_latents, n_latents if k is None else k, normalize="none").resolve(d_model)
    config = replace(config, normalize=normalize)
    if not centered:
        shift = weights["encoder"] @ weights["b_dec"]
        weights["b_enc"] = weights["b_enc"] + shift
        if "b_mag" in weights:
            weights["b_mag"] = weights["b_mag"] + weights["log_scale"].exp() * shift
    weights = _unit_rows(weights)
    exponents = [weights[name].exp() for name in ("log_scale",) if name in weights]
    if not all(value.sum().isfinite() for value in [*weights.values(), *exponents]):
        raise CorruptError("The weights overflow float32. Check that the checkpoint is complete.")
    sae = SAE(config, d_model).requires_grad_(False)
    sae.add_optional(weights)
    sae.load_state_dict({**sae.state_dict(), **{name: value.float().contiguous() for name, value in weights.items()}})
    return sae.eval()


def set_input(sae: SAE, mean: Tensor, scale: float) -> SAE:
    """The SAE of activations x, given the one of (x - mean) scale; `sae` itself, changed. `mean` is [D] or [].

    ((x - m) c - mean) scale = (x - (m + mean / c)) c scale.
    """
    sae.mean.copy_(mean.double() + sae.mean.double() / scale)
    sae.scale.mul_(scale)
    return sae


def _unit_rows(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same function with decoder rows of norm 1, so that a code is the length of what its latent adds.

    The inverse s of the median norm becomes the scale of the input: E (x - b) = (E / s) (s x - s b), and f W + b is 1/s
    times f (s W) + s b. The norms r of the rows of s W multiply the codes after they were selected, because f (s W) =
    (f r) (s W / r). To fold r into the encoder instead would change which k are the largest. A row of zeros stays one.
    """
    lengths = torch.linalg.vector_norm(weights["decoder"], dim=1, dtype=torch.float64)
    lengths = torch.where(lengths > 0, lengths, 1.0)
    median = float(lengths.median())
    if not 1e-12 < median < 1e12:
        raise CorruptError(
            f"The decoder's rows have a median norm of {median:.1g}. Check that the checkpoint is complete."
        )
    scale = 1.0 if abs(median - 1) < UNIFORM else 1 / median
    norms = lengths * scale
    uniform = bool(((norms - 1).abs() < UNIFORM).all())
    if uniform and scale == 1:
        return dict(weights)
    return {
        **weights,
        "encoder": weights["encoder"] / scale,
        "decoder": (weights["decoder"].double() / lengths[:, None]).float(),
        "b_dec": weights["b_dec"] * scale,
        "scale": torch.tensor(scale),
        **({} if uniform else {"norms": norms.float()}),
    }


@torch.no_grad()
def fold(sae: SAE, *, centered: bool = True, holds: Collection[str] = ()) -> dict[str, Tensor]:
    """The same function on raw activations: encoder and decoder [F, D], b_enc, b_dec and the variant's own parts.

    Of an SAE that normalizes each token, it is the function on normalized tokens.

    (x - mean) scale - b = scale (x - (mean + b / scale)), and (D f + b) / scale + mean = (D / scale) f + (mean + b /
    scale). Codes keep their values, so thresholds stay.

    Args:
        centered: as for `build_sae`; not for gated.
        holds: the normalizations of each token that the format can hold beside the weights.

    Raises:
        SettingsError: the SAE normalizes each token in a way that the format cannot hold, or its latents.
    """
    if sae.config.per_token and sae.config.normalize not in holds:
        raise SettingsError(
            f"This format cannot hold an SAE that normalizes each token ({sae.config.normalize}). Convert to saelens "
            "or prisma."
        )
    if sae.latent_gain is not None:
        raise SettingsError(
            "This SAE has a LayerNorm over its latents, which no format that is written here can hold. Keep the run."
        )
    tensors = {name: value.detach().clone() for name, value in sae.state_dict().items()}
    mean, scale = tensors.pop("mean"), tensors.pop("scale")
    if "norms" in tensors:  # the codes are written as they were before they were multiplied by the norms
        tensors["decoder"] = tensors["decoder"] * tensors.pop("norms")[:, None]
    tensors["encoder"], tensors["decoder"] = tensors["encoder"] * scale, tensors["decoder"] / scale
    tensors["b_dec"] = tensors["b_dec"] / scale + mean
    if not centered:
        tensors["b_enc"] = tensors["b_enc"] - tensors["encoder"] @ tensors["b_dec"]
    return tensors


def refuse(sae: SAE, format_name: str, variants: tuple[str, ...]) -> None:
    """Raise SettingsError for a variant that a format cannot hold."""
    if sae.config.variant not in variants:
        raise SettingsError(
            f"{format_name} cannot hold a {sae.config.variant} SAE, only {', '.join(variants)}. "
            "Convert to saelens or dictionary_learning, which hold every variant."
        )
