"""Small vision transformers of three kinds, written as folders that `--model` takes.

    python docs/recipes/small_vits.py CIFAR10 OUT

CIFAR10 holds train/<class>/*.jpg and test/<class>/*.jpg. OUT gets

    average     a timm ViT without CLS whose head averages the patches, trained on the labels of CIFAR10/train, so that
                the accuracy of a classifier on its features means something
    registers   a timm DINOv2 with CLS and four registers, with random weights
    siglip      an open_clip SigLIP (no CLS, attention pooling, a text tower) with random weights
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
AVERAGE: dict[str, Any] = {
    "img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 2, "class_token": False,
    "global_pool": "avg", "num_classes": 10,
}  # fmt: skip
REGISTERS: dict[str, Any] = {"img_size": 28, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 2}
SIGLIP: dict[str, Any] = {
    "embed_dim": 768, "init_logit_bias": -10, "custom_text": True,
    "vision_cfg": {
        "image_size": 224, "timm_model_name": "vit_base_patch16_siglip_224", "timm_model_pretrained": False,
        "timm_pool": "map", "timm_proj": "none",
    },
    "text_cfg": {
        "context_length": 64, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2, "no_causal_mask": True,
        "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
    },
}  # fmt: skip
"""The towers of ViT-B-16-SigLIP, but for a small text tower with CLIP's tokenizer, which needs no download."""
N_EPOCHS, BATCH_SIZE, LR = 20, 128, 1e-3


def main(cifar10: Path, out: Path) -> None:
    torch.manual_seed(0)
    train_average(cifar10, out / "average")
    write_registers(out / "registers")
    write_siglip(out / "siglip")


def train_average(cifar10: Path, out: Path) -> None:
    """Train a ViT on the labels, in bfloat16 where the processor multiplies in it, and write it. It takes minutes."""
    pixels, labels = load(cifar10 / "train")
    model = timm.create_model("vit_small_patch16_224", **AVERAGE)
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.05)
    n_steps = N_EPOCHS * (len(pixels) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=n_steps, pct_start=0.1)
    started = time.perf_counter()
    for _ in range(N_EPOCHS):
        model.train()
        for rows in torch.randperm(len(pixels)).split(BATCH_SIZE)[: len(pixels) // BATCH_SIZE]:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(augment(pixels[rows])).float(), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    accuracy = measure(model.eval(), *load(cifar10 / "test"))
    print(f"average: {accuracy:.1%} of the test images after {time.perf_counter() - started:.0f} s")
    classes = sorted(path.name for path in (cifar10 / "train").iterdir())
    write_timm(out, model, "vit_small_patch16_224", AVERAGE, size=32, label_names=classes)


def load(folder: Path) -> tuple[Tensor, Tensor]:
    """All images [N, 3, 32, 32] float32, normalized, and their classes [N]."""
    to_pixels = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    images = ImageFolder(str(folder), to_pixels)
    pixels, labels = zip(*images, strict=True)
    return torch.stack(pixels), torch.tensor(labels)


def augment(pixels: Tensor) -> Tensor:
    """Shift each image by up to four pixels and flip half of them."""
    n = len(pixels)
    padded = F.pad(pixels, (4, 4, 4, 4), mode="reflect")
    rows, columns = torch.randint(0, 9, (2, n, 1)) + torch.arange(32)
    shifted = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return torch.where(torch.rand(n, 1, 1, 1) < 0.5, shifted, shifted.flip(3))


@torch.no_grad()
def measure(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    predicted = torch.cat([model(part).argmax(1) for part in pixels.split(BATCH_SIZE)])
    return float((predicted == labels).float().mean())


@torch.no_grad()
def scale_up(model: nn.Module) -> None:
    """Make every part of a random tower matter: initial LayerScales of 1e-5 and zero biases would hide it."""
    for value in model.parameters():
        value.normal_(std=0.05) if value.ndim > 1 else value.add_(torch.randn_like(value) * 0.2 + 0.2)


def write_timm(
    out: Path, model: nn.Module, architecture: str, arguments: dict[str, Any], *, size: int,
    label_names: list[str] | None = None,
) -> None:  # fmt: skip
    """Write a folder as timm does: config.json and model.safetensors."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), out / "model.safetensors")
    fields = {
        "architecture": architecture,
        "num_classes": arguments.get("num_classes", 0),
        "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
        "pretrained_cfg": {
            "input_size": [3, size, size], "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
            "mean": MEAN, "std": STD, "num_classes": arguments.get("num_classes", 0),
        },
        **({} if label_names is None else {"label_names": label_names}),
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(fields, indent=1))


def write_registers(out: Path) -> None:
    """Write a small DINOv2 with CLS and four registers, with random weights."""
    torch.manual_seed(1)
    registers = timm.create_model("vit_small_patch14_reg4_dinov2", **REGISTERS, num_classes=0)
    scale_up(registers)
    write_timm(out, registers, "vit_small_patch14_reg4_dinov2", REGISTERS, size=28)


def write_siglip(out: Path) -> None:
    """Write a folder as open_clip does: open_clip_config.json and open_clip_model.safetensors."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(2)
    model = open_clip.CustomTextCLIP(**{key: value for key, value in SIGLIP.items() if key != "custom_text"})
    save_file(model.state_dict(), out / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    fields = {"model_cfg": SIGLIP, "preprocess_cfg": preprocess}
    (out / "open_clip_config.json").write_text(json.dumps(fields, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
