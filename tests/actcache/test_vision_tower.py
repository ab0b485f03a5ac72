"""The tower taken apart computes what open_clip computes; weights and architectures that do not fit are refused."""

import json
import pickle
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from actcache import ModelError, SettingsError, VisionTower, choose_device, load_vision_tower
from actcache.vision_tower import check_quick_gelu


@pytest.fixture(scope="module")
def tower(tiny_model: dict[str, str]) -> VisionTower:
    return load_vision_tower(**tiny_model, precision="float32", device="cpu")


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(5, 3, 24, 24, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_parts_make_the_whole_bit_for_bit(tower: VisionTower, pixels: torch.Tensor) -> None:
    x = tower.embed(pixels)
    assert torch.equal(tower.head(tower.run_blocks(x, 0, 3)), tower.visual(pixels))
    assert torch.equal(tower.run_blocks(tower.run_blocks(x, 0, 2), 2, 3), tower.run_blocks(x, 0, 3))


@torch.no_grad()
def test_every_layer_equals_open_clips_intermediates(tower: VisionTower, pixels: torch.Tensor) -> None:
    out = tower.visual.forward_intermediates(
        pixels, indices=[0, 1, 2], output_fmt="NLC", output_extra_tokens=True, intermediates_only=True
    )
    for layer in range(3):
        expected = torch.cat([out["image_intermediates_prefix"][layer], out["image_intermediates"][layer]], 1)
        assert torch.equal(tower.run_blocks(tower.embed(pixels), 0, layer + 1), expected)


@torch.no_grad()
def test_bfloat16_rounds_the_branches_not_the_stream(
    tower: VisionTower, tiny_model: dict[str, str], pixels: torch.Tensor
) -> None:
    rounded = load_vision_tower(**tiny_model, precision="bfloat16", device="cpu")
    assert rounded.model_id == tower.model_id
    exact, got = tower.run_blocks(tower.embed(pixels), 0, 3), rounded.run_blocks(rounded.embed(pixels), 0, 3)
    assert got.dtype == torch.float32
    assert not torch.equal(got, got.bfloat16().float())
    assert 0 < float((got - exact).norm() / exact.norm()) < 0.02


def test_shapes_are_the_models(tower: VisionTower) -> None:
    assert (tower.n_layers, tower.d_model, tower.grid, tower.patch_size) == (3, 32, (3, 3), (8, 8))
    assert tower.preprocess["size"] == [24, 24]


def test_model_id_names_weights_not_their_file(tmp_path: Path, tiny_model: dict[str, str], tower: VisionTower) -> None:
    weights = load_file(tiny_model["pretrained"])
    torch.save({"state_dict": weights}, tmp_path / "same.pt")
    assert load_vision_tower(tiny_model["model"], str(tmp_path / "same.pt")).model_id == tower.model_id
    weights["visual.ln_post.bias"][3] += 1e-3
    save_file(weights, tmp_path / "other.safetensors")
    assert load_vision_tower(tiny_model["model"], str(tmp_path / "other.safetensors")).model_id != tower.model_id


def test_model_id_is_that_of_the_stored_numbers_whatever_their_type(
    tmp_path: Path, tiny_model: dict[str, str], tower: VisionTower
) -> None:
    halved = {name: value.half() for name, value in load_file(tiny_model["pretrained"]).items()}
    save_file(halved, tmp_path / "half.safetensors")
    save_file({name: value.float() for name, value in halved.items()}, tmp_path / "widened.safetensors")
    torch.save(halved, tmp_path / "half.pt")
    ids = {
        load_vision_tower(tiny_model["model"], str(tmp_path / name)).model_id
        for name in ("half.safetensors", "widened.safetensors", "half.pt")
    }
    assert len(ids) == 1
    assert ids != {tower.model_id}


def test_model_id_names_the_preprocessing(tmp_path: Path, tiny_model: dict[str, str], tower: VisionTower) -> None:
    config = {"model_cfg": json.loads(Path(tiny_model["model"]).read_text()), "preprocess_cfg": {"mean": [0, 0, 0]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    other = load_vision_tower(str(tmp_path / "open_clip_config.json"), tiny_model["pretrained"])
    assert other.preprocess["mean"] == [0, 0, 0]
    assert other.model_id != tower.model_id


def test_random_weights_come_from_their_seed(tiny_model: dict[str, str]) -> None:
    model = tiny_model["model"]
    before = torch.random.get_rng_state()
    assert load_vision_tower(model, "random:3").model_id == load_vision_tower(model, "random:3").model_id
    assert load_vision_tower(model, "random:3").model_id != load_vision_tower(model, "random:4").model_id
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(ModelError, match="random:SEED"):
        load_vision_tower(model, "random:x")


def test_quick_gelu_must_agree() -> None:
    with pytest.raises(ModelError, match=r"trained with QuickGELU.*--model ViT-B-32-quickgelu"):
        load_vision_tower("ViT-B-32", "openai")  # known from the tag alone, before any download
    with pytest.raises(ModelError, match=r"without QuickGELU.*--model ViT-B-32"):
        check_quick_gelu("ViT-B-32-quickgelu", True, "laion2b", False)
    check_quick_gelu("ViT-B-32", False, "laion2b", False)


def test_unknown_names_are_answered_with_near_ones(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"Near: .*ViT-B-16"):
        load_vision_tower("ViT-B16", "openai")
    with pytest.raises(ModelError, match=r"Near: openai.*Tags of ViT-B-16: "):
        load_vision_tower("ViT-B-16", "openia")
    (tmp_path / "bad.json").write_text('{"vision": 1}')
    with pytest.raises(ModelError, match="embed_dim"):
        load_vision_tower(str(tmp_path / "bad.json"), "random:0")
    with pytest.raises(ModelError, match="cannot be read"):
        load_vision_tower(str(tmp_path / "absent.json"), "random:0")


def test_towers_that_are_no_vision_transformer_are_refused() -> None:
    for name in ("RN50", "ViT-B-16-SigLIP"):
        with pytest.raises(ModelError, match="VisionTransformer"):
            load_vision_tower(name, "random:0")


class Evil:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


def test_checkpoints_that_do_not_fit_are_refused(
    tmp_path: Path, tiny_model: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    model, good = tiny_model["model"], Path(tiny_model["pretrained"]).read_bytes()
    (tmp_path / "short.safetensors").write_bytes(good[: len(good) // 2])
    weights = load_file(tiny_model["pretrained"])
    save_file({k: v for k, v in weights.items() if "ln_post" not in k}, tmp_path / "missing.safetensors")
    other = {**weights, "visual.conv1.weight": torch.zeros(48, 3, 8, 8)}
    save_file(other, tmp_path / "wider.safetensors")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"state_dict": Evil()}))
    torch.save({"state_dict": Evil()}, tmp_path / "evil2.pt")
    for name in (
        "short.safetensors",
        "missing.safetensors",
        "wider.safetensors",
        "text.pt",
        "evil.pt",
        "evil2.pt",
    ):
        with pytest.raises(ModelError, match=name.replace(".", r"\.") + " cannot be loaded"):
            load_vision_tower(model, str(tmp_path / name))
    assert "code ran" not in capsys.readouterr().out


def test_devices_and_precisions_that_are_not_here_are_refused(tiny_model: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match="--device"):
        choose_device("cuda:99" if torch.cuda.is_available() else "cuda")
    with pytest.raises(SettingsError, match="--device"):
        choose_device("toaster")
    with pytest.raises(SettingsError, match="--precision"):
        load_vision_tower(**tiny_model, precision="float8")


def test_a_builtin_architecture_is_built_as_open_clip_builds_it() -> None:
    tower = load_vision_tower("ViT-S-32-alt", "random:0", precision="float32")
    assert isinstance(tower.visual, open_clip.transformer.VisionTransformer)
    assert tower.grid == (7, 7)
