"""A folder of transformers is a model: its configs say which tower is built, and how images are prepared."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_models import make, pixels, to_huggingface, to_official_dinov2, to_official_dinov3
from torch import Tensor

from actcache import ModelError
from actcache.models import load_clip
from actcache.models.transformers_vision import timm_model

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = SHAPE | {"intermediate_size": 128}
STEPS = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "resample": 3,
         "image_mean": [0.4] * 3, "image_std": [0.2] * 3}  # fmt: skip

KINDS: dict[str, tuple[dict[str, Any], str, dict[str, Any], Callable[[Any], dict[str, Tensor]]]] = {
    "dinov2": (SHAPE | {"patch_size": 14}, "vit_base_patch14_dinov2", {}, lambda m: to_official_dinov2(m.state_dict())),
    "dinov2 with gates": (
        SHAPE | {"patch_size": 14, "use_swiglu_ffn": True}, "vit_giant_patch14_dinov2", {"mlp_ratio": 2 * 88 / 32},
        lambda m: to_official_dinov2(m.state_dict()),
    ),
    "dinov2_with_registers": (
        SHAPE | {"patch_size": 14}, "vit_base_patch14_reg4_dinov2", {}, lambda m: to_official_dinov2(m.state_dict())
    ),
    "dinov3_vit": (
        WIDE | {"num_register_tokens": 4}, "vit_base_patch16_dinov3_qkvb", {"global_pool": "token"},
        lambda m: to_official_dinov3(m.state_dict(), m.rope.periods),
    ),
    "dinov3_vit with gates": (
        WIDE | {"num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
        "vit_small_plus_patch16_dinov3_qkvb", {"global_pool": "token"},
        lambda m: to_official_dinov3(m.state_dict(), m.rope.periods),
    ),
    "vit": (
        WIDE, "vit_base_patch16_224", {"norm_layer": partial(torch.nn.LayerNorm, eps=1e-12)},
        lambda m: m.state_dict(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", [224, 28])
@pytest.mark.parametrize("case", KINDS)
def test_it_is_built_as_its_config_says(case: str, size: int, tmp_path: Path) -> None:
    """At the size of its file, and at the size for which its images are cut."""
    fields, name, arguments, layout = KINDS[case]
    kind, trained = case.split(" ")[0], 224
    if size == 28:
        size, trained = (42 if "patch14" in name else 48), (28 if "patch14" in name else 32)
    module = make(name, img_size=trained, **arguments)
    tensors = to_huggingface(layout(module), kind)
    save_file({k: v.contiguous() for k, v in tensors.items() if "head" not in k}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "image_size": trained, **fields}))
    steps = STEPS | {"crop_size": {"height": size, "width": size}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(steps))
    clip = load_clip(f"local-dir:{tmp_path}")
    notes = " ".join(clip.source.notes)
    if size != trained:
        module.set_input_size((size, size))
        assert ("interpolated" in notes) == (kind != "dinov3_vit")  # which has a rotary embedding only
    with torch.no_grad():
        torch.testing.assert_close(clip.module(pixels(size)), module(pixels(size)), rtol=1e-5, atol=1e-6)
    assert clip.preprocess.size == (size, size)
    assert clip.preprocess.scale == (256, 256)
    assert clip.preprocess.mean == (0.4, 0.4, 0.4)
    assert "has the names of transformers' vision transformers" in notes
    assert clip.model_id == load_clip(str(tmp_path), f"local-dir:{tmp_path}").model_id


PUBLISHED: dict[str, tuple[dict[str, Any], str, set[str]]] = {
    "facebook/dinov2-small": ({"model_type": "dinov2", "hidden_size": 384, "num_attention_heads": 6, "image_size": 518},
                              "vit_small_patch14_dinov2", set()),
    "facebook/dinov2-large": ({"model_type": "dinov2", "hidden_size": 1024, "num_attention_heads": 16,
                               "num_hidden_layers": 24, "image_size": 518}, "vit_large_patch14_dinov2", set()),
    "facebook/dinov2-giant": ({"model_type": "dinov2", "hidden_size": 1536, "num_attention_heads": 24,
                               "num_hidden_layers": 40, "use_swiglu_ffn": True}, "vit_giant_patch14_dinov2", set()),
    "facebook/dinov2-with-registers-giant": (
        {"model_type": "dinov2_with_registers", "hidden_size": 1536, "num_attention_heads": 24, "patch_size": 14,
         "num_hidden_layers": 40, "use_swiglu_ffn": True}, "vit_giant_patch14_reg4_dinov2", set()),
    "facebook/dinov3-vits16": ({"model_type": "dinov3_vit", "num_register_tokens": 4}, "vit_small_patch16_dinov3_qkvb",
                               {"global_pool"}),
    "facebook/dinov3-vitl16": (
        {"model_type": "dinov3_vit", "num_register_tokens": 4, "hidden_size": 1024, "intermediate_size": 4096,
         "num_attention_heads": 16, "num_hidden_layers": 24}, "vit_large_patch16_dinov3_qkvb", {"global_pool"}),
    "google/vit-base-patch16-224": ({"model_type": "vit"}, "vit_base_patch16_224", {"norm_layer"}),
    "google/siglip, its image tower": ({"model_type": "siglip_vision_model"}, "vit_base_patch16_siglip_224",
                                       {"act_layer"}),
}  # fmt: skip


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_models_are_timms_names(case: str) -> None:
    """So they have one identity, whichever project's file they come from."""
    fields, name, differing = PUBLISHED[case]
    found, arguments = timm_model(fields)
    assert (found, set(arguments)) == (name, differing)


@pytest.mark.parametrize(
    "bad",
    [{"hidden_size": 33}, {"hidden_size": 10**9}, {"num_hidden_layers": "a"}, {"num_hidden_layers": 0},
     {"hidden_act": "relu"}, {"num_channels": 1}, {"image_size": "x"}, {"patch_size": 0}, {"patch_size": [1, 2, 3]},
     {"layer_norm_eps": None, "mlp_ratio": "a"}, {"mlp_ratio": 1e300}, {"model_type": "swin"},
     {"model_type": "siglip2"}, {"model_type": "dinov3_vit", "key_bias": True},
     {"model_type": "dinov3_vit", "use_gated_mlp": True}, {"model_type": "dinov3_vit", "mlp_bias": False},
     {"model_type": "siglip", "vision_config": 3}, {"model_type": "siglip", "text_config": {"hidden_act": "relu"}},
     {"model_type": "siglip_vision_model", "vision_use_head": False}, {"num_attention_heads": 0},
     {"model_type": "dinov2_with_registers", "num_register_tokens": -1}],
    ids=str,
)  # fmt: skip
def test_a_config_that_timm_cannot_build_is_one_line(bad: dict[str, Any], tmp_path: Path) -> None:
    config = {"model_type": "dinov2", "patch_size": 14, **SHAPE, **bad}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        load_clip(str(tmp_path), "random:0")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
