"""Every way to name a model takes each fact from one place, says which, and refuses what contradicts it."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from actcache import ActivationStore, ModelError, SettingsError, extract, repair
from actcache.models import load_clip, make_text_tower
from actcache.models.resolver import resolve_model
from actcache.prompts import open_towers

ROOT = Path(__file__).parents[3]
PREPROCESS: dict[str, dict[str, Any]] = {
    "half": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear", "resize_mode": "squash"},
    "imagenet": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "resize_mode": "longest"},
    "plain": {"mean": [0, 0, 0], "std": [1, 1, 1], "size": 24},
}


@pytest.fixture
def folder(tmp_path: Path, tiny_model: dict[str, str]) -> Callable[..., Path]:
    """folder(preprocess_cfg, model_cfg fields): a folder of a model as open_clip pushes it to the hub."""

    def make(preprocess: dict[str, Any] | None = None, **fields: Any) -> Path:
        path = tmp_path / "published"
        path.mkdir()
        config: dict[str, Any] = {"model_cfg": json.loads(Path(tiny_model["model"]).read_text()) | fields}
        config |= {} if preprocess is None else {"preprocess_cfg": preprocess}
        (path / "open_clip_config.json").write_text(json.dumps(config))
        shutil.copy(tiny_model["pretrained"], path / "open_clip_model.safetensors")
        return path

    return make


WAYS: dict[str, Callable[[Path, dict[str, str]], tuple[str, str | None]]] = {
    "local-dir": lambda path, tiny: (f"local-dir:{path}", None),
    "local-dir with its weights": lambda path, tiny: (f"local-dir:{path}", str(path / "open_clip_model.safetensors")),
    "local-dir for both": lambda path, tiny: (f"local-dir:{path}", f"local-dir:{path}"),
    "local-dir with other weights": lambda path, tiny: (f"local-dir:{path}", tiny["pretrained"]),
    "folder": lambda path, tiny: (str(path), None),
    "config": lambda path, tiny: (str(path / "open_clip_config.json"), tiny["pretrained"]),
    "config beside the weights": lambda path, tiny: (tiny["model"], str(path / "open_clip_model.safetensors")),
    "folder of weights": lambda path, tiny: (tiny["model"], str(path)),
}


@pytest.mark.parametrize("kind", PREPROCESS)
@pytest.mark.parametrize("way", WAYS)
def test_the_preprocessing_is_the_configs_however_the_model_is_named(
    folder: Callable[..., Path], tiny_model: dict[str, str], way: str, kind: str
) -> None:
    wanted = PREPROCESS[kind]
    clip = load_clip(*WAYS[way](folder(wanted), tiny_model))
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)  # as large as the tower's input
    normal = (pixels / 255 - np.array(wanted["mean"])) / np.array(wanted["std"])
    got = clip.transform(Image.fromarray(pixels)).numpy().transpose(1, 2, 0)
    np.testing.assert_allclose(got, normal, atol=1e-5)
    assert clip.preprocess.resize_mode == wanted.get("resize_mode", "shortest")
    assert clip.preprocess.interpolation == wanted.get("interpolation", "bicubic")
    assert "open_clip_config.json" in clip.facts["preprocess"]


def test_every_way_gives_one_model_id(folder: Callable[..., Path], tiny_model: dict[str, str]) -> None:
    path = folder(PREPROCESS["half"])
    assert len({load_clip(*name(path, tiny_model)).model_id for name in WAYS.values()}) == 1


def native_names() -> list[str]:
    names = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        plain = "timm_model_name" not in config["vision_cfg"] and isinstance(config["vision_cfg"].get("layers"), int)
        if plain and open_clip.list_pretrained_tags_by_model(name):
            names.append(name)
    return names


def test_a_bare_file_of_weights_says_which_preprocessing_is_assumed(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"not read here")
    keys = ("mean", "std", "interpolation", "resize_mode")
    assumed, refused_names = list[str](), list[str]()
    usual = open_clip.transform.PreprocessCfg()
    for name in native_names():
        tags = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
        known = {tuple(tuple(tag[key]) if key in ("mean", "std") else tag[key] for key in keys) for tag in tags}
        if len(known) > 1:
            with pytest.raises(ModelError, match=f"{name} differ in it.*--preprocess"):
                resolve_model(name, str(tmp_path / "weights.pt"))
            refused_names.append(name)
            continue
        source = resolve_model(name, str(tmp_path / "weights.pt"))
        mine = tuple(getattr(source.preprocess, key) for key in keys)
        assert mine == known.pop(), name
        if source.notes:
            assumed.append(name)
            assert "--preprocess" in source.notes[0]  # how to give another
            assert all(str(value) in source.notes[0] for value in mine[2:])
        else:
            assert mine == tuple(getattr(usual, key) for key in keys)
    assert {"ViT-L-14-CLIPA", "ViT-H-14-378-quickgelu"} <= set(assumed)
    assert "ViT-B-32" not in assumed
    assert "ViT-L-14" in refused_names


def test_a_store_keeps_the_preprocessing_it_was_made_with(
    folder: Callable[..., Path], tmp_path: Path, tiny_images: Path
) -> None:
    """Stores of earlier versions, which took another, still find their model."""
    path = folder(PREPROCESS["half"])
    store = extract(tiny_images, tmp_path / "a.acts", model=f"local-dir:{path}", layers=[0], limit=8)
    assert store.artifact.provenance["model_sources"]["preprocess"] == "preprocessing in open_clip_config.json"
    config = json.loads((path / "open_clip_config.json").read_text())
    (path / "open_clip_config.json").write_text(json.dumps(config | {"preprocess_cfg": PREPROCESS["plain"]}))
    towers = open_towers(store.artifact, device="cpu")
    assert towers.vision.model_id == store.model_id
    assert towers.vision.preprocess.mean == (0.5, 0.5, 0.5)


def test_a_store_and_its_models_folder_may_move_together(
    folder: Callable[..., Path], tmp_path: Path, tiny_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(PREPROCESS["half"])
    monkeypatch.chdir(tmp_path)
    extract(tiny_images, "a.acts", model="local-dir:published", layers=[0], limit=8)
    (tmp_path / "elsewhere").mkdir()
    for name in ("published", "a.acts"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    monkeypatch.chdir("/")
    store = ActivationStore.open(tmp_path / "elsewhere" / "a.acts")
    assert "/" not in store.artifact.provenance["paths"]["model"].removeprefix("local-dir:../")
    assert open_towers(store.artifact, device="cpu").vision.model_id == store.model_id


# ---------------------------------------------------------------------------------------------------------------------
# Contradictions


def refused(message: str, model: str, pretrained: str | None = None) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_clip(model, pretrained)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("context", [32, 16, 78])
def test_another_context_than_the_weights_is_refused(tmp_path: Path, tiny_model: dict[str, str], context: int) -> None:
    config = json.loads(Path(tiny_model["model"]).read_text())
    config["text_cfg"]["context_length"] = context
    (tmp_path / "short.json").write_text(json.dumps(config))
    refused(f"77 tokens.*context_length of {context}", str(tmp_path / "short.json"), tiny_model["pretrained"])


@pytest.mark.parametrize("size", [48, 32, [24, 48]])
def test_another_grid_than_the_weights_is_said_and_recorded(
    tmp_path: Path, tiny_model: dict[str, str], tiny_images: Path, caplog: pytest.LogCaptureFixture, size: Any
) -> None:
    config = json.loads(Path(tiny_model["model"]).read_text())
    config["vision_cfg"]["image_size"] = size
    (tmp_path / "large.json").write_text(json.dumps(config))
    model = {"model": str(tmp_path / "large.json"), "pretrained": tiny_model["pretrained"]}
    with caplog.at_level(logging.WARNING):
        store = extract(tiny_images, tmp_path / "a.acts", **model, layers=[0], limit=4)
    rows, columns = store.layout.grid
    for text in (caplog.text, store.artifact.provenance["model_sources"]["notes"]):
        assert "3 x 3 patches" in text
        assert f"interpolated to the {rows} x {columns}" in text


@pytest.mark.parametrize(
    ("fields", "what"),
    [({"quick_gelu": True}, "quick_gelu"), ({"vision_cfg": {"image_size": 48}}, "image_size"),
     ({"text_cfg": {"context_length": 32}}, "context_length")],
)  # fmt: skip
def test_a_config_beside_the_weights_contradicts_another_one(
    folder: Callable[..., Path], tiny_model: dict[str, str], fields: dict[str, Any], what: str
) -> None:
    plain = json.loads(Path(tiny_model["model"]).read_text())
    merged = {key: plain[key] | value if isinstance(value, dict) else value for key, value in fields.items()}
    path = folder(None, **merged)
    refused(f"beside open_clip_model.safetensors says {what}", tiny_model["model"], str(path))


def test_a_size_that_is_not_the_towers_is_refused(folder: Callable[..., Path]) -> None:
    path = folder({"size": 48})
    refused("48.*image_size is 24 x 24", str(path))
    config = json.loads((path / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["size"] = "4\n8"
    (path / "open_clip_config.json").write_text(json.dumps(config))
    refused("size", str(path))


@pytest.mark.parametrize(
    "bad",
    [{"mean": [0.5]}, {"std": [0, 1, 1]}, {"mean": [float("nan")] * 3}, {"resize_mode": "crop"}, {"crop_pct": 0.9},
     {"interpolation": "lanczos"}, {"mode": "L"}, {"fill_color": -1}, {"mean": "0.5"}, [1], {"size": [24]}],
    ids=str,
)  # fmt: skip
def test_preprocessing_that_open_clip_would_misread_is_refused(folder: Callable[..., Path], bad: Any) -> None:
    refused("preprocess", str(folder(bad)))


# ---------------------------------------------------------------------------------------------------------------------
# What is not there


def test_what_is_not_there_is_one_line(tmp_path: Path, tiny_model: dict[str, str], folder: Callable[..., Path]) -> None:
    (tmp_path / "empty").mkdir()
    for model in ("local-dir:nowhere", f"local-dir:{tmp_path / 'none'}", f"local-dir:{tmp_path / 'empty'}",
                  "local-dir:", str(tmp_path / "empty"), "hf-hub:", "hf-hub:a/b/c/d"):  # fmt: skip
        refused("folder|repository|hub|neither", model, "random:0")
    path = folder()
    (path / "open_clip_model.safetensors").unlink()
    refused("should hold one file of weights, found none", str(path))
    for name in ("one.pt", "two.pt"):
        shutil.copy(tiny_model["pretrained"], path / name)
    refused(r"found one\.pt, two\.pt", str(path))
    refused("needs weights", "ViT-B-32")
    refused("no folder", tiny_model["model"], "local-dir:nowhere")


OFFLINE = """
import sys, time
from actcache import PipelineError
from actcache.models import load_clip
clip = load_clip("hf-hub:lab/tiny")
print(clip.model_id, clip.preprocess.mean[0], clip.preprocess.resize_mode)
began = time.monotonic()
for model, pretrained in (("hf-hub:x/y", None), ("hf-hub:x/y", "random:0"), ("ViT-B-32", "laion2b_s34b_b79k"),
                          (sys.argv[1], "hf-hub:x/y")):
    try:
        load_clip(model, pretrained)
        print("loaded")
    except PipelineError as error:
        print(type(error).__name__, error)
print(time.monotonic() - began)
"""


@pytest.mark.parametrize("way", ["HF_HUB_OFFLINE", "closed port"])
def test_without_a_network_the_cache_is_used_and_the_rest_is_one_line_at_once(
    folder: Callable[..., Path], tmp_path: Path, tiny_model: dict[str, str], way: str
) -> None:
    path = folder(PREPROCESS["half"])
    snapshot = tmp_path / "hub" / "models--lab--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(path, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "HOME": str(tmp_path)}
    environment |= {"HF_HUB_OFFLINE": "1"} if way == "HF_HUB_OFFLINE" else {"HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", OFFLINE, tiny_model["model"]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    cached, *lines, seconds = done.stdout.splitlines()
    assert cached.split() == [load_clip(str(path)).model_id, "0.5", "squash"]
    assert len(lines) == 4
    assert all(line.startswith("ModelError") and "hub" in line for line in lines)
    assert float(seconds) < 10


@pytest.mark.parametrize("where", ["config", "folder"])
def test_a_tokenizer_that_cannot_be_had_is_one_line(
    folder: Callable[..., Path], tiny_model: dict[str, str], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = json.loads(Path(tiny_model["model"]).read_text())["text_cfg"]
    path = folder(None, text_cfg=text | {"hf_tokenizer_name": "lab/absent"})
    if where == "folder":
        (path / "tokenizer.json").write_text("{}")
    model = str(path / "open_clip_config.json") if where == "config" else str(path)
    clip = load_clip(model, tiny_model["pretrained"])
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(SettingsError, match=r"tokenizer of .* could not be loaded") as caught:
        make_text_tower(clip, device="cpu")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 15


def test_weights_of_another_shape_still_fit_their_own_config(tmp_path: Path, tiny_model: dict[str, str]) -> None:
    weights = load_file(tiny_model["pretrained"])
    weights["visual.positional_embedding"] = torch.zeros(8, 32)  # 7 patches are no grid
    save_file(weights, tmp_path / "odd.safetensors")
    refused(
        r"shapes differ: visual\.positional_embedding \[8, 32\]", tiny_model["model"], str(tmp_path / "odd.safetensors")
    )


def test_a_store_keeps_the_size_of_its_images(tiny_model: dict[str, str], tmp_path: Path, tiny_images: Path) -> None:
    """It is recorded once, with the preprocessing, so no verb that opens the store has to be told."""
    store = extract(tiny_images, tmp_path / "a.acts", **tiny_model, layers=[0], limit=8, image_size="48x32")
    assert store.layout.grid == (6, 4)
    towers = open_towers(store.artifact, device="cpu")
    assert towers.vision.model_id == store.model_id
    assert towers.vision.preprocess.size == (48, 32)
    assert store.model_id != load_clip(**tiny_model).model_id
    shard = next((tmp_path / "a.acts" / "activations.zarr").rglob("c/0/0/0"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    assert repair(tmp_path / "a.acts").ok


def test_a_store_keeps_the_preprocessing_that_was_given(
    tiny_model: dict[str, str], tmp_path: Path, tiny_images: Path
) -> None:
    (tmp_path / "steps.json").write_text(json.dumps({"crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.5] * 3}))
    store = extract(
        tiny_images, tmp_path / "a.acts", **tiny_model, layers=[0], limit=8, preprocess=tmp_path / "steps.json"
    )
    (tmp_path / "steps.json").unlink()
    towers = open_towers(store.artifact, device="cpu")
    assert towers.vision.model_id == store.model_id
    assert (towers.vision.preprocess.library, towers.vision.preprocess.scale) == ("timm", (26, 26))
