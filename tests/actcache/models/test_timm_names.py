"""A timm model is named, built at a size, and identified; what cannot be built is refused before memory is taken."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small_models import SMALL, make, pixels, write_folder

from actcache import ModelError, SettingsError, extract
from actcache.models import load_clip, make_text_tower, make_vision_tower
from actcache.models.building import build_timm
from actcache.models.timm_names import find_name
from actcache.store.provenance import find_origin

ROOT = Path(__file__).parents[3]
REG = "vit_base_patch14_reg4_dinov2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DINOv2 with registers, as timm pushes it to the hub."""
    module = make(REG, img_size=28)
    return write_folder(tmp_path_factory.mktemp("models") / "reg", REG, module, size=28, img_size=28)


@torch.no_grad()
def test_a_folder_is_a_model_by_both_ways_to_name_it(folder: Path) -> None:
    clip, other = load_clip(f"local-dir:{folder}"), load_clip(f"timm:local-dir:{folder}")
    assert clip.model_id == other.model_id
    assert (clip.library, clip.has_text, clip.classes, clip.name) == ("timm", False, 0, "reg")
    assert torch.equal(clip.module(pixels(28)), make(REG, img_size=28)(pixels(28)))
    assert clip.preprocess.to_json() == {
        "library": "timm", "size": [28, 28], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
        "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center",
    }  # fmt: skip
    assert clip.facts["preprocess"] == "preprocessing in config.json"
    assert clip.versions["timm"] == timm.__version__
    assert not clip.source.notes


def test_a_folder_with_both_configs_is_open_clips_unless_timm_is_named(folder: Path, tmp_path: Path) -> None:
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map",
                       "timm_proj": "none", "timm_model_args": SMALL | {"img_size": 32}},
        "text_cfg": {"context_length": 8, "vocab_size": 99, "width": 16, "heads": 2, "layers": 1},
        "custom_text": True,
    }  # fmt: skip
    path = write_folder(tmp_path / "both", REG, None, size=28, img_size=28)
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash", "size": 32}
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    assert load_clip(f"local-dir:{path}", "random:0").library == "open_clip"
    assert load_clip(f"timm:local-dir:{path}", "random:0").library == "timm"


def test_names_tags_and_what_is_near(tmp_path: Path) -> None:
    for model, pretrained, message in (
        ("timm:vit_smal_patch14_dinov2", "random:0", "Near: vit_small_patch14_dinov2"),
        ("timm:vit_small_patch14_dinov2", None, "needs weights: .*lvd142m"),
        ("timm:vit_small_patch14_dinov2.nothing", "random:0", "no tag 'nothing'.*lvd142m"),
        ("timm:vit_small_patch14_dinov2", "lvd142", "Near: lvd142m.*random:SEED"),
        ("timm:", "random:0", "no model"),
        ("vit_small_patch14_dinov2", "random:0", "write timm: before it"),
        ("timm:local-dir:nowhere", None, "no folder"),
        (f"timm:local-dir:{tmp_path}", None, "no config.json of timm"),
    ):
        with pytest.raises(ModelError, match=message) as caught:
            load_clip(model, pretrained)
        assert "\n" not in str(caught.value)


def test_a_tag_and_another_one_contradict_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="could not be downloaded"):
        load_clip("timm:vit_base_patch16_224.mae")
    with pytest.raises(ModelError, match="could not be downloaded"):
        load_clip("timm:vit_base_patch16_224", "dino")


@pytest.mark.parametrize(
    "bad",
    [{"depth": 10**9}, {"embed_dim": 10**12}, {"pretrained": True}, {"checkpoint_path": "x"}, {"nonsense": 1},
     {"num_heads": 3}, {"depth": -1, "embed_dim": 0}, {"in_chans": 1}, {"features_only": True},
     {"img_size": [28, 28, 28]}, {"embed_dim": float("nan")}, [1]],
    ids=str,
)  # fmt: skip
def test_arguments_out_of_bounds_are_one_line(tmp_path: Path, bad: Any) -> None:
    path = write_folder(tmp_path / "bad", REG, None, size=28, img_size=28)
    config = json.loads((path / "config.json").read_text())
    config["model_args"] = config["model_args"] | bad if isinstance(bad, dict) else bad
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        load_clip(str(path), "random:0")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


HUGE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
from actcache import ModelError
from actcache.models import architecture, load_clip
architecture._memory_bytes = lambda: 8 << 30
try:
    load_clip("timm:vit_5b_patch16_sapiens2", "random:0")
except ModelError as error:
    print(error)
"""


def test_a_model_that_does_not_fit_is_counted_before_memory_is_taken() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HUGE], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.count("\n") == 1
    assert "vit_5b_patch16_sapiens2 describes a model of 2" in done.stdout
    assert "this machine has 9 GB" in done.stdout


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_the_environment_does_not_change_what_is_built(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_clip(f"timm:{name}", "random:0")
    monkeypatch.setenv("TIMM_USE_NAFLEX", "1")
    monkeypatch.setattr(timm.models.vision_transformer, "_USE_NAFLEX_DEFAULT", True)
    assert type(timm.create_model(name)).__name__ == "NaFlexVit"  # what would happen
    after = load_clip(f"timm:{name}", "random:0")
    assert type(after.module) is type(before.module)
    assert after.model_id == before.model_id
    assert os.environ["TIMM_USE_NAFLEX"] == "1"
    assert timm.models.vision_transformer._USE_NAFLEX_DEFAULT


@pytest.mark.parametrize(
    "change",
    [{"act_layer": "gelu_tanh"}, {"global_pool": "avg", "fc_norm": False}, {"num_heads": 4}, {"patch_size": 7},
     {"dynamic_img_size": True}],
    ids=str,
)  # fmt: skip
def test_arguments_that_change_values_are_part_of_the_identity(
    folder: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Also where the tensors are the same: the kind of GELU, the heads, the pooling."""
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    if "patch_size" in change:
        other = load_clip(str(tmp_path), "random:0")
        assert other.model_id != load_clip(str(folder), "random:0").model_id
        return
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors")
    assert load_clip(str(tmp_path)).model_id != load_clip(str(folder)).model_id


def test_what_changes_no_value_is_no_part_of_the_identity(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] |= {"drop_path_rate": 0.1, "act_layer": None}
    config["pretrained_cfg"] |= {"license": "mit", "url": "https://example.org"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_clip(str(tmp_path), str(folder / "model.safetensors")).model_id == load_clip(str(folder)).model_id


def test_one_model_has_one_id_however_its_weights_are_named(folder: Path, tmp_path: Path) -> None:
    torch.save({"model": load_file(folder / "model.safetensors")}, tmp_path / "weights.pth")
    ids = {load_clip(str(folder), weights).model_id
           for weights in (None, str(folder), f"local-dir:{folder}", f"timm:local-dir:{folder}",
                           str(folder / "model.safetensors"), str(tmp_path / "weights.pth"))}  # fmt: skip
    assert len(ids) == 1


def test_the_classifier_of_a_file_is_kept_and_counted(folder: Path, tmp_path: Path) -> None:
    module = make(REG, n_classes=7, img_size=28)
    save_file(module.state_dict(), tmp_path / "classifier.safetensors")
    clip = load_clip(str(folder), str(tmp_path / "classifier.safetensors"))
    assert clip.classes == 7
    with torch.no_grad():
        assert torch.equal(clip.module(pixels(28)), module(pixels(28)))
    assert clip.model_id != load_clip(str(folder)).model_id


def test_an_embedding_is_no_classifier(tmp_path: Path) -> None:
    module = make("vit_base_patch16_clip_224", n_classes=24, img_size=32)
    path = write_folder(tmp_path / "clip", "vit_base_patch16_clip_224", module, size=32, n_classes=24, img_size=32)
    assert load_clip(str(path)).module.num_classes == 24
    assert load_clip(str(path)).classes == 0


def test_a_model_without_texts_says_so_in_one_sentence(folder: Path) -> None:
    with pytest.raises(SettingsError, match="reg has no text tower") as caught:
        make_text_tower(load_clip(str(folder)), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "vit_relpos_small_patch16_224",
                                  "deit_tiny_distilled_patch16_224", "vit_small_patch16_dinov3",
                                  "naflexvit_base_patch16_gap", "vit_base_mci_224", "vitamin_small_224"])  # fmt: skip
def test_construction_is_watched_for_every_family(name: str) -> None:
    module, trunk = build_timm(find_name(name), seed=0, meta=True)
    assert trunk.kind == type(module).__name__
    assert callable(trunk.filter)
    assert json.loads(json.dumps(trunk.arguments)) == trunk.arguments
    assert trunk.arguments
    assert all(value.is_meta for value in module.parameters())


@torch.no_grad()
def test_a_loaded_model_is_taken_apart_and_stored(folder: Path, tmp_path: Path, tiny_images: Path) -> None:
    tower = make_vision_tower(load_clip(str(folder), image_size="42x28"), precision="float32", device="cpu")
    assert (tower.prefix, tower.grid, tower.embed_dim) == (("cls", "reg", "reg", "reg", "reg"), (3, 2), 32)
    store = extract(
        tiny_images, tmp_path / "a.acts", model=f"timm:local-dir:{folder}", layers=[1], limit=8, image_size="42x28"
    )
    assert store.model_id == tower.model_id
    assert store.artifact.provenance["timm"] == timm.__version__
    again = load_clip(
        find_origin(store.artifact, "model"), find_origin(store.artifact, "pretrained"),
        preprocess=store.artifact.settings["preprocess"],
    )  # fmt: skip
    assert again.model_id == store.model_id
