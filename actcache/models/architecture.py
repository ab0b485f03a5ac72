"""The description of a CLIP (open_clip's model config): its bounds are checked before anything of it is built.

A config may come from a file that says anything. A width of 10**9 would fill the memory, a patch size of 0 divides by
zero, and open_clip tells neither in a sentence.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import timm

from actcache.errors import ModelError
from actcache.models.refusals import check_family

VISION = {
    "layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224,
    "attn_pooler_queries": 256, "attn_pooler_heads": 8,
}  # fmt: skip
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0}
"""open_clip's defaults of the numbers that decide sizes."""
LIMITS = {
    "layers": 1000, "width": 65536, "head_width": 65536, "heads": 4096, "mlp_ratio": 64, "patch_size": 8192,
    "image_size": 8192, "context_length": 65536, "vocab_size": 10**7, "embed_dim": 65536, "attn_pooler_queries": 65536,
    "attn_pooler_heads": 4096,
}  # fmt: skip
"""Largest values; the least is 1, or above 0 for mlp_ratio. The largest CLIPs have 64 layers and a width of 5,120."""
OUR_ARGUMENTS = "timm_model_args"
"""A key of `vision_cfg` that open_clip does not have: arguments of the timm trunk, where they are other ones than the
name in `timm_model_name` stands for."""
_NOT_TAKEN = (
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "checkpoint_path", "cache_dir",
    "features_only", "pruned", "scriptable", "exportable", "no_jit", "device", "dtype", "in_chans", "use_naflex",
)  # fmt: skip
"""Arguments of timm that say where weights are, or make something else than the model of a name."""


def check_architecture(config: object, name: str) -> Mapping[str, Any]:
    """Return the config if it describes a CLIP of a size that fits this machine's memory. Raises ModelError."""
    parts = ("embed_dim", "vision_cfg", "text_cfg")
    if not isinstance(config, dict) or not {*parts} <= set(config):
        raise ModelError(f"--model {name} is not an open_clip config: it needs {', '.join(parts)}.")
    for tower in parts[1:]:
        if not isinstance(config[tower], dict):
            raise ModelError(f"--model {name}: {tower} must be an object, got {_show(config[tower])}.")
    vision, text = VISION | config["vision_cfg"], TEXT | config["text_cfg"]
    if isinstance(vision["layers"], list | tuple):
        check_family(name, "modified_resnet")
    _check_numbers(name, "", {"embed_dim": config["embed_dim"]})
    _check_numbers(name, "vision_cfg.", {key: vision[key] for key in VISION})
    if "hf_model_name" not in text:
        _check_numbers(name, "text_cfg.", {key: text[key] for key in TEXT})
        _check_heads(name, "text_cfg", text["width"], text["width"] / text["heads"])
    if "timm_model_name" in vision:
        _check_trunk(name, vision)
    else:
        _check_heads(name, "vision_cfg", vision["width"], vision["head_width"])
    if any(patch > size for patch, size in zip(_pair(vision["patch_size"]), _pair(vision["image_size"]), strict=True)):
        raise ModelError(
            f"--model {name}: patch_size {vision['patch_size']} is above image_size {vision['image_size']}."
        )
    for key in ("quick_gelu", "custom_text", "nonscalar_logit_scale"):
        if not isinstance(config.get(key, False), bool):
            raise ModelError(f"--model {name}: {key} must be true or false, got {_show(config[key])}.")
    check_memory(name, 4 * _count_parameters(config["embed_dim"], vision, text))
    return config


def check_memory(name: str, needed: int) -> None:
    """Raise ModelError if weights of so many bytes do not fit this machine's memory."""
    memory = _memory_bytes()
    if needed > memory:
        raise ModelError(
            f"--model {name} describes a model of {needed / 1e9:,.0f} GB, but this machine has {memory / 1e9:,.0f} GB "
            "of memory. Check layers, width and vocab_size, or choose a smaller model."
        )


def has_trunk(config: Mapping[str, Any]) -> bool:
    """Whether the image tower is a model of timm."""
    return "timm_model_name" in config["vision_cfg"]


def image_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width in pixels that the image tower takes."""
    return _pair(config["vision_cfg"].get("image_size", VISION["image_size"]))


def grid(config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of patches."""
    patch = _pair(config["vision_cfg"].get("patch_size", VISION["patch_size"]))
    height, width = image_size(config)
    return height // patch[0], width // patch[1]


def context_length(config: Mapping[str, Any]) -> int:
    """Number of tokens that the text tower takes."""
    return int(config["text_cfg"].get("context_length", TEXT["context_length"]))


def has_quick_gelu(config: Mapping[str, Any]) -> bool:
    return bool(config.get("quick_gelu", False))


def _check_numbers(name: str, where: str, values: Mapping[str, object]) -> None:
    for key, value in values.items():
        paired = key in ("patch_size", "image_size") and isinstance(value, list | tuple) and len(value) == 2
        for number in value if paired and isinstance(value, list | tuple) else [value]:
            kinds = (int, float) if key == "mlp_ratio" else (int,)
            is_number = isinstance(number, kinds) and not isinstance(number, bool)
            if not is_number or not 0 < number <= LIMITS[key]:  # type: ignore[operator]  # NaN fails the comparison
                raise ModelError(
                    f"--model {name}: {where}{key} must be a number in 1..{LIMITS[key]:,}, got {_show(value)}. "
                    "Check the config."
                )


def _check_trunk(name: str, vision: Mapping[str, Any]) -> None:
    trunk = vision["timm_model_name"]
    if not isinstance(trunk, str) or not timm.is_model(trunk):
        raise ModelError(
            f"--model {name}: timm {timm.__version__} has no model {_show(trunk)}. Correct timm_model_name, or install "
            "another version of timm."
        )
    check_family(name, find_family(trunk))
    check_arguments(name, vision.get(OUR_ARGUMENTS, {}))
    if vision.get("timm_model_pretrained"):
        raise ModelError(
            f"--model {name}: timm_model_pretrained must be false, because weights come from --pretrained. Set it so."
        )


def find_family(architecture: str) -> str:
    """The module of timm that has a name, by which towers are taken or refused."""
    return str(timm.models.model_entrypoint(architecture).__module__).rpartition(".")[2]


def check_arguments(name: str, arguments: object) -> None:
    """Raise ModelError for arguments of a timm model that are out of bounds, or would make something else of it."""
    if not isinstance(arguments, Mapping):
        raise ModelError(f"--model {name}: the arguments of a timm model must be an object, got {_show(arguments)}.")
    for key, value in arguments.items():
        if key in _NOT_TAKEN and not (key == "in_chans" and value == 3):
            raise ModelError(f"--model {name}: the argument {_show(key)} of a timm model is not taken. Leave it out.")
        for number in value if isinstance(value, list | tuple) else [value]:
            limit = LIMITS["layers"] if key == "depth" else LIMITS["width"]
            if isinstance(number, int | float) and not -limit <= number <= limit:  # NaN fails the comparison
                raise ModelError(f"--model {name}: {_show(key)} must be at most {limit:,}, got {_show(number)}.")


def _check_heads(name: str, tower: str, width: int, head_width: float) -> None:
    """A head has to be a whole part of the width: open_clip rounds their number, and attention then refuses it."""
    heads = int(width // head_width)
    if heads < 1 or width % heads:
        raise ModelError(f"--model {name}: {tower}.width {width} cannot be divided into heads of {head_width:g}.")


def _count_parameters(embed_dim: int, vision: Mapping[str, Any], text: Mapping[str, Any]) -> int:
    def blocks(part: Mapping[str, Any]) -> float:
        return float(part["layers"] * part["width"] ** 2 * (4 + 2 * part["mlp_ratio"]))

    (height, width), (rows, columns) = _pair(vision["image_size"]), _pair(vision["patch_size"])
    tokens, count = (height // rows) * (width // columns), 0.0
    if "timm_model_name" not in vision:  # which says nothing about its size; it is counted when it is built
        count += blocks(vision) + vision["width"] * (3 * rows * columns + tokens + embed_dim)
    if "hf_model_name" not in text:
        count += blocks(text) + text["width"] * (text["vocab_size"] + text["context_length"] + embed_dim)
        count += text["context_length"] ** 2  # its causal mask
    return math.ceil(float(count))


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # the platform does not tell
        return 1 << 40


def _pair(value: Any) -> tuple[int, int]:
    first, second = value if isinstance(value, list | tuple) else (value, value)
    return int(first), int(second)


def _show(value: object) -> str:
    """A value of a config in a message: short, and without the digits of numbers that Python will not print."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    text = ascii(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
