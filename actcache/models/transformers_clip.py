"""CLIP as Hugging Face's transformers store it: config.json, preprocessor_config.json and the names of the tensors.

Checked against transformers' CLIPModel: embeddings of both towers are equal to 1e-5 (tests/actcache/models).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from actcache.errors import ModelError

VISION = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "patch_size": 32, "image_size": 224, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_channels": 3,
}  # fmt: skip
TEXT = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
    "max_position_embeddings": 77, "vocab_size": 49408, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
"""What transformers assume where config.json leaves a field out, as it does for every default."""
ACTIVATIONS = {"quick_gelu": True, "gelu": False}
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}
"""PIL's numbers, which `resample` holds."""


def is_transformers_clip(fields: object) -> bool:
    return isinstance(fields, dict) and fields.get("model_type") == "clip"


def read_activation(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json says QuickGELU. Raises ModelError for another activation, or two of them."""
    towers = [defaults | _object(fields, key) for key, defaults in (("vision_config", VISION), ("text_config", TEXT))]
    names = {ascii(tower["hidden_act"])[1:-1][:40] for tower in towers}
    if len(names) != 1 or not names <= set(ACTIVATIONS):
        raise ModelError(
            f"config.json has hidden_act {' and '.join(sorted(names))[:80]}. Expected quick_gelu or gelu in both."
        )
    return ACTIVATIONS[names.pop()]


def open_clip_config(fields: Mapping[str, Any]) -> dict[str, object]:
    """open_clip's model config of a config.json. Raises ModelError where open_clip has no such tower."""
    vision: dict[str, Any] = VISION | _object(fields, "vision_config")
    text: dict[str, Any] = TEXT | _object(fields, "text_config")
    try:
        if vision["num_channels"] != 3:
            raise ModelError(
                f"config.json has num_channels {ascii(vision['num_channels'])[:40]}. Only color images are known."
            )
        return {
            "embed_dim": fields.get("projection_dim", 512),
            "quick_gelu": read_activation(fields),
            "vision_cfg": {
                "image_size": vision["image_size"], "patch_size": vision["patch_size"],
                "layers": vision["num_hidden_layers"], "width": vision["hidden_size"],
                "head_width": vision["hidden_size"] // vision["num_attention_heads"],
                "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"], **_norms(vision),
            },
            "text_cfg": {
                "context_length": text["max_position_embeddings"], "vocab_size": text["vocab_size"],
                "layers": text["num_hidden_layers"], "width": text["hidden_size"],
                "heads": text["num_attention_heads"],
                "mlp_ratio": text["intermediate_size"] / text["hidden_size"], **_norms(text),
            },
        }  # fmt: skip
    except (TypeError, ZeroDivisionError, OverflowError) as error:
        raise ModelError(f"config.json does not describe a CLIP: {error}. Copy the file again.") from error


def preprocess_fields(fields: Mapping[str, Any]) -> dict[str, object]:
    """open_clip's preprocessing fields of a preprocessor_config.json. Raises ModelError where it has no such step."""
    size = fields.get("size", 224)
    crop = fields.get("crop_size", size) if fields.get("do_center_crop", True) else size
    shortest = isinstance(size, int) or (isinstance(size, dict) and "shortest_edge" in size)
    edge = size.get("shortest_edge") if isinstance(size, dict) else size
    target = [crop, crop] if isinstance(crop, int) else [crop.get("height"), crop.get("width")] if crop else [None]
    scale = fields.get("rescale_factor", 1 / 255)
    plain = isinstance(scale, int | float) and abs(scale * 255 - 1) < 1e-3
    steps = all(fields.get(step, True) for step in ("do_resize", "do_normalize", "do_rescale"))
    cropped_alike = not shortest or target == [edge, edge]
    if not (cropped_alike and fields.get("resample", 3) in INTERPOLATIONS and steps and plain):
        raise ModelError(
            "preprocessor_config.json prepares images in steps that open_clip does not have. Write its mean, std, "
            "interpolation and resize_mode into preprocess_cfg of an open_clip_config.json."
        )
    return {
        "size": target,
        "mean": fields.get("image_mean", [0.48145466, 0.4578275, 0.40821073]),
        "std": fields.get("image_std", [0.26862954, 0.26130258, 0.27577711]),
        "interpolation": INTERPOLATIONS[fields.get("resample", 3)],
        "resize_mode": "shortest" if shortest else "squash",
    }


# ---------------------------------------------------------------------------------------------------------------------
# Weights

TOP = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",  # spelled so
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "logit_scale": "logit_scale",
}
PROJECTIONS = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
"""Stored [E, W] there and [W, E] in open_clip."""
TOWERS = {
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "text_model.encoder.layers.": "transformer.resblocks.",
}
BLOCK = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip
DERIVED = ("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids")
"""The numbers 0, 1, 2 ..., which older versions stored."""


def has_transformers_names(tensors: Mapping[str, object]) -> bool:
    return "vision_model.embeddings.class_embedding" in tensors


def rename(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under open_clip's names. One without a counterpart keeps its name, so that loading names it."""
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name in DERIVED:
            continue
        if name in PROJECTIONS and value.ndim == 2:
            renamed[PROJECTIONS[name]] = value.T
        else:
            renamed[TOP.get(name) or _rename_block(name)] = value
    for name in [name for name in renamed if name.endswith((".attn.q_proj.weight", ".attn.q_proj.bias"))]:
        stem, kind = name.removesuffix(".q_proj.weight").removesuffix(".q_proj.bias"), name.rsplit(".", 1)[1]
        parts = [f"{stem}.{letter}_proj.{kind}" for letter in "qkv"]
        if all(part in renamed for part in parts) and len({renamed[part].shape for part in parts}) == 1:
            renamed[f"{stem}.in_proj_{kind}"] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


def _rename_block(name: str) -> str:
    for theirs, ours in TOWERS.items():
        if name.startswith(theirs):
            number, _, rest = name.removeprefix(theirs).partition(".")
            module, _, kind = rest.rpartition(".")
            module = BLOCK.get(module, module.replace("self_attn.", "attn."))
            return f"{ours}{number}.{module}.{kind}"
    return name


def _object(fields: Mapping[str, Any], name: str) -> dict[str, object]:
    value = fields.get(name) or {}
    if not isinstance(value, dict):
        raise ModelError(f"config.json: {name} must be an object. Copy the file again.")
    return value


def _norms(tower: Mapping[str, Any]) -> dict[str, object]:
    eps = tower["layer_norm_eps"]
    return {} if eps == 1e-5 else {"norm_kwargs": {"eps": eps}}
