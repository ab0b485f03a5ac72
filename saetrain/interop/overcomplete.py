"""overcomplete: a state dict in sae.pt, and config.json beside it, as ViSAEBench publishes such SAEs.

encoder.final_block.0.{weight [F, D], bias}, dictionary._weights [F, D] (whose rows are divided by their norms),
dictionary.multiplier [] (its exponential multiplies them), for jumprelu `thresholds` [F] (logarithms); and where the
encoder normalizes, encoder.final_block.1.* of a BatchNorm over the latents, which is folded. The package keeps k and
the threshold of batchtopk outside of its tensors, so config.json tells them. There is no bias before the encoder or
after the decoder, and a value equal to its threshold is active.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from actcache import CorruptError, SettingsError
from saetrain.config import VARIANTS
from saetrain.interop.fields import Fields, check_fields, check_sizes, check_tensors, names, shorten
from saetrain.interop.files import load_tensors, read_config, read_k, take
from saetrain.interop.foreign import build_sae
from saetrain.model import SAE

CONFIG, WEIGHTS = "config.json", "sae.pt"
BLOCK = "encoder.final_block."
NORM = ("weight", "bias", "running_mean", "running_var")
EPS = 1e-5
ARCHITECTURES = ("relu", "topk", "batchtopk", "jumprelu")
SPELLINGS = ("architecture", "activation", "sae_type")
WIDTHS, COUNTS = ("d_model", "input_dim"), ("dict_size", "hidden_dim")
FIELDS = Fields(
    "overcomplete or ViSAEBench",
    used=frozenset({*SPELLINGS, *WIDTHS, *COUNTS, "k", "threshold"}),
    neutral=names("backbone layer expansion_factor seed lr batch_size n_steps num_steps dataset"),
    only={"normalization": ("l2",)},
)


def read(path: Path) -> SAE:
    """Read a folder. Raises CorruptError, and SettingsError for an encoder that no SAE here can compute."""
    file, settings = path / WEIGHTS, path / CONFIG
    config, tensors = read_config(settings), load_tensors(file)
    check_fields(config, FIELDS, settings)
    variant = _read_variant(config, settings)
    known = {f"{BLOCK}0.weight", f"{BLOCK}0.bias", "dictionary._weights", "dictionary.multiplier"}
    has_norm = any(name.startswith(f"{BLOCK}1.") for name in map(str, tensors))
    if has_norm:
        known |= {f"{BLOCK}1.{name}" for name in (*NORM, "num_batches_tracked")}
        if f"{BLOCK}1.running_mean" not in tensors:
            raise SettingsError(f"{file} normalizes each token over its latents, which no SAE here can compute.")
    check_tensors(tensors, known | ({"thresholds"} if variant == "jumprelu" else set()), file)
    weights = _read_encoder(tensors, file)
    n_latents, d_model = weights["encoder"].shape
    check_sizes(config, {**dict.fromkeys(WIDTHS, d_model), **dict.fromkeys(COUNTS, n_latents)}, settings)
    weights = _fold_norm(weights, tensors, file) if has_norm else weights
    weights["decoder"] = _read_dictionary(tensors, (n_latents, d_model), file)
    weights["b_dec"] = torch.zeros(d_model)
    if variant == "jumprelu":
        weights["threshold"] = take(tensors, file, {"thresholds": (n_latents,)})["thresholds"].exp()
    if variant == "batchtopk":
        weights["threshold"] = torch.tensor(_read_threshold(config, settings))
    if "threshold" in weights:  # the next smaller number, because a value here has to be above its threshold
        weights["threshold"] = weights["threshold"].float().nextafter(torch.tensor(-torch.inf)).clamp_min(0)
    k = read_k(config.get("k"), n_latents, settings) if VARIANTS[variant].top_k else None
    return build_sae(variant, weights, k=k)


def _read_variant(config: Mapping[str, object], path: Path) -> str:
    found = [config[name] for name in SPELLINGS if name in config]
    if not found or any(value != found[0] for value in found) or found[0] not in ARCHITECTURES:
        shown = ", ".join(map(shorten, found)) or "none"
        raise SettingsError(f"{path} names the architecture {shown}. Give one of {', '.join(ARCHITECTURES)}.")
    return str(found[0])


def _read_encoder(tensors: Mapping[str, object], file: Path) -> dict[str, Tensor]:
    encoder = take(tensors, file, {f"{BLOCK}0.weight": (None, None)})[f"{BLOCK}0.weight"]
    return {"encoder": encoder, "b_enc": take(tensors, file, {f"{BLOCK}0.bias": (len(encoder),)})[f"{BLOCK}0.bias"]}


def _fold_norm(weights: Mapping[str, Tensor], tensors: Mapping[str, object], file: Path) -> dict[str, Tensor]:
    """gamma (E x + b - m) / sqrt(v + eps) + beta, as one affine map of x."""
    n_latents = len(weights["encoder"])
    taken = take(tensors, file, {f"{BLOCK}1.{name}": (n_latents,) for name in NORM})
    gamma, beta, mean, variance = (taken[f"{BLOCK}1.{name}"] for name in NORM)
    if (variance < 0).any():
        raise CorruptError(f"{file}: a variance of the encoder's BatchNorm is negative. Copy the file again.")
    factor = gamma / (variance + EPS).sqrt()
    return {"encoder": weights["encoder"] * factor[:, None], "b_enc": (weights["b_enc"] - mean) * factor + beta}


def _read_dictionary(tensors: Mapping[str, object], shape: tuple[int, int], file: Path) -> Tensor:
    rows = torch.nn.functional.normalize(take(tensors, file, {"dictionary._weights": shape})["dictionary._weights"])
    if "dictionary.multiplier" in tensors:  # older versions have none
        rows = rows * take(tensors, file, {"dictionary.multiplier": ()})["dictionary.multiplier"].exp()
    return rows


def _read_threshold(config: Mapping[str, object], path: Path) -> float:
    value = config.get("threshold")
    if not isinstance(value, int | float) or isinstance(value, bool) or not -1e12 < value < 1e12:
        raise CorruptError(
            f"{path}: threshold must be a number, got {shorten(value)}. overcomplete keeps it in running_threshold, "
            "which is in no state dict; write it into the settings."
        )
    return max(float(value), 0.0)
