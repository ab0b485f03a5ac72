"""Foreign: a checkpoint of another package as an SAE of ours, with the package's own forward pass to compare it with.

`build_sae` makes the SAE from foreign tensors; `fold` prepares an SAE of ours for export by folding its normalization
into the weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from actcache import SettingsError
from saetrain.config import SAEConfig
from saetrain.model import SAE

Forward = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Activations [B, D] -> (codes [B, F], reconstruction [B, D]), dense, by the package's own formulas."""


@dataclass(frozen=True)
class Foreign:
    """A checkpoint: `sae` is our version of it, and `forward` computes what its own package would."""

    format: str
    sae: SAE
    forward: Forward


def build_sae(
    variant: str, encoder: Tensor, decoder: Tensor, b_dec: Tensor, parts: Mapping[str, Tensor], *,
    centered: bool = True, k: int | None = None,
) -> SAE:  # fmt: skip
    """An SAE of ours from encoder [F, D], decoder [F, D], b_dec [D] and the variant's own parts [F].

    Args:
        centered: whether b_dec is subtracted before the encoder. If it is not, the biases absorb it, because
            E x + b = E (x - b_dec) + (b + E b_dec); for gated, b_mag absorbs it too, times exp(log_scale).
    """
    n_latents, d_model = encoder.shape
    config = SAEConfig(variant, n_latents, n_latents if k is None else k, normalize="none").resolve(d_model)
    parts = dict(parts)
    if not centered:
        shift = encoder @ b_dec
        parts["b_enc"] = parts["b_enc"] + shift
        if "b_mag" in parts:
            parts["b_mag"] = parts["b_mag"] + parts["log_scale"].exp() * shift
    sae = SAE(config, d_model).requires_grad_(False)
    tensors = {"encoder": encoder, "decoder": decoder, "b_dec": b_dec, **parts}
    sae.load_state_dict({**sae.state_dict(), **{name: value.float().contiguous() for name, value in tensors.items()}})
    return sae.eval()


@torch.no_grad()
def fold(sae: SAE) -> dict[str, Tensor]:
    """The same function on raw activations: encoder and decoder [F, D], b_enc, b_dec and the variant's own parts.

    (x - mean) scale - b = scale (x - (mean + b / scale)), and (D f + b) / scale + mean = (D / scale) f + (mean + b /
    scale). Codes keep their values, so thresholds stay.
    """
    tensors = {name: value.detach().clone() for name, value in sae.state_dict().items()}
    mean, scale = tensors.pop("mean"), tensors.pop("scale")
    return {
        **tensors,
        "encoder": tensors["encoder"] * scale,
        "decoder": tensors["decoder"] / scale,
        "b_dec": tensors["b_dec"] / scale + mean,
    }


def keep_largest(z: Tensor, k: int) -> Tensor:
    """z [B, F] with all entries set to 0 except the k largest of each row."""
    top = z.topk(k, dim=1)
    return torch.zeros_like(z).scatter(1, top.indices, top.values)


def refuse(sae: SAE, format_name: str, variants: tuple[str, ...]) -> None:
    """Raise SettingsError for a variant that a format cannot hold."""
    if sae.config.variant not in variants:
        raise SettingsError(
            f"{format_name} cannot hold a {sae.config.variant} SAE, only {', '.join(variants)}. "
            "Convert to saelens or dictionary_learning, which hold every variant."
        )
