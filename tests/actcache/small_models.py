"""Small models of timm and their files: folders as timm writes them, and foreign layouts of the same tensors.

The foreign names are spelled here by themselves, from the published files, so that a mistake in the product's renaming
does not repeat itself.
"""

import json
import re
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]
SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@torch.no_grad()
def add_noise(module: Any, seed: int = 0) -> Any:
    """Let no value be 0 or 1e-5, so that none can be left out without a difference."""
    generator = torch.Generator().manual_seed(seed)
    for value in module.parameters():
        value.add_(0.05 * torch.randn(value.shape, generator=generator))
    return module.eval()


def make(architecture: str, n_classes: int = 0, **arguments: Any) -> Any:
    """A small timm model with noise in every weight."""
    torch.manual_seed(0)
    return add_noise(timm.create_model(architecture, num_classes=n_classes, **SMALL | arguments))


def write_folder(
    path: Path, architecture: str, module: Any, *, size: int, n_classes: int = 0, cfg: Any = None, **arguments: Any
) -> Path:
    """A folder as `timm.models.push_to_hf_hub` fills it."""
    path.mkdir(parents=True, exist_ok=True)
    cfg = {"input_size": [3, size, size], "crop_pct": 0.9, "crop_mode": "center", "interpolation": "bicubic",
           "num_classes": n_classes, "classifier": "head", **IMAGENET, **(cfg or {})}  # fmt: skip
    config = {"architecture": architecture, "num_classes": n_classes, "model_args": SMALL | arguments,
              "pretrained_cfg": cfg}  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    if module is not None:
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, path / "model.safetensors")
    return path


def pixels(size: int | tuple[int, int], n: int = 2) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(5))


# ---------------------------------------------------------------------------------------------------------------------
# Foreign layouts


def to_official_dinov2(tensors: Tensors) -> Tensors:
    """facebookresearch/dinov2: registers apart, the class's position within `pos_embed`, a mask token, w12 and w3."""
    out: Tensors = {}
    for name, value in tensors.items():
        out[name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3") if is_gated(tensors) else name] = value
    width = out["cls_token"].shape[-1]
    if "reg_token" in out:
        out["register_tokens"] = out.pop("reg_token")
        first = torch.full((1, 1, width), 0.25)
        out["pos_embed"] = torch.cat([first, out["pos_embed"]], 1)
        out["cls_token"] = out["cls_token"] - first
    out["mask_token"] = torch.zeros(1, width)
    return out


def is_gated(tensors: Tensors) -> bool:
    return len(tensors["blocks.0.mlp.fc1.bias"]) != tensors["blocks.0.mlp.fc2.weight"].shape[1]


def to_official_dinov3(tensors: Tensors, periods: Tensor) -> Tensors:
    """facebookresearch/dinov3: one bias with a mask for q, k and v, storage tokens, ls1.gamma, rope periods."""
    out: Tensors = {"mask_token": torch.zeros(1, tensors["cls_token"].shape[-1]), "rope_embed.periods": periods}
    for name, value in tensors.items():
        if name.endswith("q_bias"):
            stem, v = name.removesuffix("q_bias"), tensors[name.replace("q_bias", "v_bias")]
            out[f"{stem}qkv.bias"] = torch.cat([value, torch.zeros_like(value), v])
            mask = torch.ones(3 * len(value))
            mask[len(value) : 2 * len(value)] = 0
            out[f"{stem}qkv.bias_mask"] = mask
        elif not name.endswith("v_bias"):
            name = name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
            name = name.replace("reg_token", "storage_tokens").replace("mlp.fc1_g", "mlp.w1")
            out[
                name.replace("mlp.fc1_x", "mlp.w2").replace(
                    "mlp.fc2", "mlp.w3" if "fc1_g" in str([*tensors]) else "mlp.fc2"
                )
            ] = value
    return out


def to_huggingface(tensors: Tensors, kind: str, prefix: str = "") -> Tensors:
    """Names of transformers' files for dinov2 (with registers), dinov3_vit and vit, from official or timm names."""
    v3, out = kind == "dinov3_vit", Tensors()
    patch = "embeddings.patch_embeddings" + ("" if v3 else ".projection")
    simple = {
        "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
        "mask_token": "embeddings.mask_token", "register_tokens": "embeddings.register_tokens",
        "storage_tokens": "embeddings.register_tokens", "patch_embed.proj.weight": f"{patch}.weight",
        "patch_embed.proj.bias": f"{patch}.bias", "norm.weight": f"{'norm' if v3 else 'layernorm'}.weight",
        "norm.bias": f"{'norm' if v3 else 'layernorm'}.bias", "head.weight": "classifier.weight",
        "head.bias": "classifier.bias",
    }  # fmt: skip
    for name, value in tensors.items():
        if name in simple:
            value = value.reshape(1, 1, -1) if name == "mask_token" and v3 else value
            out[("" if name.startswith("head") else prefix) + simple[name]] = value
            continue
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if match is None or "bias_mask" in name:
            continue
        stem, rest = f"{prefix}{'' if v3 else 'encoder.'}layer.{match[1]}.", match[2]
        if rest.startswith("attn.qkv."):
            attention = (
                [f"attention.{x}_proj" for x in "qkv"]
                if v3
                else [f"attention.attention.{x}" for x in ("query", "key", "value")]
            )
            for part, module in zip(value.chunk(3), attention, strict=True):
                if not (v3 and rest.endswith("bias") and "k_proj" in module):
                    out[f"{stem}{module}.{rest.rsplit('.', 1)[1]}"] = part.contiguous()
            continue
        projection = "attention.o_proj" if v3 else "attention.output.dense"
        swaps = {"attn.proj": projection, "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1",
                 "mlp.w12": "mlp.weights_in"}  # fmt: skip
        swaps |= (
            {"mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.up_proj", "mlp.w3": "mlp.down_proj"}
            if v3
            else {"mlp.w3": "mlp.weights_out"}
        )
        if v3:
            swaps |= {"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}
        if kind == "vit":
            swaps |= {"norm1": "layernorm_before", "norm2": "layernorm_after", "mlp.fc1": "intermediate.dense",
                      "mlp.fc2": "output.dense"}  # fmt: skip
        module = next((old for old in swaps if rest == old or rest.startswith(f"{old}.")), None)
        out[stem + (rest if module is None else swaps[module] + rest.removeprefix(module))] = value
    return out


def to_huggingface_siglip(tensors: Tensors) -> Tensors:
    """Names of transformers' SigLIP from an open_clip model with a timm trunk."""
    out: Tensors = {}
    for name, value in tensors.items():
        if name in ("logit_scale", "logit_bias"):
            out[name] = value.reshape(1)
        elif match := re.fullmatch(r"(visual\.trunk\.blocks|text\.transformer\.resblocks)\.(\d+)\.(.+)", name):
            vision = match[1].startswith("visual")
            stem = f"{'vision' if vision else 'text'}_model.encoder.layers.{match[2]}."
            rest = match[3]
            if "qkv." in rest or "in_proj_" in rest:
                for part, letter in zip(value.chunk(3), "qkv", strict=True):
                    kind = "weight" if rest.endswith("weight") else "bias"
                    out[f"{stem}self_attn.{letter}_proj.{kind}"] = part.contiguous()
                continue
            for ours, theirs in (
                ("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
                ("attn.proj", "self_attn.out_proj"), ("attn.out_proj", "self_attn.out_proj"), ("c_fc", "fc1"),
                ("c_proj", "fc2"),
            ):  # fmt: skip
                rest = rest.replace(ours, theirs) if rest.startswith(ours) or ours in ("c_fc", "c_proj") else rest
            out[stem + rest] = value
        else:
            out |= _siglip_top(name, value, tensors)
    return out


def _siglip_top(name: str, value: Tensor, tensors: Tensors) -> Tensors:
    pool = "visual.trunk.attn_pool."
    if name == "visual.trunk.pos_embed":
        return {"vision_model.embeddings.position_embedding.weight": value[0]}
    if name.startswith(f"{pool}q."):
        kind = name.rsplit(".", 1)[1]
        return {f"vision_model.head.attention.in_proj_{kind}": torch.cat([value, tensors[f"{pool}kv.{kind}"]])}
    if name.startswith(f"{pool}kv."):
        return {}
    for ours, theirs in (
        ("visual.trunk.patch_embed.proj", "vision_model.embeddings.patch_embedding"),
        ("visual.trunk.norm", "vision_model.post_layernorm"), (f"{pool}latent", "vision_model.head.probe"),
        (f"{pool}proj", "vision_model.head.attention.out_proj"), (f"{pool}norm", "vision_model.head.layernorm"),
        (f"{pool}mlp", "vision_model.head.mlp"),
        ("text.positional_embedding", "text_model.embeddings.position_embedding.weight"),
        ("text.token_embedding", "text_model.embeddings.token_embedding"),
        ("text.ln_final", "text_model.final_layer_norm"), ("text.text_projection", "text_model.head"),
    ):  # fmt: skip
        if name.startswith(ours):
            return {theirs + name.removeprefix(ours): value}
    raise KeyError(name)
