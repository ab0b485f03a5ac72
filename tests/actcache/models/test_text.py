"""Text embeddings equal open_clip's, classes average their templates, and both towers of a store can be opened."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from actcache import ActivationStore, ParentMismatchError, SettingsError
from actcache.models import TextTower, load_clip, make_text_tower, make_vision_tower, read_templates
from actcache.models.templates import TEMPLATE_SETS
from actcache.prompts import open_towers

TEMPLATES = ["a photo of a {}.", "a blurry photo of a {}.", "a small {}.", "a picture of the {}.", "{}"]


@pytest.fixture(scope="module")
def tower(tiny_model: dict[str, str]) -> TextTower:
    return make_text_tower(load_clip(**tiny_model), device="cpu")


def test_embeddings_are_open_clips_own(tower: TextTower, tiny_model: dict[str, str]) -> None:
    clip = open_clip.CLIP(**json.loads(Path(tiny_model["model"]).read_text())).eval()
    open_clip.load_checkpoint(clip, tiny_model["pretrained"])
    texts = [f"a photo of {n} dogs" + " and a cat" * (n % 20) for n in range(300)]  # batches of several lengths
    with torch.no_grad():
        wanted = clip.encode_text(open_clip.SimpleTokenizer(context_length=77)(texts), normalize=True)
    torch.testing.assert_close(tower.embed(texts), wanted)
    assert tower.embed([]).shape == (0, 16)
    assert tower.logit_scale == pytest.approx(float(clip.logit_scale.detach().exp()))


def test_what_stands_behind_the_end_of_a_text_is_not_run(tower: TextTower, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    run = TextTower.run
    monkeypatch.setattr(TextTower, "run", lambda self, x, *rest: lengths.append(x.shape[1]) or run(self, x, *rest))
    tower.embed(["dog"] * 256 + ["a photo of a dog"] * 2)
    assert lengths == [3, 7]


def test_a_tower_that_looks_both_ways_gets_all_tokens(tiny_model: dict[str, str]) -> None:
    config = json.loads(Path(tiny_model["model"]).read_text())
    config["text_cfg"] |= {"no_causal_mask": True}
    clip = open_clip.CLIP(**config).eval()
    tower = replace(make_text_tower(load_clip(**tiny_model), device="cpu"), module=clip)
    tokens = open_clip.SimpleTokenizer(context_length=77)(["a dog", "a photo of a dog"])
    with torch.no_grad():
        torch.testing.assert_close(tower.embed(["a dog", "a photo of a dog"]), clip.encode_text(tokens, normalize=True))


def test_a_class_is_the_mean_of_its_templates(tower: TextTower) -> None:
    found = tower.embed_classes(["dog", "cat"], TEMPLATES)
    for name, row in zip(("dog", "cat"), found, strict=True):
        each = torch.stack([tower.embed([template.format(name)])[0] for template in TEMPLATES])
        torch.testing.assert_close(row, F.normalize(each.mean(0), dim=0))


def test_a_text_that_would_be_cut_is_refused(tower: TextTower) -> None:
    tower.embed(["dog " * 75])  # start, 75 words, end: just fits
    with pytest.raises(SettingsError, match="longer than the context of 77 tokens"):
        tower.embed(["dog " * 76])


def test_templates_come_by_name_text_and_file(tmp_path: Path) -> None:
    assert len(read_templates("openai")) == 80
    assert read_templates("a {} here") == ("a {} here",)
    (tmp_path / "templates.txt").write_text("a {}\n\nthe {}\n")
    assert read_templates(str(tmp_path / "templates.txt")) == ("a {}", "the {}")
    assert TEMPLATE_SETS["photo"] == ("a photo of a {}.",)
    for bad in ("photo of a", "{} and {}", "{0}", "a {", []):
        with pytest.raises(SettingsError, match="template"):
            read_templates(bad)


def test_a_store_finds_its_towers(tiny_store: Path, tiny_model: dict[str, str], tmp_path: Path) -> None:
    store = ActivationStore.open(tiny_store)
    towers = open_towers(store.artifact, device="cpu")
    assert towers.vision.model_id == towers.text.model_id == store.model_id
    assert towers.vision.precision == "float32"
    with pytest.raises(ParentMismatchError, match="is not the model of"):
        open_towers(store.artifact, pretrained="random:1")
    moved = tmp_path / "elsewhere" / "deep" / "moved.acts"
    shutil.copytree(tiny_store, moved)
    (moved / "places.json").unlink()  # as on another machine, where no absolute path helps
    artifact = ActivationStore.open(moved).artifact
    with pytest.raises(SettingsError, match=r"no longer exists.*--model"):
        open_towers(artifact)
    assert open_towers(artifact, **tiny_model).text.model_id == store.model_id


def test_zero_shot_accuracy_of_a_trained_clip(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "clip-cifar"
    clip = load_clip(str(folder / "ViT-CIFAR-4.json"), str(folder / "vit_cifar4.safetensors"))
    vision, text = make_vision_tower(clip, precision="float32", device="cpu"), make_text_tower(clip, device="cpu")
    names = sorted(path.name for path in (real_data / "cifar10" / "test").iterdir())
    classes = text.embed_classes(names, TEMPLATES)
    right = []
    for label, name in enumerate(names):
        files = sorted((real_data / "cifar10" / "test" / name).iterdir())
        pixels = torch.stack([clip.transform(Image.open(file)) for file in files])
        with torch.no_grad():
            images = vision.head(vision.run_blocks(vision.embed(pixels), 0, vision.n_layers))
        right.append(float(((images @ classes.T).argmax(1) == label).float().mean()))
    assert np.mean(right) == pytest.approx(0.498, abs=0.003)  # as measured when it was trained
    assert [right[names.index(name)] for name in ("cat", "deer", "dog", "truck")] == [0, 0, 0, 0]
