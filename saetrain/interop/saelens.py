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
from saetrain.interop.foreign import Foreign, build_sae, fold, keep_largest
from saetrain.model import SAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
VERSION = "6.0.0"
"""The version from which on SAELens reads a folder without conversion."""
ARCHITECTURES = ("standard", "topk", "jumprelu", "gated", "batchtopk", "matryoshka_batchtopk")


def read(path: Path) -> Foreign:
    """Read a folder. Raises CorruptError, and SettingsError for an unknown architecture or normalization."""
    file, config = path / WEIGHTS, read_config(path / CONFIG)
    tensors = read_safetensors(file)
    architecture = config.get("architecture")
    if architecture not in ARCHITECTURES:
        raise SettingsError(
            f"{path} has architecture {architecture!r}. Give an SAE of one of {', '.join(ARCHITECTURES)}."
        )
    normalization = config.get("normalize_activations", "none")
    if normalization != "none":
        raise SettingsError(
            f"{path} normalizes its input ({normalization}). Fold it into the weights with SAELens "
            "(fold_activation_norm_scaling_factor) and save it again."
        )
    got = take(tensors, file, W_enc=(None, None))
    d_model, n_latents = got["W_enc"].shape
    got |= take(tensors, file, W_dec=(n_latents, d_model), b_dec=(d_model,))
    biases = ("b_gate", "b_mag", "r_mag") if architecture == "gated" else ("b_enc",)
    got |= take(tensors, file, **dict.fromkeys(biases, (n_latents,)))
    centered = bool(config.get("apply_b_dec_to_input", True))
    rescaled = architecture in ("topk", "batchtopk", "matryoshka_batchtopk") and bool(
        config.get("rescale_acts_by_decoder_norm", False)
    )
    k, threshold = None, None
    if "topk" in architecture:
        k = read_k(config.get("k"), n_latents, path / CONFIG)
    if architecture == "jumprelu":
        if "log_threshold" in tensors:
            threshold = take(tensors, file, log_threshold=(n_latents,))["log_threshold"].exp()
        else:
            threshold = take(tensors, file, threshold=(n_latents,))["threshold"]
    if "batchtopk" in architecture:
        threshold = take(tensors, file, topk_threshold=())["topk_threshold"]

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x - got["b_dec"] if centered else x
        norm = got["W_dec"].norm(dim=1) if rescaled else torch.ones(n_latents)
        if architecture == "gated":
            open_ = x @ got["W_enc"] + got["b_gate"] > 0
            codes = open_ * (x @ (got["W_enc"] * got["r_mag"].exp()) + got["b_mag"]).relu()
        else:
            z = (x @ got["W_enc"] + got["b_enc"]) * norm
            codes = keep_largest(z, k).relu() if k and architecture == "topk" else z.relu()
            if threshold is not None:
                codes = codes * (z > threshold)
        return codes, (codes / norm) @ got["W_dec"] + got["b_dec"]

    return Foreign("saelens", _sae(architecture, got, k, threshold, centered=centered, rescaled=rescaled), forward)


def _sae(
    architecture: str, got: dict[str, Tensor], k: int | None, threshold: Tensor | None, *, centered: bool,
    rescaled: bool,
) -> SAE:  # fmt: skip
    encoder, decoder = got["W_enc"].T, got["W_dec"]
    if architecture == "gated":
        parts = {"b_enc": got["b_gate"], "log_scale": got["r_mag"], "b_mag": got["b_mag"]}
        return build_sae("gated", encoder, decoder, got["b_dec"], parts, centered=centered)
    b_enc = got["b_enc"]
    if rescaled:  # (z r) selects, and z r (W_dec / r) decodes
        norm = decoder.norm(dim=1)
        if not norm.all():
            raise SettingsError(
                "The checkpoint scales by the norms of its decoder rows, and one of them is 0. Give another checkpoint."
            )
        encoder, b_enc, decoder = encoder * norm[:, None], b_enc * norm, decoder / norm[:, None]
    variant = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}.get(architecture, "batchtopk")
    parts = {"b_enc": b_enc}
    if threshold is not None:  # a threshold below 0 has the effect of ReLU
        parts["threshold"] = threshold.clamp_min(0)
    return build_sae(variant, encoder, decoder, got["b_dec"], parts, centered=centered, k=k)


def write(sae: SAE, hook_point: HookPoint) -> dict[str, bytes]:
    """File name -> bytes."""
    folded, variant = fold(sae), sae.config.variant
    tensors = {"W_enc": folded["encoder"].T, "W_dec": folded["decoder"], "b_dec": folded["b_dec"]}
    more: dict[str, object] = {}
    if variant == "gated":
        tensors |= {"b_gate": folded["b_enc"], "b_mag": folded["b_mag"], "r_mag": folded["log_scale"]}
    else:
        tensors["b_enc"] = folded["b_enc"]
    if variant == "topk":
        more = {"k": sae.config.k, "rescale_acts_by_decoder_norm": False}
    if variant in ("jumprelu", "batchtopk"):
        tensors["threshold"] = folded["threshold"].expand(sae.config.n_latents)
    architecture = {"relu": "standard", "batchtopk": "jumprelu"}.get(variant, variant)
    config = {
        "architecture": architecture, "d_in": sae.d_model, "d_sae": sae.config.n_latents, "dtype": "float32",
        "device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": VERSION, "hook_name": str(hook_point), "hook_head_index": None}, **more,
    }  # fmt: skip
    weights = save({name: value.float().contiguous() for name, value in tensors.items()})
    return {CONFIG: json.dumps(config, indent=2).encode(), WEIGHTS: weights}
