"""transformers' own vision models, with random weights in every tensor, compute what is loaded from their files.

They are made and run by a python that has transformers (benchmarks/peers-env.sh).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actcache.models import load_clip

MAKE = """
import json, sys, torch, transformers

def make(folder, kind, size):
    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=size)
    wide = dict(intermediate_size=96)
    tower = shape | wide
    if kind == "siglip":
        text = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=99,
                    max_position_embeddings=8, bos_token_id=1, eos_token_id=2)
        config = transformers.SiglipConfig(vision_config=tower | dict(patch_size=16), text_config=text)
        model = transformers.SiglipModel(config)
    else:
        config, model = {
            "dinov2": lambda: (c := transformers.Dinov2Config(**shape, patch_size=14), transformers.Dinov2Model(c)),
            "giant": lambda: (c := transformers.Dinov2Config(**shape, patch_size=14, use_swiglu_ffn=True),
                              transformers.Dinov2Model(c)),
            "dinov2_with_registers": lambda: (c := transformers.Dinov2WithRegistersConfig(**shape, patch_size=14),
                                              transformers.Dinov2WithRegistersModel(c)),
            "dinov3_vit": lambda: (c := transformers.DINOv3ViTConfig(**tower, patch_size=16, num_register_tokens=4),
                                   transformers.DINOv3ViTModel(c)),
            "dinov3_gated": lambda: (c := transformers.DINOv3ViTConfig(
                **tower, patch_size=16, num_register_tokens=4, use_gated_mlp=True, hidden_act="silu"),
                             transformers.DINOv3ViTModel(c)),
            "vit": lambda: (c := transformers.ViTConfig(**tower, patch_size=16), transformers.ViTModel(c)),
        }[kind]()
    model = model.eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.05 * torch.randn_like(value))
    model.save_pretrained(folder)
    steps = {"size": {"height": size, "width": size}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    with open(folder + "/preprocessor_config.json", "w") as file:
        json.dump(steps | {"do_center_crop": False}, file)
    pixels, ids = torch.load(folder + "/inputs.pt")
    seen = []
    vision = model.vision_model if kind == "siglip" else model
    lists = [m for m in vision.modules() if isinstance(m, torch.nn.ModuleList)]
    layers = max(lists, key=lambda m: len(list(m.parameters())))
    first = lambda output: output[0] if isinstance(output, tuple) else output
    entering = lambda m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"])
    layers[0].register_forward_pre_hook(entering, with_kwargs=True)
    for layer in layers:
        layer.register_forward_hook(lambda m, args, output: seen.append(first(output)))
    with torch.no_grad():
        pooled = vision(pixel_values=pixels).pooler_output
        result = {"streams": seen[:4], "pooled": pooled}
        if kind == "siglip":
            out = model(pixel_values=pixels, input_ids=ids)
            result |= {"image": out.image_embeds, "text": out.text_embeds, "logits": out.logits_per_image}
        elif kind == "vit":  # transformers put a dense layer behind; the tower's output is CLS
            result["pooled"] = vision(pixel_values=pixels).last_hidden_state[:, 0]
    torch.save(result, folder + "/outputs.pt")

for kind, size in json.loads(sys.argv[2]).items():
    make(sys.argv[1] + "/" + kind, kind, size)
"""
KINDS = {"dinov2": 28, "giant": 28, "dinov2_with_registers": 28, "dinov3_vit": 48, "dinov3_gated": 48, "vit": 32,
         "siglip": 32}  # fmt: skip


def largest(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, run_peers: Callable[..., str]) -> Path:
    """A folder of models: KIND/{config.json, model.safetensors, inputs.pt, outputs.pt}. One process makes them all."""
    folder = tmp_path_factory.mktemp("models")
    for kind, size in KINDS.items():
        pixels = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
        ids = torch.randint(3, 99, (2, 8), generator=torch.Generator().manual_seed(2))
        (folder / kind).mkdir()
        torch.save((pixels, ids), folder / kind / "inputs.pt")
    run_peers("-c", MAKE, folder, json.dumps(KINDS))
    return folder


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_streams_and_pooled_outputs_agree(kind: str, models: Path) -> None:
    pixels, ids = torch.load(models / kind / "inputs.pt")
    theirs: dict[str, Any] = torch.load(models / kind / "outputs.pt")
    clip = load_clip(str(models / kind))
    trunk = clip.module.visual.trunk if kind == "siglip" else clip.module
    seen: list[Tensor] = []
    trunk.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for block in trunk.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    pooled = trunk(pixels)
    assert len(seen) == len(theirs["streams"]) == 4
    streams = [largest(ours, wanted) for ours, wanted in zip(seen, theirs["streams"], strict=True)]
    print(f"{kind}: streams {max(streams):.1e}, pooled {largest(pooled, theirs['pooled']):.1e}; {clip.source.notes}")
    assert max(streams) < 2e-6
    assert largest(pooled, theirs["pooled"]) < 2e-6
    if kind == "siglip":
        image, text = clip.module.encode_image(pixels, normalize=True), clip.module.encode_text(ids, normalize=True)
        logits = clip.module.logit_scale.exp() * image @ text.T + clip.module.logit_bias
        assert max(largest(image, theirs["image"]), largest(text, theirs["text"])) < 2e-6
        assert largest(logits, theirs["logits"]) < 2e-6
