"""Loading a CLIP: an open_clip architecture or config JSON, and weights from a tag, a file or `random:SEED`.

Out: `Clip`, from which vision.py and text.py take the towers. Promises: weights load strictly and without
pickle code; a QuickGELU mismatch is an error; the same architecture, weights and preprocessing give the same model_id.
"""

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from actcache.artifacts import digest
from actcache.errors import ModelError
from actcache.preprocess import Preprocess


@dataclass(frozen=True)
class Clip:
    """A CLIP in eval mode on the CPU.

    Attributes:
        module: open_clip's model.
        name: its name in messages.
        config: open_clip's model config.
        model_id: hash of architecture, base weights and preprocessing.
        preprocess: what `transform` does.
        transform: PIL image -> float32 tensor [3, H, W], open_clip's own.
    """

    module: Any
    name: str
    config: Mapping[str, Any]
    model_id: str
    preprocess: Preprocess
    transform: Callable[[Any], Tensor]


def load_clip(model: str, pretrained: str) -> Clip:
    """Build the model and load its weights.

    Args:
        model: an open_clip architecture name, or the path of an open_clip config JSON.
        pretrained: an open_clip tag, the path of a checkpoint (safetensors, or a state dict), or `random:SEED`.

    Raises:
        ModelError: the name or tag is unknown (similar ones are listed), the tower is not a VisionTransformer,
            QuickGELU does not match, or the checkpoint is truncated or has other tensors than the architecture.
    """
    name, config, fields = _read_config(model)
    source = _find_weights(name, config, pretrained)
    module = _build(config, name, source.seed)
    if source.path is not None:
        _load_weights(module, source.path, name)
    preprocess = Preprocess.from_json({**fields, **source.preprocess, "size": module.visual.image_size})
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**preprocess.to_json()), False)
    model_id = digest({"config": config, "weights": hash_weights(module), "preprocess": preprocess.to_json()})
    return Clip(module.requires_grad_(False).eval(), name, config, model_id, preprocess, transform)


# ---------------------------------------------------------------------------------------------------------------------
# Architecture


def _read_config(model: str) -> tuple[str, Mapping[str, Any], Mapping[str, Any]]:
    """(name, model config, preprocessing) for an open_clip name or config JSON."""
    preprocess = open_clip.transform.merge_preprocess_dict(open_clip.transform.PreprocessCfg(), {})
    if model.endswith(".json"):
        try:
            config = json.loads(Path(model).read_bytes())
        except (OSError, ValueError) as error:
            raise ModelError(f"--model {model} cannot be read as an open_clip config JSON: {error}.") from error
        if (
            isinstance(config, dict) and "model_cfg" in config
        ):  # the layout of open_clip_config.json on the Hugging Face hub
            preprocess = open_clip.transform.merge_preprocess_dict(preprocess, config.get("preprocess_cfg", {}))
            config = config["model_cfg"]
        if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(config):
            raise ModelError(f"--model {model} is not an open_clip config: it needs embed_dim, vision_cfg, text_cfg.")
        return Path(model).name, config, preprocess
    config = open_clip.get_model_config(model)
    if config is None:
        raise ModelError(
            f"Unknown architecture {model!r}.{say_near(model, open_clip.list_models())} "
            "Give an open_clip name or the path of a config JSON."
        )
    return model, config, preprocess


def _build(config: Mapping[str, Any], name: str, seed: int | None) -> Any:
    vision = config["vision_cfg"]
    if "timm_model_name" in vision or isinstance(vision.get("layers"), list | tuple):
        raise ModelError(f"{name}'s image tower is not open_clip's VisionTransformer. Choose a plain ViT-*.")
    fields = json.loads(json.dumps(config))
    custom = fields.pop("custom_text", False)
    if "hf_model_name" in fields["text_cfg"]:
        fields["text_cfg"]["hf_model_pretrained"] = False
        custom = True
    kind: Any = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    if "multimodal_cfg" in fields:
        kind = open_clip.CoCa
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0 if seed is None else seed)
            return kind(**fields)
    except (TypeError, AssertionError, ValueError) as error:
        raise ModelError(f"{name} does not describe an open_clip model: {error}.") from error


# ---------------------------------------------------------------------------------------------------------------------
# Weights


@dataclass(frozen=True)
class _WeightSource:
    path: str | None
    seed: int | None
    preprocess: Mapping[str, Any]


def _find_weights(name: str, config: Mapping[str, Any], pretrained: str) -> _WeightSource:
    if pretrained.startswith("random:"):
        try:
            return _WeightSource(None, int(pretrained.removeprefix("random:")), {})
        except ValueError as error:
            raise ModelError(f"--pretrained {pretrained}: expected random:SEED with an integer.") from error
    if Path(pretrained).is_file():
        return _WeightSource(pretrained, None, {})
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        tags = open_clip.list_pretrained_tags_by_model(name)
        known = f" Tags of {name}: {', '.join(tags)}." if tags else f" {name} has no tags."
        raise ModelError(
            f"--pretrained {pretrained!r} is neither a file nor a tag of {name}.{say_near(pretrained, tags)}{known} "
            "`random:SEED` gives random weights."
        )
    check_quick_gelu(name, bool(config.get("quick_gelu", False)), pretrained, bool(tag.get("quick_gelu", False)))
    try:
        path = open_clip.download_pretrained(tag)
    except Exception as error:  # network libraries raise many kinds of errors
        raise ModelError(
            f"The weights of {name} {pretrained} could not be downloaded: {str(error).rstrip('.')}."
        ) from error
    return _WeightSource(path, None, open_clip.transform.merge_preprocess_dict({}, tag))


def _load_weights(clip: Any, path: str, name: str) -> None:
    try:
        open_clip.load_checkpoint(clip, path, strict=True, weights_only=True)
    except Exception as error:  # safetensors, pickle and zip readers raise a dozen kinds of errors
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{Path(path).name} cannot be loaded into {name}: {reason[:400]}. "
            "Expected a complete safetensors file or state dict of exactly this architecture."
        ) from error


def hash_weights(clip: Any) -> str:
    """sha256 over the name, shape and float32 bytes of every tensor of a module, in name order."""
    return hash_tensors(clip.state_dict())


def hash_tensors(tensors: Mapping[str, Any]) -> str:
    """sha256 over the name, shape and float32 bytes of every tensor, in name order."""
    total = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        total.update(f"{key} {tuple(value.shape)}".encode())
        total.update(value.detach().float().cpu().contiguous().numpy().data)
    return total.hexdigest()


def check_quick_gelu(name: str, architecture: bool, pretrained: str, weights: bool) -> None:
    """Raise ModelError when only one of weights and architecture uses QuickGELU.

    open_clip only warns, and every activation would be silently wrong.
    """
    if architecture != weights:
        other = name + "-quickgelu" if weights else name.removesuffix("-quickgelu")
        raise ModelError(
            f"{pretrained} was trained {'with' if weights else 'without'} QuickGELU and {name} is "
            f"{'with' if architecture else 'without'} it. Use --model {other}."
        )


def say_near(word: str, words: list[str]) -> str:
    """` Near: a, b.`, the most similar words, or an empty text."""
    near = difflib.get_close_matches(word, words, n=4, cutoff=0.5)
    return f" Near: {', '.join(near)}." if near else ""
