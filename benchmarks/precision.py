"""How far each precision of the forward pass is from float32, layer by layer, on real images.

In: a model and a folder of images. Out: relative RMS errors of the residual stream after every block (all images,
tokens and channels together) and of the image embedding: float32 against float64; against float32, bfloat16 autocast
everywhere, bfloat16 weights throughout, and ours (float32 stream and LayerNorms, bfloat16 branches), the last at every
site of a block too. `--json` prints one object with every setting. The other precisions are open_clip's modules run
here, not through `VisionTower`.
"""

import argparse
import copy
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from actcache import HookPoint, ImageFolder, load_vision_tower
from actcache.models import VisionTower
from actcache.sources import decode_image

SITES = ("attn_out", "resid_mid", "mlp_out", "resid_post")
EVERYWHERE, WEIGHTS, OURS = "bfloat16 autocast everywhere", "bfloat16 weights", "bfloat16 branches"


class Errors:
    """Sums of squares of differences and of references, by key, in float64."""

    def __init__(self) -> None:
        self.sums: dict[Any, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, key: Any, got: Tensor, reference: Tensor) -> None:
        exact = reference.double()
        self.sums[key][0] += float((got.double() - exact).square().sum())
        self.sums[key][1] += float(exact.square().sum())

    def relative(self, key: Any) -> float:
        difference, total = self.sums[key]
        return math.sqrt(difference / total)


def plain_forward(visual: Any, images: Tensor, *, autocast: bool = False) -> list[Tensor]:
    """open_clip's own forward: the stream after every block [B, T, D], then the image embedding [B, E]."""
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=autocast):
        x = visual._embeds(images)
        out = [x := block(x) for block in visual.transformer.resblocks]
        pooled = visual._pool(x)[0]
        return [*out, pooled if visual.proj is None else pooled @ visual.proj]


def batches(folder: Path, tower: VisionTower, limit: int | None, batch_size: int) -> Iterator[Tensor]:
    """Decoded and preprocessed images [B, 3, H, W]."""
    uris = ImageFolder(folder).plan(limit=limit, seed=0).table["uri"].to_pylist()
    for first in range(0, len(uris), batch_size):
        yield torch.stack([tower.transform(decode_image(folder / u)) for u in uris[first : first + batch_size]])


@torch.no_grad()
def measure(model: str, pretrained: str, folder: Path, limit: int | None, batch_size: int) -> dict[str, Any]:
    exact = load_vision_tower(model, pretrained, precision="float32", device="cpu")
    ours = replace(exact, precision="bfloat16")
    double, rounded = copy.deepcopy(exact.visual).double(), copy.deepcopy(exact.visual).bfloat16()
    hooks = [HookPoint(layer, site) for layer in range(exact.n_layers) for site in SITES]
    errors, n_images = Errors(), 0
    for images in batches(folder, exact, limit, batch_size):
        n_images += len(images)
        reference, kept = exact.run(images, hooks), ours.run(images, hooks)
        streams = [reference[HookPoint(layer)] for layer in range(exact.n_layers)]
        last = HookPoint(exact.n_layers - 1)
        outputs = {
            EVERYWHERE: plain_forward(exact.visual, images, autocast=True),
            WEIGHTS: plain_forward(rounded, images.bfloat16()),
            OURS: [*(kept[HookPoint(layer)] for layer in range(exact.n_layers)), ours.head(kept[last])],
        }
        plain = [*streams, exact.head(streams[-1])]
        for place, value in enumerate(plain_forward(double, images.double())):
            errors.add(("float32", place), plain[place], value)
        for name, values in outputs.items():
            for place, value in enumerate(values):
                errors.add((name, place), value, plain[place])
        for hook in hooks:
            errors.add(hook, kept[hook], reference[hook])
    return {
        "model": Path(model).name,
        "pretrained": Path(pretrained).name,
        "images": folder.name,
        "n_images": n_images,
        "limit": limit,
        "batch_size": batch_size,
        "n_layers": exact.n_layers,
        "d_model": exact.d_model,
        "n_threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "resid_post": {
            name: [errors.relative((name, layer)) for layer in range(exact.n_layers)]
            for name in ("float32", EVERYWHERE, WEIGHTS, OURS)
        },
        "embedding": {name: errors.relative((name, exact.n_layers)) for name in ("float32", EVERYWHERE, WEIGHTS, OURS)},
        "sites": {site: [errors.relative(HookPoint(layer, site)) for layer in range(exact.n_layers)] for site in SITES},
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: percent, float32 (against float64) in parts per million."""
    columns = {**result["resid_post"], **{site: result["sites"][site] for site in SITES[:3]}}
    lines = [
        "| layer | float32, ppm | " + " | ".join(f"{name}, %" for name in list(columns)[1:]) + " |",
        "| --- " * (len(columns) + 1) + "|",
    ]
    for layer in range(result["n_layers"]):
        ppm, *rest = (values[layer] for values in columns.values())
        lines.append(f"| {layer} | {ppm * 1e6:.2f} | " + " | ".join(f"{value:.3%}"[:-1] for value in rest) + " |")
    ppm, *rest = result["embedding"].values()
    cells = [f"{value:.3%}"[:-1] for value in rest] + [""] * 3
    return "\n".join([*lines, f"| image embedding | {ppm * 1e6:.2f} | " + " | ".join(cells) + " |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16", help="open_clip name or config JSON")
    parser.add_argument("--pretrained", default="random:0", help="tag, file or random:SEED")
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--limit", type=int, help="take only so many, a random sample")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    result = measure(args.model, args.pretrained, args.images, args.limit, args.batch_size)
    print(json.dumps(result) if args.json else table(result))


if __name__ == "__main__":
    main()
