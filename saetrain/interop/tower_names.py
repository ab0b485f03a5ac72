"""How other packages spell models and hook points, in the spelling of `--model`, `--pretrained` and `--layer`.

In: a name from a settings file, or part of the name of a folder or repository. Out: our spelling, or None. A name is
never taken as a path, so no file of a stranger can choose what is read from this machine.
"""

import re
from typing import NamedTuple

from actcache import HookPoint
from actcache.hook_point import SITES
from actcache.models import find_tag_of

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_TIMM = re.compile(r"(vit|deit|deit3|beit|beitv2|eva02|eva)_[a-z0-9_]{3,80}(\.[a-z0-9_]{2,60})?", re.ASCII)
_TORCH_HUB = re.compile(r"dinov2_vit([sblg])14(_reg)?")
_DINOV2 = {"s": "small", "b": "base", "l": "large", "g": "giant"}
_OPENAI = {
    "openai/clip-vit-base-patch32": "ViT-B-32-quickgelu", "openai/clip-vit-base-patch16": "ViT-B-16-quickgelu",
    "openai/clip-vit-large-patch14": "ViT-L-14-quickgelu",
    "openai/clip-vit-large-patch14-336": "ViT-L-14-336-quickgelu",
}  # fmt: skip
"""OpenAI's weights on the hub -> open_clip's architecture, whose tag is `openai`."""
BACKBONES = {
    "clip_vitb16": "openai/clip-vit-base-patch16", "dinov2_vitb14": "dinov2_vitb14",
    "mae_vitb16": "vit_base_patch16_224.mae", "siglip_vitb16": "google/siglip-base-patch16-224",
    "deit_vitb16": "deit_base_patch16_224",
}  # fmt: skip
"""ViSAEBench's name of a backbone -> what it loads (visaebench 0.1.0, backbones)."""
DEPTHS = {"B": 12, "base": 12, "S": 12, "small": 12, "L": 24, "large": 24, "H": 32, "huge": 32}
_SIZE = re.compile(r"(?:^|[-_])(?:ViT-|vit[-_]?)?(B|S|L|H|base|small|large|huge)(?=$|[-_/\d])")

_MODULES = re.compile(r"(?:[a-z_]+\.)*?(?:layers?|blocks|resblocks)\.(\d+)(?:\.output|\.out)?")
"""The output of a whole block, as modules are named in transformers, timm and open_clip."""


class Spelling(NamedTuple):
    """What `--model` and `--pretrained` take. A model that brings its own weights has no `pretrained`."""

    model: str
    pretrained: str | None = None


def spell_model(name: object) -> Spelling | None:
    """Our spelling of a model's name; None where it is none that we know how to load.

    openai/clip-vit-base-patch16, open-clip:laion/CLIP-..., hf-hub:OWNER/NAME, timm/NAME, dinov2_vitb14_reg (torch hub),
    vit_base_patch16_224.dino (timm), ViT-B-16/openai (open_clip, as saev writes it), clip_vitb16 (ViSAEBench).
    """
    if not isinstance(name, str):
        return None
    name = re.sub(r"^(open[-_]clip|hf[-_]hub|timm):", "", name.strip())
    name = BACKBONES.get(name, name)
    if re.fullmatch(r"clip-vit-[a-z0-9-]+", name):
        name = f"openai/{name}"
    if name in _OPENAI:
        return Spelling(_OPENAI[name], "openai")
    if match := _TORCH_HUB.fullmatch(name):
        return Spelling(f"hf-hub:facebook/dinov2-{'with-registers-' if match[2] else ''}{_DINOV2[match[1]]}")
    if match := re.fullmatch(r"timm/([\w.]+)", name):
        name = match[1]
    if _TIMM.fullmatch(name):
        return Spelling(f"timm:{name}")
    if not _REPOSITORY.fullmatch(name):
        return None
    architecture, tag = name.split("/")
    if architecture.startswith("ViT-"):  # no owner on the hub, but open_clip's names of a model and of its weights
        quick = tag == "openai" and not architecture.endswith("-quickgelu")
        return Spelling(f"{architecture}-quickgelu" if quick else architecture, tag)
    found = find_tag_of(name)
    return Spelling(*found) if found else Spelling(f"hf-hub:{name}")


def spell_hook_point(name: object) -> HookPoint | None:
    """The hook point of a name such as blocks.9.hook_resid_post or vision_model.encoder.layers.9; None if unknown.

    resid_pre of a block is resid_post of the one before.
    """
    if not isinstance(name, str):
        return None
    if match := re.fullmatch(r"blocks\.(\d{1,3})\.hook_(\w+)", name):
        if match[2] in SITES:
            return HookPoint(int(match[1]), match[2])
        return HookPoint(int(match[1]) - 1) if match[2] == "resid_pre" and int(match[1]) else None
    match = _MODULES.fullmatch(name)
    return HookPoint(int(match[1])) if match and len(match[1]) < 4 else None


def count_layers(model: str) -> int | None:
    """The number of blocks of a model, by the size in its name, where that settles it."""
    match = _SIZE.search(model)
    return DEPTHS.get(match[1]) if match else None
