"""Small towers of timm with random weights, in a folder with their config, as they are published."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import nn

SIDE, PATCH = 20, 4
"""Pixels of an image and of a patch."""
SMALL: dict[str, Any] = {
    "img_size": SIDE, "patch_size": PATCH, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0,
}  # fmt: skip


@torch.no_grad()
def write_tower(folder: Path, name: str, options: dict[str, Any]) -> nn.Module:
    """Write a small model of timm with noise on every parameter, and return it."""
    torch.manual_seed(3)
    arguments = {**SMALL, **options}
    side = arguments["img_size"]
    model = timm.create_model(name, **arguments).eval()
    for value in model.parameters():  # initial LayerScales of 1e-5 and zero biases would hide what is not read
        value.normal_(std=0.08) if value.ndim > 1 else value.add_(torch.randn_like(value) * 0.1 + 0.1)
    folder.mkdir(parents=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    fields = {
        "architecture": name,
        "num_classes": 0,
        "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
        "pretrained_cfg": {
            "input_size": [3, side, side], "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
            "mean": [0.5] * 3, "std": [0.25] * 3, "num_classes": 0,
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    return model


def model_of(folder: Path) -> str:
    """How --model names the tower in folder/model."""
    return f"timm:local-dir:{folder / 'model'}"
