"""Vision transformers as transformers describe them: DINOv2 (with registers or not), DINOv3, ViT, SigLIP.

In: config.json and preprocessor_config.json. Out: the name and the arguments of the timm model that computes the same,
or open_clip's config of a SigLIP with its texts, and the fields of the preprocessing.

Checked against transformers' own models: residual streams and pooled outputs agree (tests/actcache/models).
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from timm.layers import SwiGLUPacked
from torch import nn

from actcache.errors import ModelError
from actcache.models.architecture import OUR_ARGUMENTS
from actcache.models.transformers_clip import INTERPOLATIONS
from actcache.preprocess import MAX_SIDE

ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu",
               "silu": "silu"}  # fmt: skip
DINOV2 = {384: ("small", 12, 6), 768: ("base", 12, 12), 1024: ("large", 24, 16), 1536: ("giant", 40, 24)}
DINOV3 = {384: ("small", 12, 6), 768: ("base", 12, 12), 1024: ("large", 24, 16)}
"""Width -> (size in timm's names, number of blocks, number of heads)."""
COMMON: dict[str, object] = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "gelu", "image_size": 224,
    "num_channels": 3, "qkv_bias": True,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, object]] = {
    "dinov2": COMMON | {"patch_size": 14, "mlp_ratio": 4, "layer_norm_eps": 1e-6, "use_swiglu_ffn": False},
    "dinov2_with_registers": COMMON
    | {"patch_size": 16, "mlp_ratio": 4, "layer_norm_eps": 1e-6, "use_swiglu_ffn": False, "num_register_tokens": 4},
    "dinov3_vit": COMMON
    | {"hidden_size": 384, "num_attention_heads": 6, "patch_size": 16, "intermediate_size": 1536, "rope_theta": 100.0,
       "layer_norm_eps": 1e-5, "num_register_tokens": 0, "use_gated_mlp": False, "query_bias": True, "key_bias": False,
       "value_bias": True, "proj_bias": True, "mlp_bias": True},
    "vit": COMMON | {"patch_size": 16, "intermediate_size": 3072, "layer_norm_eps": 1e-12},
    "siglip_vision_model": COMMON
    | {"patch_size": 16, "intermediate_size": 3072, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
       "vision_use_head": True},
}  # fmt: skip
"""What transformers assume where config.json leaves a field out, as it does for every default."""
SIGLIP_TEXT: dict[str, object] = {
    "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 64, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}  # fmt: skip
LARGEST = 1 << 20


class _Described(NamedTuple):
    """The timm name that is nearest to a config.json, what that name has of its own, and what the config.json wants."""

    name: str
    own: dict[str, object]
    wanted: dict[str, object]


def read_kind(fields: Mapping[str, Any]) -> str | None:
    """The `model_type` of a config.json that this module knows."""
    kind = fields.get("model_type")
    return kind if isinstance(kind, str) and (kind in DEFAULTS or kind == "siglip") else None


def timm_model(fields: Mapping[str, Any]) -> tuple[str, dict[str, object]]:
    """(timm's name, arguments that differ from the name's own). Raises ModelError where timm has no such tower."""
    kind = str(fields["model_type"])
    values: dict[str, object] = DEFAULTS[kind] | {k: v for k, v in fields.items() if v is not None}
    try:
        _check_values(values)
        name, own, wanted = _MAPPINGS[kind](values)
    except (TypeError, ZeroDivisionError, OverflowError, KeyError, AttributeError) as error:
        raise ModelError(f"config.json does not describe a {kind}: {error}. Copy the file again.") from error
    return name, {key: value for key, value in wanted.items() if key not in own or own[key] != value}


def _check_values(values: Mapping[str, Any]) -> None:
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_register_tokens"):
        value = values.get(name, 1)
        least = 0 if name == "num_register_tokens" else 1
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
            raise ModelError(f"config.json has {name} {ascii(value)[:40]}. Expected a number of at least {least}.")
    if values["hidden_size"] % values["num_attention_heads"] or values["num_channels"] != 3:
        raise ModelError(
            "config.json needs a hidden_size that num_attention_heads divides, and 3 color channels. Copy it again."
        )
    for name in ("image_size", "patch_size"):
        value = values[name]
        sides = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
        if not all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides):
            raise ModelError(f"config.json has {name} {ascii(value)[:40]}. Expected pixels up to {MAX_SIDE:,}.")
    if values["hidden_act"] not in ACTIVATIONS:
        raise ModelError(
            f"config.json has hidden_act {ascii(values['hidden_act'])[:40]}. Expected {', '.join(ACTIVATIONS)}."
        )


def _shape(values: Mapping[str, Any]) -> dict[str, object]:
    return {
        "embed_dim": values["hidden_size"], "depth": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"], "patch_size": _whole(values["patch_size"]),
        "act_layer": ACTIVATIONS[values["hidden_act"]],
    }  # fmt: skip


def _whole(value: Any) -> Any:
    return tuple(int(side) for side in value) if isinstance(value, list | tuple) else int(value)


def _norm(values: Mapping[str, Any], own: float) -> dict[str, object]:
    eps = float(values["layer_norm_eps"])
    return {} if eps == own else {"norm_layer": partial(nn.LayerNorm, eps=eps)}


def _map_dinov2(values: Mapping[str, Any]) -> _Described:
    registers, width = values.get("num_register_tokens", 0), values["hidden_size"]
    size, depth, heads = DINOV2.get(width, DINOV2[768])
    gated = bool(values["use_swiglu_ffn"])
    if gated != (size == "giant"):
        size, depth, heads = DINOV2[768] if gated else DINOV2[1024]
    widths = {name: width for width, (name, _, _) in DINOV2.items()}
    own = {
        "embed_dim": widths[size], "depth": depth, "num_heads": heads, "patch_size": 14, "act_layer": "gelu",
        "mlp_ratio": 4, "qkv_bias": True, "reg_tokens": 4 if registers else 0,
    }  # fmt: skip
    wanted = _shape(values) | {"mlp_ratio": values["mlp_ratio"], "qkv_bias": bool(values["qkv_bias"])}
    wanted |= {"reg_tokens": registers} | _norm(values, 1e-6)
    if size == "giant":  # the name's own: SwiGLU with 4/6 of 4 times the width, rounded up to a multiple of 8
        own |= {"act_layer": "silu", "mlp_ratio": _gated_ratio(1536, 4)}
    if gated:
        ratio = _gated_ratio(width, values["mlp_ratio"])
        wanted |= {"act_layer": "silu", "mlp_ratio": ratio}
        if size != "giant":
            wanted |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    return _Described(f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2", own, wanted)


def _gated_ratio(width: int, ratio: float) -> float:
    """mlp_ratio of a packed SwiGLU, whose first matrix makes gates and values."""
    hidden = (int(int(width * ratio) * 2 / 3) + 7) // 8 * 8
    return 2 * hidden / width


def _map_dinov3(values: Mapping[str, Any]) -> _Described:
    if values["key_bias"] or values["query_bias"] != values["value_bias"] or not values["proj_bias"]:
        raise ModelError(
            "config.json has biases other than DINOv3's: expected query_bias equal to value_bias, no key_bias, and "
            "proj_bias. Give the published model."
        )
    if not values["mlp_bias"]:
        raise ModelError("config.json has mlp_bias false, which timm's DINOv3 does not have. Give the published model.")
    width, bias = values["hidden_size"], bool(values["query_bias"])
    size, depth, heads = DINOV3.get(width, DINOV3[768])
    widths = {name: width for width, (name, _, _) in DINOV3.items()}
    own = {
        "embed_dim": widths[size], "depth": depth, "num_heads": heads, "patch_size": 16, "act_layer": "gelu",
        "mlp_ratio": 4, "rope_temperature": 100, "num_reg_tokens": 4, "swiglu_mlp": False,
    }  # fmt: skip
    wanted = _shape(values) | {
        "mlp_ratio": values["intermediate_size"] / width, "rope_temperature": values["rope_theta"],
        "num_reg_tokens": values["num_register_tokens"], "swiglu_mlp": bool(values["use_gated_mlp"]),
        "global_pool": "token", **_norm(values, 1e-5),  # transformers pool CLS, as upstream does; timm pools patches
    }  # fmt: skip
    if wanted["swiglu_mlp"]:
        if wanted.pop("act_layer") != "silu":
            raise ModelError(
                "config.json has gates and a hidden_act other than silu, which timm's DINOv3 does not have."
            )
        wanted |= {"swiglu_align_to": 8}
    return _Described(f"vit_{size}_patch16_dinov3{'_qkvb' if bias else ''}", own, wanted)


def _map_vit(values: Mapping[str, Any]) -> _Described:
    own = {
        "embed_dim": 768, "depth": 12, "num_heads": 12, "patch_size": 16, "act_layer": "gelu", "mlp_ratio": 4,
        "qkv_bias": True,
    }  # fmt: skip
    wanted = _shape(values) | {
        "mlp_ratio": values["intermediate_size"] / values["hidden_size"], "qkv_bias": bool(values["qkv_bias"]),
        **_norm(values, 1e-6),
    }  # fmt: skip
    return _Described("vit_base_patch16_224", own, wanted)


def _map_siglip(values: Mapping[str, Any]) -> _Described:
    if not values["vision_use_head"]:
        raise ModelError(
            "config.json has vision_use_head false: this tower has no pooling of its own. Give a model with its head."
        )
    return _map_vit({**values, "qkv_bias": True})._replace(name="vit_base_patch16_siglip_224")


_MAPPINGS: dict[str, Callable[[Mapping[str, Any]], _Described]] = {
    "dinov2": _map_dinov2, "dinov2_with_registers": _map_dinov2, "dinov3_vit": _map_dinov3, "vit": _map_vit,
    "siglip_vision_model": _map_siglip,
}  # fmt: skip


def siglip_config(fields: Mapping[str, Any]) -> dict[str, object]:
    """open_clip's config of a SigLIP with its texts. Raises ModelError where open_clip has no such towers."""
    vision, text = fields.get("vision_config") or {}, fields.get("text_config") or {}
    if not isinstance(vision, Mapping) or not isinstance(text, Mapping):
        raise ModelError("config.json: vision_config and text_config must be objects. Copy the file again.")
    values = DEFAULTS["siglip_vision_model"] | dict(vision) | {"model_type": "siglip_vision_model"}
    trunk, arguments = timm_model(values)
    if "norm_layer" in arguments:
        raise ModelError("config.json has a layer_norm_eps other than 1e-6, which open_clip's SigLIP cannot have.")
    words = SIGLIP_TEXT | {k: v for k, v in text.items() if v is not None}
    if words["hidden_act"] not in ("gelu_pytorch_tanh", "gelu") or words["layer_norm_eps"] != 1e-6:
        raise ModelError(
            "config.json: text_config needs hidden_act gelu_pytorch_tanh or gelu, and layer_norm_eps 1e-6."
        )
    tanh = {"act_kwargs": {"approximate": "tanh"}} if words["hidden_act"] == "gelu_pytorch_tanh" else {}
    width, size = values["hidden_size"], values["image_size"]
    if words.get("projection_size", words["hidden_size"]) != width:
        raise ModelError(
            "config.json: projection_size differs from the image tower's hidden_size. Copy the file again."
        )
    try:
        return {
            "embed_dim": width, "init_logit_bias": -10, "custom_text": True,
            "vision_cfg": {
                "image_size": size, "timm_model_name": trunk, "timm_model_pretrained": False, "timm_pool": "map",
                "timm_proj": "none", OUR_ARGUMENTS: arguments | {"img_size": size},
            },
            "text_cfg": {
                "context_length": words["max_position_embeddings"], "vocab_size": words["vocab_size"],
                "hf_tokenizer_name": "siglip", "tokenizer_kwargs": {"clean": "canonicalize"},
                "width": words["hidden_size"], "heads": words["num_attention_heads"],
                "layers": words["num_hidden_layers"], "mlp_ratio": words["intermediate_size"] / words["hidden_size"],
                "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}, **tanh,
            },
        }  # fmt: skip
    except (TypeError, ZeroDivisionError) as error:
        raise ModelError(f"config.json does not describe a SigLIP: {error}. Copy the file again.") from error


# ---------------------------------------------------------------------------------------------------------------------
# Preprocessing


def preprocess_fields(fields: Mapping[str, Any]) -> dict[str, object]:
    """The fields, in timm's spelling, of a preprocessor_config.json. Raises ModelError where timm has no such steps."""
    size = fields.get("size", 224)
    size = {"shortest_edge": size} if isinstance(size, int) and "crop_size" in fields else size
    cropped = fields.get("do_center_crop", "crop_size" in fields)
    target = _sides(fields.get("crop_size") if cropped and fields.get("crop_size") is not None else size)
    edge = size.get("shortest_edge") if isinstance(size, Mapping) else None
    scale, resample = fields.get("rescale_factor", 1 / 255), fields.get("resample", 3)
    plain = isinstance(scale, int | float) and abs(scale * 255 - 1) < 1e-3
    steps = all(fields.get(step, True) for step in ("do_resize", "do_normalize", "do_rescale"))
    squashed = edge is None and target == _sides(size)
    shrunk = isinstance(edge, int) and target is not None and target[0] == target[1] and 0 < target[0] <= edge
    if target is None or not (squashed or shrunk) or not (plain and steps and resample in INTERPOLATIONS):
        raise ModelError(
            "preprocessor_config.json prepares images in steps that timm does not have. Give the preprocessing with "
            "--preprocess."
        )
    return {
        "library": "timm", "size": list(target),
        "mean": fields.get("image_mean", [0.485, 0.456, 0.406]), "std": fields.get("image_std", [0.229, 0.224, 0.225]),
        "interpolation": INTERPOLATIONS[resample], "crop_mode": "squash" if squashed else "center",
        "crop_pct": 1.0 if squashed else crop_share(target[0], int(edge or target[0])),
    }  # fmt: skip


def crop_share(crop: int, edge: int) -> float:
    """crop_pct with which timm resizes to `edge` pixels: floor(crop / crop_pct) == edge."""
    share = crop / edge
    return share if math.floor(crop / share) == edge else crop / (edge + 0.5)


def _sides(value: Any) -> tuple[int, int] | None:
    """(height, width) of a size as transformers write it."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if isinstance(value, Mapping):
        if isinstance(edge := value.get("shortest_edge"), int):
            return edge, edge
        height, width = value.get("height"), value.get("width")
        if isinstance(height, int) and isinstance(width, int):
            return height, width
    return None
