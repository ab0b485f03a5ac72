"""Small image towers of every name that open_clip and timm list: two blocks, a width of 128, and no default values.

Every parameter is noise, so that no LayerScale of 1e-5 and no bias of zero hides a mistake, and the grid is not square
where the architecture allows it, so that rows and columns cannot be exchanged.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import timm
import torch
from open_clip.model import _build_vision_tower
from timm.models.vitamin import VitCfg, VitConvCfg
from torch import Tensor, nn

from actcache import HookPoint, load_vision_tower
from actcache.models import VisionTower, make_vision_tower, take_apart
from actcache.models.building import build_open_clip

GRID = 4, 5
"""Rows and columns of patches, where a tower takes any."""
SMALL = {"depth": 2, "embed_dim": 128, "num_heads": 2}
VITAMIN = VitCfg(
    embed_dim=(32, 64, 128),
    depths=(1, 1, 1),
    stem_width=32,
    conv_cfg=VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6),
    head_type="1d",
)

BLOCKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer scale": {"ls_init_value": 0.3},
    "no ln_pre, other norms and activations": {
        "no_ln_pre": True,
        "norm_kwargs": {"eps": 1e-3},
        "act_kwargs": {"approximate": "tanh"},
    },
    "custom": {"block_type": "custom"},
    "custom, every option": {
        "qk_norm": True,
        "scale_heads": True,
        "scale_attn_inner": True,
        "scale_attn": True,
        "scale_fc": True,
        "ls_init_value": 0.3,
    },
}
"""Fields of vision_cfg for each kind of block that open_clip makes."""


def build_open_clip_tower(base: Path, file: Path, fields: dict[str, Any], **options: Any) -> VisionTower:
    """The tower of a model's config with other fields of vision_cfg, and no parameter left at one or zero.

    Args:
        base: the config. file: where the changed one is written. options: of `load_vision_tower`.
    """
    config = json.loads(base.read_text())
    config["vision_cfg"] |= fields
    file.write_text(json.dumps(config))
    tower = load_vision_tower(str(file), "random:0", device="cpu", **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in tower.visual.parameters():
            value += 0.1 * torch.randn(value.shape, generator=generator)
    return tower


@cache
def timm_families() -> dict[str, str]:
    """Every name that timm lists -> the module that defines it."""
    return {name: family for family in timm.list_modules() for name in timm.list_models(module=family)}


def make_timm(name: str, create: Callable[..., nn.Module] = timm.create_model, **options: Any) -> nn.Module:
    """A small model of timm with random weights."""
    family = timm_families()[name]
    if family == "vitamin":
        options = {"embed_cfg": VITAMIN, **options}
    if "sapiens2" in name:
        options = {"num_kv_heads": (2, 1), **options}  # the second block with grouped queries
    if "img_size" not in options:
        options["img_size"] = image_size(name)
    width = {} if name == "vit_base_mci_224" else SMALL  # its stem is as wide as its stream
    return create(name, pretrained=False, **{**width, "depth": 2, **options})


def image_size(name: str) -> tuple[int, int]:
    """Height and width for the grid. A convolutional stem has its own stride, at most 32."""
    stem = re.search(r"_(resnet\d+d?|r\d*)_", name)
    patch = re.search(r"patch(\d+)", name)
    stride = 32 if stem else int(patch[1]) if patch else 16
    return stride * GRID[0], stride * GRID[1]


def make_open_clip(name: str) -> nn.Module:
    """The image tower of an architecture of open_clip, small, with random weights; no text tower is built."""
    config = small_config(name)
    with small_trunks(config["vision_cfg"]["image_size"]):
        return _build_vision_tower(config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False))


def make_both_towers(name: str, vocab_size: int) -> nn.Module:
    """An architecture of open_clip with its text tower, small: two blocks, its own context and pooling."""
    config = small_config(name)
    width = config["embed_dim"] if config["text_cfg"].get("proj_type") == "none" else 32
    config["text_cfg"] |= {"layers": 2, "width": width, "heads": 2, "vocab_size": vocab_size}
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {"layers": 1, "width": config["embed_dim"], "heads": 2}
    with small_trunks(config["vision_cfg"]["image_size"]):
        return build_open_clip(config, name, seed=0)[0]


def small_config(name: str) -> dict[str, Any]:
    """The config of an architecture of open_clip with a small image tower."""
    config: dict[str, Any] = json.loads(json.dumps(open_clip.get_model_config(name)))
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        vision["image_size"] = image_size(vision["timm_model_name"])
        return config | {"embed_dim": 128}
    patch = vision["patch_size"]
    square = vision.get("pos_embed_type") == "sin_cos_2d"
    vision |= {"layers": 2, "width": 128, "head_width": 64, "attn_pooler_queries": 16}
    vision["image_size"] = (patch * GRID[0], patch * (GRID[0] if square else GRID[1]))
    return config | {"embed_dim": 64}


@contextmanager
def small_trunks(size: tuple[int, int]) -> Iterator[None]:
    """Inside, open_clip's TimmModel builds small trunks, with its own choice of pooling and head."""
    create = timm.create_model
    timm.create_model = lambda name, pretrained=False, **options: make_timm(name, create, img_size=size, **options)
    try:
        yield
    finally:
        timm.create_model = create


@torch.no_grad()
def add_noise(module: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode, with noise on every parameter and on the statistics of every BatchNorm."""
    generator = torch.Generator().manual_seed(seed)
    for value in module.parameters():
        value += 0.1 * torch.randn(value.shape, generator=generator)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.copy_(0.1 * torch.randn(norm.running_mean.shape, generator=generator))
            norm.running_var.copy_(1 + torch.rand(norm.running_var.shape, generator=generator))
    return module.requires_grad_(False).eval()


def make_tower(module: Any, size: tuple[int, int] | None = None, precision: str = "float32") -> VisionTower:
    """A module as a tower that is fed images of this size, by default of the size that it declares."""
    size = size or take_apart(module).image_size
    model: Any = SimpleNamespace(module=module, model_id="", preprocess=SimpleNamespace(size=size), transform=None)
    return make_vision_tower(model, precision=precision, device="cpu")


def make_pixels(tower: VisionTower, n: int = 2) -> Tensor:
    return torch.randn(n, 3, *tower.image_size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def watch(module: nn.Module, pixels: Tensor) -> SimpleNamespace:
    """The module's own forward: its `output`, the `stream` before block 0 and every hook point it reaches (`seen`).

    Everything is taken by hooks on the module's own parts.
    """
    seen: dict[HookPoint, Tensor] = {}
    before: list[Tensor] = []
    handles = []

    def keep_input(part: nn.Module, keep: Callable[[Tensor], None]) -> None:
        handles.append(part.register_forward_pre_hook(lambda _, args: keep(args[0])))

    def keep_output(part: nn.Module, keep: Callable[[Tensor], None]) -> None:
        handles.append(part.register_forward_hook(lambda _, __, out: keep(out)))

    def into(layer: int, site: str) -> Callable[[Tensor], None]:
        return lambda x: seen.__setitem__(HookPoint(layer, site), x)

    branches: dict[tuple[int, str], list[Tensor]] = {}
    trunk = getattr(module, "trunk", module)
    blocks = trunk.transformer.resblocks if hasattr(trunk, "transformer") else trunk.blocks
    keep_input(blocks[0], before.append)
    for layer, block in enumerate(blocks):
        keep_output(block, into(layer, "resid_post"))
        if hasattr(block, "ls_1"):
            keep_output(block.ls_1, into(layer, "attn_out"))
            keep_input(block.ln_2, into(layer, "resid_mid"))
            keep_output(block.ls_2, into(layer, "mlp_out"))
        elif hasattr(block, "attns"):
            for site, parts in (("attn_out", block.attns), ("mlp_out", block.ffns)):
                for part in parts:
                    keep_output(part, branches.setdefault((layer, site), []).append)
            keep_input(block.ffns[0], into(layer, "resid_mid"))
        elif hasattr(block, "drop_path1"):  # it gets what the branch adds
            after = "Post" in type(block).__name__
            keep_input(block.drop_path1, into(layer, "attn_out"))
            keep_input(block.mlp if after else block.norm2, into(layer, "resid_mid"))
            keep_input(block.drop_path2, into(layer, "mlp_out"))
    output = module(pixels)
    for handle in handles:
        handle.remove()
    for (layer, site), values in branches.items():
        seen[HookPoint(layer, site)] = torch.stack(values).sum(0)
    output = output[0] if isinstance(output, tuple) else output  # CoCa's gives its tokens too
    return SimpleNamespace(output=output, stream=before[0], seen=seen)
