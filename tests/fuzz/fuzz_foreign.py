"""Checkpoints of other packages and models with damaged bytes, settings and tensors.

An SAE that is read must compute what the formulas of its package compute, or be refused; a model must be built or be
refused before it is.
"""

import copy
import json
import random
import sys
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "saetrain"))
from foreign_files import CHECKPOINTS, D, write

from actcache.models import load_clip
from saetrain.interop.formats import read_foreign
from saetrain.interop.parity import compare

ROWS = torch.randn(64, D, generator=torch.Generator().manual_seed(0))
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 0.5, 1e300, float("nan"), float("inf"), 10**30, "", "relu", "topk", "none",
    "x\n\x1b", [], [1], {}, {"k": 3}, {"k": None}, "blocks.1.hook_z", "layer_norm", 39, 40, 41,
]  # fmt: skip
MODEL = {
    "embed_dim": 16, "quick_gelu": False,
    "vision_cfg": {"image_size": 24, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}  # fmt: skip
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash", "size": 24}


def prepare(folder: Path) -> dict[str, torch.Tensor]:
    clip = open_clip.CLIP(**copy.deepcopy(MODEL))
    return {name: value.detach().contiguous() for name, value in clip.state_dict().items()}


def mutate_settings(rng: random.Random, fields: dict[str, Any]) -> None:
    """Change, remove or add one field, at any depth."""
    inner = fields
    while (deeper := [value for value in inner.values() if isinstance(value, dict) and value]) and rng.random() < 0.6:
        inner = rng.choice(deeper)
    key = rng.choice([*inner, "unknown", "k", "scale"])
    if rng.random() < 0.2:
        inner.pop(key, None)
    else:
        inner[key] = copy.deepcopy(rng.choice(VALUES))


def mutate_tensors(rng: random.Random, tensors: dict[str, torch.Tensor]) -> None:
    """Change the values, the shape or the type of a tensor, or drop or add one."""
    name = rng.choice([*tensors])
    value = tensors[name].clone()
    kind = rng.randrange(7)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[rng.choice(["unknown", "scaling_factor", "threshold", "k", name + ".weight"])] = value
    elif kind == 2:
        tensors[name] = value.T.contiguous() if value.ndim == 2 else value[None]
    elif kind == 3:
        dtype = rng.choice([torch.float16, torch.float64, torch.int32, torch.bool, torch.complex64])
        tensors[name] = value if value.is_complex() else value.to(dtype)
    elif kind == 4 and value.is_floating_point():
        flat = value.flatten()
        flat[rng.randrange(len(flat))] = rng.choice([float("nan"), float("inf"), 3e38, -1e20, 1e-45])
        tensors[name] = flat.view(value.shape)
    elif kind == 5:
        tensors[name] = value * rng.choice([0, -1, 1e-30, 1e10])
    else:
        tensors[name] = value[: len(value) // 2].contiguous() if value.ndim else value


def damage(rng: random.Random, folder: Path) -> None:
    """Cut a file, or flip some of its bytes."""
    file = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    data = bytearray(file.read_bytes())
    if rng.random() < 0.3:
        data = data[: rng.randrange(len(data))]
    for _ in range(rng.randrange(1, 9) if data else 0):
        data[rng.randrange(min(len(data), rng.choice([64, 2000, 10**9])))] = rng.randrange(256)
    file.write_bytes(data)


def attempt(rng: random.Random, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    if rng.random() < 0.4:
        attempt_model(rng, folder, dict(weights))
        return
    name = rng.choice([*CHECKPOINTS])
    config, tensors = CHECKPOINTS[name][1](), {key: value.clone() for key, value in CHECKPOINTS[name][2]().items()}
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        mutate_settings(rng, config)
    for _ in range(rng.choice([0, 0, 1, 2])):
        mutate_tensors(rng, tensors)
    if not tensors:
        return
    path = write(name, folder / "in", config, tensors)
    if rng.random() < 0.3:
        damage(rng, path)
    foreign = read_foreign(path)
    compare(foreign.sae, foreign.forward, ROWS, "random")


def attempt_model(rng: random.Random, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    config: dict[str, Any] = {"model_cfg": copy.deepcopy(MODEL), "preprocess_cfg": copy.deepcopy(PREPROCESS)}
    for _ in range(rng.choice([0, 1, 1, 3])):
        mutate_settings(rng, config)
    for _ in range(rng.choice([0, 0, 1])):
        mutate_tensors(rng, weights)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    suffix = rng.choice(["safetensors", "pth"])
    if suffix == "safetensors":
        save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    else:
        torch.save({rng.choice(["model", "state_dict", "x"]): weights}, folder / "model.pth")
    if rng.random() < 0.3:
        damage(rng, folder)
    load_clip(str(folder), rng.choice([None, None, "random:0"]))
