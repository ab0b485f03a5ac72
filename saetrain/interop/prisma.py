"""ViT-Prisma: weights.pt, a plain state dict, with config.json beside it; or one .pt of {"cfg": a pickled config,
"state_dict"}. W_enc [D, F], W_dec [F, D], b_dec [D]; standard: b_enc; gated: b_gate, r_mag, b_mag.

The activation is ReLU; a standard SAE may also keep the k largest and then apply ReLU. By default ViT-Prisma normalizes
each token by its own mean and deviation, which no SAE here can do.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actcache import HookPoint, SettingsError
from saetrain.interop.files import load_tensors, read_config, read_k, torch_bytes
from saetrain.interop.foreign import (
    GATED,
    PLAIN,
    Foreign,
    Names,
    build_sae,
    fold,
    give_weights,
    keep_largest,
    refuse,
    take_weights,
)
from saetrain.model import SAE

CONFIG, WEIGHTS = "config.json", "weights.pt"
KINDS: dict[str, tuple[str, str, Names]] = {
    "relu": ("standard", "relu", PLAIN), "topk": ("standard", "topk", PLAIN), "gated": ("gated", "relu", GATED),
}  # fmt: skip
"""Variant -> architecture, activation, and the names of its tensors."""


def read(path: Path) -> Foreign:
    """Read the weights, given the file or its folder. Raises CorruptError, SettingsError."""
    file = path / WEIGHTS if path.is_dir() else path
    tensors = load_tensors(file)
    nested = tensors.get("state_dict")
    return read_parts(nested if isinstance(nested, dict) else tensors, read_config(file.parent / CONFIG), file)


def read_parts(tensors: Mapping[str, Any], config: Mapping[str, Any], file: Path) -> Foreign:
    """Read a state dict and its settings. Raises CorruptError, and SettingsError for what is not supported."""
    architecture, activation = config.get("architecture", "standard"), config.get("activation_fn_str", "relu")
    variant = next((name for name, kind in KINDS.items() if kind[:2] == (architecture, activation)), None)
    if variant is None:
        raise SettingsError(
            f"{file} is a {architecture} SAE with {activation}, which is not supported. Give a standard SAE with "
            "relu or topk, or a gated one with relu."
        )
    if config.get("is_transcoder"):
        raise SettingsError(f"{file} is a transcoder, which maps one hook point to another. Give an SAE.")
    normalization = config.get("normalize_activations", "layer_norm")
    if normalization not in ("none", None):
        raise SettingsError(
            f"{file} normalizes each token ({normalization}), which is not supported. Give an SAE without it."
        )
    weights, k = take_weights(tensors, file, KINDS[variant][2]), None
    if activation == "topk":
        arguments = config.get("activation_fn_kwargs")
        k = read_k(arguments.get("k") if isinstance(arguments, dict) else None, len(weights["encoder"]), file)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        product = (x - weights["b_dec"]) @ weights["encoder"].T
        if architecture == "gated":
            scale = weights["log_scale"].exp()
            codes = (product + weights["b_enc"] > 0) * (product * scale + weights["b_mag"]).relu()
        else:
            z = product + weights["b_enc"]
            codes = keep_largest(z, k).relu() if k else z.relu()
        return codes, codes @ weights["decoder"] + weights["b_dec"]

    return Foreign("prisma", build_sae(variant, weights, k=k), forward)


def write(sae: SAE, hook_point: HookPoint) -> dict[str, bytes]:
    """File name -> bytes. The loader of ViT-Prisma accepts a plain config.json beside plain weights."""
    refuse(sae, "prisma", tuple(KINDS))
    architecture, activation, names = KINDS[sae.config.variant]
    tensors = give_weights(fold(sae), names)
    tensors.setdefault("b_enc", torch.zeros(sae.config.n_latents))  # its gated SAE has one too, but does not use it
    factor, rest = divmod(sae.config.n_latents, sae.d_model)
    config = {
        "architecture": architecture, "d_in": sae.d_model, "d_sae": sae.config.n_latents,
        "expansion_factor": [sae.config.n_latents / sae.d_model] if rest else factor,  # a single number gives d_sae
        "activation_fn_str": activation,
        "activation_fn_kwargs": {"k": sae.config.k} if sae.variant.exact_k else {},
        "normalize_activations": "none", "hook_point_layer": hook_point.layer,
        "layer_subtype": f"hook_{hook_point.site}", "l1_coefficient": sae.config.l1, "use_ghost_grads": False,
        "log_to_wandb": False, "dtype": {"__type__": "torch.dtype", "value": "torch.float32"},
        "device": {"__type__": "torch.device", "value": "cpu"},
    }  # fmt: skip
    return {CONFIG: json.dumps(config, indent=2).encode(), WEIGHTS: torch_bytes(tensors)}
