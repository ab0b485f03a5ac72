"""Files of every project load strictly into timm's classes, to the same values; what is left out is known and said."""

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from small_models import (
    SMALL,
    add_noise,
    make,
    pixels,
    to_huggingface,
    to_huggingface_siglip,
    to_official_dinov2,
    to_official_dinov3,
    write_folder,
)
from torch import Tensor
from torch.nn import functional

from actcache import ModelError
from actcache.models import load_clip

Tensors = dict[str, Tensor]
GATED: dict[str, Any] = {"mlp_ratio": 2 * 88 / 32}  # SwiGLU: two thirds of four times the width, a multiple of 8


def official(module: Any) -> Tensors:
    return to_official_dinov2(module.state_dict())


def load(path: Path, content: Any, folder: Path, *, name: str = "weights.pth") -> Any:
    torch.save(content, path / name)
    return load_clip(str(folder), str(path / name))


CASES: dict[str, tuple[str, dict[str, Any], Callable[[Any], Any]]] = {
    "DINOv2": ("vit_small_patch14_dinov2", {}, official),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", {}, official),
    "DINOv2 giant": ("vit_giant_patch14_dinov2", GATED, official),
    "DINOv2 giant with registers": ("vit_giant_patch14_reg4_dinov2", GATED, official),
    "DINOv3": ("vit_small_patch16_dinov3_qkvb", {}, lambda m: to_official_dinov3(m.state_dict(), m.rope.periods)),
    "DINOv3 with SwiGLU": (
        "vit_small_plus_patch16_dinov3_qkvb", {}, lambda m: to_official_dinov3(m.state_dict(), m.rope.periods)
    ),
    "MAE": ("vit_base_patch16_224", {}, lambda m: {"model": m.state_dict()}),
    "MAE with its decoder": (
        "vit_base_patch16_224", {},
        lambda m: {"model": m.state_dict() | {"decoder_embed.weight": torch.ones(3, 32),
                                              "mask_token": torch.ones(1, 1, 3),
                                              "decoder_blocks.0.norm1.weight": torch.ones(3),
                                              "decoder_pos_embed": torch.ones(1, 5, 3)},
                   "optimizer": {"lr": 1}, "args": argparse.Namespace(lr=1)},
    ),
    "DeiT III": (
        "deit3_small_patch16_224", {},
        lambda m: {"model": {k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v
                             for k, v in m.state_dict().items()}},
    ),
    "DeiT, distilled": ("deit_tiny_distilled_patch16_224", {}, lambda m: {"model": m.state_dict()}),
    "BEiT": (
        "beit_base_patch16_224", {},
        lambda m: {"module": m.state_dict() | {"blocks.0.attn.relative_position_index": torch.zeros(2, 2).long(),
                                               "mask_token": torch.ones(1, 1, 32), "lm_head.bias": torch.ones(3)}},
    ),
    "a training with teacher and student": (
        "vit_base_patch16_224", {},
        lambda m: {"student": {"backbone.cls_token": torch.zeros(1)}, "epoch": 3,
                   "teacher": {f"backbone.{k}": v for k, v in m.state_dict().items()}
                   | {"head.mlp.0.weight": torch.ones(3)}},
    ),
    "a training of DINOv2 in chunks": (
        "vit_small_patch14_dinov2", {},
        lambda m: {"teacher": {f"backbone.{k}".replace("blocks.", "blocks.0."): v for k, v in official(m).items()}
                   | {"dino_head.last_layer.weight": torch.ones(3)}},
    ),
    "teacher and student by name": (
        "vit_base_patch16_224", {},
        lambda m: {"state_dict": {f"module.teacher.backbone.{k}": v for k, v in m.state_dict().items()}
                   | {"module.student.backbone.cls_token": torch.zeros(1)}},
    ),
    "module. and state_dict": (
        "vit_base_patch16_224", {}, lambda m: {"state_dict": {f"module.{k}": v for k, v in m.state_dict().items()}}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_file_gives_the_same_tower(case: str, tmp_path: Path) -> None:
    name, arguments, layout = CASES[case]
    size = 28 if "patch14" in name else 32
    arguments = {**arguments, "img_size": size}
    module = make(name, n_classes=0, **arguments)
    folder = write_folder(tmp_path / "model", name, module, size=size, **arguments)
    clip = load(tmp_path, layout(module), folder)
    with torch.no_grad():
        torch.testing.assert_close(clip.module(pixels(size)), module(pixels(size)), rtol=1e-6, atol=1e-6)
    notes = " ".join(clip.source.notes)
    if case == "MAE with its decoder":
        assert (
            "no part of the image tower and were left out: decoder_blocks.0.norm1.weight, decoder_embed.weight" in notes
        )
        assert "mask_token" not in notes
    if "teacher" in case or "training" in case:
        assert "the teacher's weights were taken" in notes
    if case == "a training of DINOv2 in chunks":
        assert "left out: dino_head.last_layer.weight" in notes
    if case == "MAE":
        assert not notes


HUGGING: dict[str, tuple[str, dict[str, Any], str, str, Callable[[Any], Tensors]]] = {
    "dinov2": ("vit_small_patch14_dinov2", {}, "dinov2", "", official),
    "dinov2 of a classifier": ("vit_small_patch14_dinov2", {}, "dinov2", "dinov2.", official),
    "dinov2 giant": ("vit_giant_patch14_dinov2", GATED, "dinov2", "", official),
    "dinov2 with registers": (
        "vit_small_patch14_reg4_dinov2", {}, "dinov2_with_registers", "dinov2_with_registers.", official
    ),
    "dinov3": (
        "vit_small_patch16_dinov3_qkvb", {}, "dinov3_vit", "",
        lambda m: to_official_dinov3(m.state_dict(), m.rope.periods),
    ),
    "dinov3 with SwiGLU": (
        "vit_small_plus_patch16_dinov3_qkvb", {}, "dinov3_vit", "",
        lambda m: to_official_dinov3(m.state_dict(), m.rope.periods),
    ),
    "vit": ("vit_base_patch16_224", {}, "vit", "vit.", lambda m: m.state_dict()),
}  # fmt: skip


@pytest.mark.parametrize("case", HUGGING)
def test_files_of_transformers_give_the_same_tower(case: str, tmp_path: Path) -> None:
    name, arguments, kind, prefix, layout = HUGGING[case]
    size = 28 if "patch14" in name else 32
    arguments = {**arguments, "img_size": size}
    module = make(name, n_classes=5 if case == "vit" else 0, **arguments)
    folder = write_folder(tmp_path / "model", name, module, size=size, **arguments)
    tensors = to_huggingface(layout(module), kind, prefix)
    if case == "dinov2 of a classifier":
        tensors |= {"classifier.weight": torch.ones(4, 64), "classifier.bias": torch.ones(4)}  # of CLS and mean patch
    if case == "vit":
        tensors |= {"vit.pooler.dense.weight": torch.ones(32, 32)}
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "weights.safetensors")
    clip = load_clip(str(folder), str(tmp_path / "weights.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(clip.module(pixels(size)), module(pixels(size)), rtol=1e-6, atol=1e-6)
    notes = " ".join(clip.source.notes)
    assert ("left out: head.bias, head.weight" in notes) == (case == "dinov2 of a classifier")
    assert ("left out: pooler.dense.weight" in notes) == (case == "vit")
    assert clip.classes == (5 if case == "vit" else 0)


# ---------------------------------------------------------------------------------------------------------------------
# What would be lost silently


def test_periods_of_a_rotary_embedding_are_the_files(tmp_path: Path) -> None:
    module = make("vit_small_patch16_dinov3_qkvb", img_size=32)
    folder = write_folder(tmp_path / "model", "vit_small_patch16_dinov3_qkvb", module, size=32, img_size=32)
    rounded = module.rope.periods.bfloat16()
    clip = load(tmp_path, to_official_dinov3(module.state_dict(), rounded), folder)
    assert torch.equal(clip.module.rope.periods, rounded.float())
    module.rope.periods.copy_(rounded.float())
    with torch.no_grad():
        assert torch.equal(clip.module(pixels(32)), module(pixels(32)))
    assert clip.model_id != load_clip(str(folder)).model_id
    same = load(tmp_path, to_official_dinov3(module.state_dict(), load_clip(str(folder)).module.rope.periods), folder)
    assert same.model_id == load_clip(str(folder)).model_id


def test_biases_that_the_architecture_lacks_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = make("vit_small_patch16_dinov3_qkvb", img_size=32)
    folder = write_folder(tmp_path / "model", "vit_small_patch16_dinov3", module, size=32, img_size=32)
    tensors = to_official_dinov3(module.state_dict(), module.rope.periods)
    with pytest.raises(ModelError, match=r"biases of queries and values.*_qkvb"):
        load(tmp_path, tensors, folder)
    zeros = {k: torch.zeros_like(v) if k.endswith("qkv.bias") else v for k, v in tensors.items()}
    clip = load(tmp_path, zeros, folder)  # as published: trained, and 0
    for block in module.blocks:
        block.attn.q_bias.data.zero_()
        block.attn.v_bias.data.zero_()
    with torch.no_grad():
        torch.testing.assert_close(clip.module(pixels(32)), module(pixels(32)), rtol=1e-6, atol=1e-6)
    assert not capsys.readouterr().out  # timm would print a line for each block


def test_a_foreign_or_incomplete_file_is_refused(tmp_path: Path) -> None:
    name = "vit_base_patch16_224"
    module = make(name, n_classes=7, img_size=32)
    folder = write_folder(tmp_path / "model", name, module, size=32, n_classes=1000, img_size=32)
    own = module.state_dict()
    clip = open_clip.CLIP(16, {"layers": 2, "width": 64, "patch_size": 16, "image_size": 32},
                          {"context_length": 8, "vocab_size": 99, "width": 16, "heads": 2, "layers": 1})  # fmt: skip
    wrong = {
        "missing": {k: v for k, v in own.items() if k != "blocks.1.mlp.fc2.bias"},
        "left over": own | {"adapter.weight": torch.ones(3)},
        "shapes differ": own | {"norm.weight": torch.ones(5)},
        "a head of another width": own | {"head.weight": torch.ones(7, 40)},
        "a classifier without its biases": {k: v for k, v in own.items() if k != "head.bias"},
        "another width": clip.state_dict(),
        "another depth": make(name, depth=3, img_size=32).state_dict(),
        "a CLIP of transformers": {"vision_model.embeddings.class_embedding": torch.ones(32)},
        "nothing known": {"a": torch.ones(3)},
    }  # fmt: skip
    for what, content in wrong.items():
        with pytest.raises(ModelError, match="cannot be loaded") as caught:
            load(tmp_path, content, folder)
        assert "\n" not in str(caught.value), what
        assert len(str(caught.value)) < 700


@torch.no_grad()
def test_a_clip_of_open_clip_gives_timm_its_image_tower(tmp_path: Path) -> None:
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32}
    text = {"context_length": 8, "vocab_size": 99, "width": 16, "heads": 2, "layers": 1}
    made = add_noise(open_clip.CLIP(24, vision, text))
    name = "vit_base_patch16_clip_224"
    folder = write_folder(tmp_path / "model", name, None, size=32, n_classes=24, img_size=32)
    clip = load(tmp_path, made.state_dict(), folder)
    torch.testing.assert_close(clip.module(pixels(32)), made.encode_image(pixels(32)), rtol=1e-5, atol=1e-5)
    assert "were left out: ln_final.bias, ln_final.weight, logit_scale and" in " ".join(clip.source.notes)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize("size", ["48", "32x64"])
@pytest.mark.parametrize("name", ["vit_base_patch16_224", "vit_small_patch16_dinov3", "eva02_base_patch14_224",
                                  "beit_base_patch16_224", "vit_relpos_base_patch16_224",
                                  "vit_base_patch16_siglip_224"])  # fmt: skip
def test_positions_are_resized_as_timm_does_it(name: str, size: str, tmp_path: Path) -> None:
    own = 28 if "patch14" in name else 32
    wanted: Any = (int(size), int(size)) if size == "48" else (32, 64)
    if own == 28:
        wanted = (42, 42) if size == "48" else (28, 56)
    module = make(name, img_size=own)
    folder = write_folder(tmp_path / "model", name, module, size=own, img_size=own)
    clip = load_clip(str(folder), image_size="x".join(map(str, wanted)))
    other = timm.create_model(name, num_classes=0, **SMALL | {"img_size": own})
    other.load_state_dict(module.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm indexes by a list, of which torch warns
        other.eval().set_input_size(wanted)
    with torch.no_grad():
        torch.testing.assert_close(clip.module(pixels(wanted)), other(pixels(wanted)), rtol=1e-5, atol=1e-6)
    assert clip.preprocess.size == wanted
    assert clip.facts["image_size"] == "--image-size"
    assert clip.model_id != load_clip(str(folder)).model_id
    if getattr(clip.module, "pos_embed", None) is not None:
        assert "2 x 2 patches; they were interpolated to the" in " ".join(clip.source.notes)
    again = load_clip(str(folder), preprocess=clip.preprocess.to_json())  # as a store is opened again
    assert again.model_id == clip.model_id


@pytest.mark.parametrize("size", ["0", "-3", "12x", "x12", "1e3", "224x224x3", "99999", "224 x 224", "abc"])
def test_a_size_that_is_none_is_one_line(size: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", "vit_base_patch16_224", None, size=32, img_size=32)
    with pytest.raises(ModelError, match=r"--image-size .*224x336"):
        load_clip(str(folder), "random:0", image_size=size)


def test_images_smaller_than_a_patch_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", "vit_base_patch16_224", None, size=32, img_size=32)
    for model in (str(folder), "ViT-B-32"):
        with pytest.raises(ModelError) as caught:
            load_clip(model, "random:0", image_size="8")
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# open_clip with a trunk of timm


def siglip(size: int = 32, **fields: Any) -> dict[str, Any]:
    return {
        "embed_dim": 32, "init_logit_bias": -10, "custom_text": True,
        "vision_cfg": {"image_size": size, "timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map",
                       "timm_proj": "none", "timm_model_args": SMALL | {"img_size": 32, "act_layer": "gelu_tanh"}},
        "text_cfg": {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 2,
                     "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
                     "act_kwargs": {"approximate": "tanh"}, "hf_tokenizer_name": "siglip"}, **fields,
    }  # fmt: skip


def test_a_siglip_loads_from_its_own_and_from_transformers_names(tmp_path: Path) -> None:
    (tmp_path / "siglip.json").write_text(json.dumps(siglip()))
    made = add_noise(load_clip(str(tmp_path / "siglip.json"), "random:3").module)
    tensors = {k: v.contiguous() for k, v in made.state_dict().items()}
    save_file(tensors, tmp_path / "own.safetensors")
    save_file({k: v.contiguous() for k, v in to_huggingface_siglip(tensors).items()}, tmp_path / "theirs.safetensors")
    own = load_clip(str(tmp_path / "siglip.json"), str(tmp_path / "own.safetensors"))
    theirs = load_clip(str(tmp_path / "siglip.json"), str(tmp_path / "theirs.safetensors"))
    assert own.model_id == theirs.model_id
    assert own.has_text
    with torch.no_grad():
        assert torch.equal(own.module.encode_image(pixels(32)), made.encode_image(pixels(32)))
    activation = own.module.visual.trunk.blocks[0].mlp.act
    x = torch.linspace(-3, 3, 9)
    torch.testing.assert_close(activation(x), functional.gelu(x, approximate="tanh"))
    for file in ("own.safetensors", "theirs.safetensors"):  # its image tower by itself
        folder = write_folder(tmp_path / file[:3], "vit_base_patch16_siglip_224", None, size=32, img_size=32,
                              act_layer="gelu_tanh")  # fmt: skip
        tower = load_clip(str(folder), str(tmp_path / file))
        with torch.no_grad():
            assert torch.equal(tower.module(pixels(32)), made.visual(pixels(32)))
        assert "no part of the image tower and were left out: " in " ".join(tower.source.notes)


def test_a_config_of_transformers_siglip_is_the_same_model(tmp_path: Path) -> None:
    (tmp_path / "siglip.json").write_text(json.dumps(siglip()))
    made = add_noise(load_clip(str(tmp_path / "siglip.json"), "random:3").module)
    tensors = to_huggingface_siglip({k: v.contiguous() for k, v in made.state_dict().items()})
    folder = tmp_path / "hf"
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    tower = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"model_type": "siglip", "vision_config": tower | {"image_size": 32, "patch_size": 16},
              "text_config": tower | {"vocab_size": 99, "max_position_embeddings": 8}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "size": {"height": 32, "width": 32}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "do_resize": True, "do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_center_crop": False,
    }))  # fmt: skip
    clip = load_clip(str(folder))
    ids = torch.randint(0, 99, (3, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(clip.module.encode_image(pixels(32)), made.encode_image(pixels(32)))
        assert torch.equal(clip.module.encode_text(ids), made.encode_text(ids))
    assert clip.preprocess.resize_mode == "squash"
    assert (clip.module.logit_bias, clip.module.logit_scale) == (made.logit_bias, made.logit_scale)


def test_an_open_clip_model_with_a_trunk_takes_other_sizes(tmp_path: Path) -> None:
    (tmp_path / "siglip.json").write_text(json.dumps(siglip()))
    (tmp_path / "large.json").write_text(json.dumps(siglip(48)))
    made = add_noise(load_clip(str(tmp_path / "siglip.json"), "random:3").module)
    save_file({k: v.contiguous() for k, v in made.state_dict().items()}, tmp_path / "own.safetensors")
    weights = str(tmp_path / "own.safetensors")
    flag = load_clip(str(tmp_path / "siglip.json"), weights, image_size="48")
    config = load_clip(str(tmp_path / "large.json"), weights)
    assert flag.model_id == config.model_id
    made.visual.set_input_size((48, 48))
    with torch.no_grad():
        torch.testing.assert_close(flag.module.encode_image(pixels(48)), made.encode_image(pixels(48)))
    assert "2 x 2 patches; they were interpolated to the 3 x 3" in " ".join(flag.source.notes)


def test_every_plain_name_of_open_clip_is_described() -> None:
    """Descriptions only: nothing is built."""
    from actcache.models.resolver import resolve_model

    refused = 0
    for name in open_clip.list_models():
        vision = open_clip.get_model_config(name)["vision_cfg"]
        trunk = vision.get("timm_model_name", "vit")
        if isinstance(vision.get("layers"), list) or trunk.startswith(("convnext", "fastvit", "swin")):
            refused += 1
            with pytest.raises(ModelError, match=r"cannot be used: it (is a convolutional network|has stages)"):
                resolve_model(name, "random:0")
        else:
            assert resolve_model(name, "random:0").timm is None
    assert refused == 28


def test_a_tower_that_cannot_be_used_is_refused_before_it_is_built_or_downloaded() -> None:
    for name in (
        "timm:swin_base_patch4_window7_224.ms_in22k",
        "timm:resnet50",
        "timm:cait_s24_224",
        "convnext_xxlarge",
    ):
        with pytest.raises(ModelError, match=r"cannot be used: it .*Choose a plain ViT"):
            load_clip(name, None if "." in name else "random:0")
