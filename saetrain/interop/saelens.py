"""SAELens 6: a folder with cfg.json and sae_weights.safetensors.

W_enc [D, F], W_dec [F, D], b_dec [D]; standard and topk: b_enc; jumprelu: b_enc, threshold [F]; gated: b_gate, b_mag,
r_mag. Training checkpoints of batchtopk and matryoshka_batchtopk have topk_threshold [], those of jumprelu have
log_threshold or threshold. A batchtopk SAE is written as jumprelu with one threshold, as SAELens does itself.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from actcache import HookPoint, SettingsError
from saetrain.interop.files import read_config, read_k, read_safetensors, take
from saetrain.interop.foreign import GATED, PLAIN, Foreign, build_sae, fold, give_weights, keep_largest, take_weights
from saetrain.model import SAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
VERSION = "6.0.0"
"""The version from which on SAELens reads a folder without conversion."""
ARCHITECTURES = {
    "standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated", "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "batchtopk",
}  # fmt: skip
"""Architecture -> variant."""
EXPORTS = {
    "relu": ("standard", PLAIN), "topk": ("topk", PLAIN), "jumprelu": ("jumprelu", PLAIN),
    "batchtopk": ("jumprelu", PLAIN), "gated": ("gated", GATED),
}  # fmt: skip
"""Variant -> the architecture that it is written as, and the names of its tensors."""


def read(path: Path) -> Foreign:
    """Read a folder. Raises CorruptError, and SettingsError for an unknown architecture or normalization."""
    file, config = path / WEIGHTS, read_config(path / CONFIG)
    tensors = read_safetensors(file)
    architecture = config.get("architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise SettingsError(
            f"{path} has architecture {architecture!r}. Give an SAE of one of {', '.join(ARCHITECTURES)}."
        )
    normalization = config.get("normalize_activations", "none")
    if normalization != "none":
        raise SettingsError(
            f"{path} normalizes its input ({normalization}). Fold it into the weights with SAELens "
            "(fold_activation_norm_scaling_factor) and save it again."
        )
    weights = take_weights(tensors, file, GATED if architecture == "gated" else PLAIN)
    n_latents = len(weights["encoder"])
    centered = bool(config.get("apply_b_dec_to_input", True))
    rescaled = architecture in ("topk", "batchtopk", "matryoshka_batchtopk") and bool(
        config.get("rescale_acts_by_decoder_norm", False)
    )
    k, threshold = None, None
    if "topk" in architecture:
        k = read_k(config.get("k"), n_latents, path / CONFIG)
    if architecture == "jumprelu":
        if "log_threshold" in tensors:
            threshold = take(tensors, file, {"log_threshold": (n_latents,)})["log_threshold"].exp()
        else:
            threshold = take(tensors, file, {"threshold": (n_latents,)})["threshold"]
    if "batchtopk" in architecture:
        threshold = take(tensors, file, {"topk_threshold": ()})["topk_threshold"]

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x - weights["b_dec"] if centered else x
        norm = weights["decoder"].norm(dim=1) if rescaled else torch.ones(n_latents)
        if architecture == "gated":
            is_open = x @ weights["encoder"].T + weights["b_enc"] > 0
            codes = is_open * (x @ (weights["encoder"].T * weights["log_scale"].exp()) + weights["b_mag"]).relu()
        else:
            z = (x @ weights["encoder"].T + weights["b_enc"]) * norm
            codes = keep_largest(z, k).relu() if k and architecture == "topk" else z.relu()
            if threshold is not None:
                codes = codes * (z > threshold)
        return codes, (codes / norm) @ weights["decoder"] + weights["b_dec"]

    ours = _rescale(weights) if rescaled else dict(weights)
    if threshold is not None:
        ours["threshold"] = threshold.clamp_min(0)  # a threshold below 0 has the effect of ReLU
    return Foreign("saelens", build_sae(ARCHITECTURES[architecture], ours, centered=centered, k=k), forward)


def _rescale(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fold the norms r of the decoder rows into the weights: (z r) selects, and z r (W_dec / r) decodes."""
    norm = weights["decoder"].norm(dim=1)
    if not norm.all():
        raise SettingsError(
            "The checkpoint scales by the norms of its decoder rows, and one of them is 0. Give another checkpoint."
        )
    encoder, decoder = weights["encoder"] * norm[:, None], weights["decoder"] / norm[:, None]
    return {**weights, "encoder": encoder, "b_enc": weights["b_enc"] * norm, "decoder": decoder}


def write(sae: SAE, hook_point: HookPoint) -> dict[str, bytes]:
    """File name -> bytes."""
    architecture, names = EXPORTS[sae.config.variant]
    folded = fold(sae)
    tensors = give_weights(folded, names)
    if "threshold" in folded:
        tensors["threshold"] = folded["threshold"].expand(sae.config.n_latents)
    more = {"k": sae.config.k, "rescale_acts_by_decoder_norm": False} if sae.variant.exact_k else {}
    config = {
        "architecture": architecture, "d_in": sae.d_model, "d_sae": sae.config.n_latents, "dtype": "float32",
        "device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": VERSION, "hook_name": str(hook_point), "hook_head_index": None}, **more,
    }  # fmt: skip
    weights = save({name: value.float().contiguous() for name, value in tensors.items()})
    return {CONFIG: json.dumps(config, indent=2).encode(), WEIGHTS: weights}
