"""ViT-Prisma: weights.pt, a plain state dict, with config.json beside it; or one .pt of {"cfg": a pickled config,
"state_dict"}. W_enc [D, F], W_dec [F, D], b_dec [D]; standard: b_enc; gated: b_gate, r_mag, b_mag.

The activation is ReLU; a standard SAE may also keep the k largest and then apply ReLU. By default ViT-Prisma normalizes
each token by its own mean and deviation, which no SAE here can do.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actcache import HookPoint, SettingsError
from saetrain.interop.files import load_tensors, read_config, read_k, take
from saetrain.interop.foreign import Foreign, build_sae, fold, keep_largest, refuse
from saetrain.model import SAE

CONFIG, WEIGHTS = "config.json", "weights.pt"


def read(path: Path) -> Foreign:
    """Read the weights, given the file or its folder. Raises CorruptError, SettingsError."""
    file = path / WEIGHTS if path.is_dir() else path
    tensors = load_tensors(file)
    nested = tensors.get("state_dict")
    return read_parts(nested if isinstance(nested, dict) else tensors, read_config(file.parent / CONFIG), file)


def read_parts(tensors: Mapping[str, Any], config: Mapping[str, Any], file: Path) -> Foreign:
    """Read a state dict and its settings. Raises CorruptError, and SettingsError for what is not supported."""
    architecture, activation = config.get("architecture", "standard"), config.get("activation_fn_str", "relu")
    if (architecture, activation) not in (("standard", "relu"), ("standard", "topk"), ("gated", "relu")):
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
    got = take(tensors, file, W_enc=(None, None))
    d_model, n_latents = got["W_enc"].shape
    names = ("b_gate", "r_mag", "b_mag") if architecture == "gated" else ("b_enc",)
    got |= take(tensors, file, W_dec=(n_latents, d_model), b_dec=(d_model,), **dict.fromkeys(names, (n_latents,)))
    k = None
    if activation == "topk":
        arguments = config.get("activation_fn_kwargs")
        k = read_k(arguments.get("k") if isinstance(arguments, dict) else None, n_latents, file)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        product = (x - got["b_dec"]) @ got["W_enc"]
        if architecture == "gated":
            codes = (product + got["b_gate"] > 0) * (product * got["r_mag"].exp() + got["b_mag"]).relu()
        else:
            z = product + got["b_enc"]
            codes = keep_largest(z, k).relu() if k else z.relu()
        return codes, codes @ got["W_dec"] + got["b_dec"]

    if architecture == "gated":
        variant, parts = "gated", {"b_enc": got["b_gate"], "log_scale": got["r_mag"], "b_mag": got["b_mag"]}
    else:
        variant, parts = "topk" if k else "relu", {"b_enc": got["b_enc"]}
    sae = build_sae(variant, got["W_enc"].T, got["W_dec"], got["b_dec"], parts, k=k)
    return Foreign("prisma", sae, forward)


def write(sae: SAE, hook_point: HookPoint) -> dict[str, bytes]:
    """File name -> bytes. The loader of ViT-Prisma accepts a plain config.json beside plain weights."""
    refuse(sae, "prisma", ("relu", "topk", "gated"))
    folded, variant = fold(sae), sae.config.variant
    tensors = {"W_enc": folded["encoder"].T, "W_dec": folded["decoder"], "b_dec": folded["b_dec"]}
    if variant == "gated":  # ViT-Prisma's gated SAE has a b_enc too, but does not use it
        tensors |= {"b_gate": folded["b_enc"], "r_mag": folded["log_scale"], "b_mag": folded["b_mag"]}
    tensors["b_enc"] = torch.zeros_like(folded["b_enc"]) if variant == "gated" else folded["b_enc"]
    factor, rest = divmod(sae.config.n_latents, sae.d_model)
    config = {
        "architecture": "gated" if variant == "gated" else "standard",
        "d_in": sae.d_model, "d_sae": sae.config.n_latents,
        "expansion_factor": [sae.config.n_latents / sae.d_model] if rest else factor,  # a single number gives d_sae
        "activation_fn_str": "topk" if variant == "topk" else "relu",
        "activation_fn_kwargs": {"k": sae.config.k} if variant == "topk" else {},
        "normalize_activations": "none", "hook_point_layer": hook_point.layer,
        "layer_subtype": f"hook_{hook_point.site}", "l1_coefficient": sae.config.l1, "use_ghost_grads": False,
        "log_to_wandb": False, "dtype": {"__type__": "torch.dtype", "value": "torch.float32"},
        "device": {"__type__": "torch.device", "value": "cpu"},
    }  # fmt: skip
    buffer = io.BytesIO()
    torch.save({name: value.contiguous() for name, value in tensors.items()}, buffer)
    return {CONFIG: json.dumps(config, indent=2).encode(), WEIGHTS: buffer.getvalue()}
