"""The open_clip image tower, taken apart: embed -> run_blocks(start, stop) -> head.

In: an architecture (an open_clip name or config JSON) and weights (a tag, a file, or `random:SEED`).
Out: `VisionTower`. Promises: weights load strictly and without pickle code; a QuickGELU mismatch is an error;
run in float32, `head(run_blocks(embed(x), 0, n_layers))` equals open_clip's own `visual(x)` bit for bit.
"""

import difflib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from actcache.artifact import (
    digest,
)
from actcache.errors import ModelError, SettingsError

PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class VisionTower:
    """A CLIP image tower in eval mode on its device.

    Attributes:
        visual: open_clip's VisionTransformer.
        model_id: hash of architecture, base weights and preprocessing.
        preprocess: open_clip's preprocessing fields (size, mean, std, interpolation, resize_mode, ...).
        transform: PIL image -> float32 tensor [3, H, W], open_clip's own.
        precision: `float32`, or `bfloat16`: the branches (attention, MLP) in bfloat16, the residual stream and its
            LayerNorms in float32. The stream is what we keep, so it is not rounded at every block: a third of plain
            autocast's error at the same speed.
    """

    visual: Any
    model_id: str
    preprocess: dict[str, Any]
    transform: Callable[[Any], Tensor]
    device: torch.device
    precision: str

    @property
    def blocks(self) -> nn.ModuleList:
        blocks: nn.ModuleList = self.visual.transformer.resblocks
        return blocks

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        return int(self.visual.positional_embedding.shape[1])

    @property
    def grid(self) -> tuple[int, int]:
        rows, columns = self.visual.grid_size
        return int(rows), int(columns)

    @property
    def patch_size(self) -> tuple[int, int]:
        height, width = self.visual.patch_size
        return int(height), int(width)

    def embed(self, images: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] -> the stream before block 0, [B, T, D] float32."""
        x: Tensor = self.visual._embeds(images.to(self.device))
        return x

    def run_blocks(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Run blocks start..stop-1 on the stream [B, T, D]."""
        bf16 = self.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            for block in self.blocks[start:stop]:
                x = block(x)
        return x

    def head(self, x: Tensor) -> Tensor:
        """The stream after the last block -> image embedding [B, E] (not normalised)."""
        pooled: Tensor = self.visual._pool(x)[0]
        return pooled if self.visual.proj is None else pooled @ self.visual.proj


def load_vision_tower(model: str, pretrained: str, *, precision: str = "auto", device: str = "auto") -> VisionTower:
    """Build the tower and load its weights.

    Args:
        model: an open_clip architecture name, or the path of an open_clip config JSON.
        pretrained: an open_clip tag, the path of a checkpoint (safetensors, or a state dict), or `random:SEED`.

    Raises:
        ModelError: unknown name or tag (near ones are listed), not a VisionTransformer, QuickGELU mismatch, or a
            checkpoint that is truncated or has other tensors than the architecture.
    """
    name, config, preprocess = _read_config(model)
    source = _find_weights(name, config, pretrained)
    preprocess |= source.preprocess
    clip = _build(config, name, source.seed)
    if source.path is not None:
        _load_weights(clip, source.path, name)
    visual = clip.visual
    preprocess["size"] = visual.image_size
    preprocess = json.loads(json.dumps(preprocess))  # tuples become lists, as they are stored
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**preprocess), False)
    model_id = digest({"config": config, "weights": _hash_weights(clip), "preprocess": preprocess})
    target = choose_device(device)
    return VisionTower(
        visual=visual.requires_grad_(False).eval().to(target),
        model_id=model_id,
        preprocess=preprocess,
        transform=transform,
        device=target,
        precision=choose_precision(precision, target),
    )


def choose_device(device: str) -> torch.device:
    """`auto`: CUDA where there is one, else CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    return chosen


def choose_precision(precision: str, device: torch.device) -> str:
    """`auto`: bfloat16 branches where the hardware multiplies bfloat16, else float32."""
    if precision not in PRECISIONS:
        raise SettingsError(f"--precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if device.type == "cpu" and has_cpu_bfloat16() else "float32"


def has_cpu_bfloat16() -> bool:
    """AVX-512 bf16 or AMX. Elsewhere bfloat16 is emulated and slower than float32."""
    return any(
        getattr(torch.cpu, probe, lambda: False)() for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


# ---------------------------------------------------------------------------------------------------------------------
# Architecture


def _read_config(model: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(name, model config, preprocessing) of an open_clip name or config JSON."""
    preprocess = open_clip.transform.merge_preprocess_dict(open_clip.transform.PreprocessCfg(), {})
    if model.endswith(".json"):
        try:
            config = json.loads(Path(model).read_bytes())
        except (OSError, ValueError) as error:
            raise ModelError(f"--model {model} cannot be read as an open_clip config JSON: {error}.") from error
        if isinstance(config, dict) and "model_cfg" in config:  # the layout of open_clip_config.json on the hub
            preprocess = open_clip.transform.merge_preprocess_dict(preprocess, config.get("preprocess_cfg", {}))
            config = config["model_cfg"]
        if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(config):
            raise ModelError(f"--model {model} is not an open_clip config: it needs embed_dim, vision_cfg, text_cfg.")
        return Path(model).name, config, preprocess
    config = open_clip.get_model_config(model)
    if config is None:
        raise ModelError(
            f"Unknown architecture {model!r}.{_near(model, open_clip.list_models())} "
            "Give an open_clip name or the path of a config JSON."
        )
    return model, config, preprocess


def _build(config: dict[str, Any], name: str, seed: int | None) -> Any:
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
    preprocess: dict[str, Any]


def _find_weights(name: str, config: dict[str, Any], pretrained: str) -> _WeightSource:
    if pretrained.startswith("random:"):
        try:
            return _WeightSource(None, int(pretrained.removeprefix("random:")), {})
        except ValueError as error:
            raise ModelError(f"--pretrained {pretrained}: expected random:SEED with a whole number.") from error
    if Path(pretrained).is_file():
        return _WeightSource(pretrained, None, {})
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        tags = open_clip.list_pretrained_tags_by_model(name)
        known = f" Tags of {name}: {', '.join(tags)}." if tags else f" {name} has no tags."
        raise ModelError(
            f"--pretrained {pretrained!r} is neither a file nor a tag of {name}.{_near(pretrained, tags)}{known} "
            "`random:SEED` gives random weights."
        )
    check_quick_gelu(name, bool(config.get("quick_gelu", False)), pretrained, bool(tag.get("quick_gelu", False)))
    try:
        path = open_clip.download_pretrained(tag)
    except Exception as error:  # network libraries raise what they like
        raise ModelError(
            f"The weights of {name} {pretrained} cannot be downloaded: {str(error).rstrip('.')}."
        ) from error
    return _WeightSource(path, None, open_clip.transform.merge_preprocess_dict({}, tag))


def check_quick_gelu(name: str, architecture: bool, pretrained: str, weights: bool) -> None:
    """Raise when weights trained with QuickGELU meet an architecture without, or the reverse.

    open_clip only warns, and every activation would be quietly wrong.
    """
    if architecture != weights:
        other = name + "-quickgelu" if weights else name.removesuffix("-quickgelu")
        raise ModelError(
            f"{pretrained} was trained {'with' if weights else 'without'} QuickGELU and {name} is "
            f"{'with' if architecture else 'without'} it. Use --model {other}."
        )


def _load_weights(clip: Any, path: str, name: str) -> None:
    try:
        open_clip.load_checkpoint(clip, path, strict=True, weights_only=True)
    except Exception as error:  # safetensors, pickle and zip readers raise a dozen kinds
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{Path(path).name} cannot be loaded into {name}: {reason[:400]}. "
            "Expected a whole safetensors file or state dict of exactly this architecture."
        ) from error


def _hash_weights(clip: Any) -> str:
    """sha256 over name, shape and float32 bytes of every tensor, in name order."""
    total = hashlib.sha256()
    for key, value in sorted(clip.state_dict().items()):
        total.update(f"{key} {tuple(value.shape)}".encode())
        total.update(value.float().contiguous().numpy().data)
    return total.hexdigest()


def _near(word: str, words: list[str]) -> str:
    near = difflib.get_close_matches(word, words, n=4, cutoff=0.5)
    return f" Near: {', '.join(near)}." if near else ""
