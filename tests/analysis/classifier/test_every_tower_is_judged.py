"""Towers without a text tower are judged by their own classifier where it knows the classes, else by a probe; and what
is done to patches is seen where a head reads them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo

from actcache import ActivationStore, SettingsError, extract
from analysis import (
    DeletionConfig,
    Fidelity,
    MaskingConfig,
    ModelOptions,
    SteerabilityConfig,
    StudyConfig,
    analyze,
    delete_latents,
    evaluate_fidelity,
    mask_latents,
    measure_steerability,
    name_latents,
)
from saetrain import SAEConfig, TrainConfig, encode, train

CPU = ModelOptions(device="cpu")
SEEN = StudyConfig(on_seen="use")
LABELS = ("tench", "goldfish", "hammerhead")
"""Words of three of ImageNet's 1,000 classes: numbers 0, 1 and 4."""
TOWERS = {"test_vit": "cls", "test_vit2": "registers, mean of patches", "test_vit3": "registers, map"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, make_images: Callable[..., Path]) -> Path:
    folder = make_images(tmp_path_factory.mktemp("named") / "images", 60)
    for number, name in enumerate(LABELS):
        (folder / f"class{number}").rename(folder / name)
    return folder


def save_model(name: str, path: Path) -> Any:
    """timm's own model with random weights, for pictures of 32 pixels; classifier and LayerScale matter, too."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = timm.create_model(name, img_size=32).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    torch.save(model.state_dict(), path)
    return model


@pytest.fixture(scope="module", params=TOWERS)
def tower(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, images: Path) -> dict[str, Any]:
    """A tower of timm with a classifier for ImageNet's classes, its store, and a run on its last block."""
    folder, name = tmp_path_factory.mktemp("tower"), request.param
    layer = len(save_model(name, folder / "w.pth").blocks) - 1
    options = {"precision": "float32", "dtype": "float32", "image_size": "32"}
    extract(
        images, folder / "x.acts", model=f"timm:{name}", pretrained=str(folder / "w.pth"), layers=[layer], **options
    )  # type: ignore[arg-type]
    config = TrainConfig(n_steps=30, batch_size=64)
    run = train(folder / "x.acts", folder / "run", sae=SAEConfig(n_latents=32, k=4), config=config)
    return {"name": name, "store": folder / "x.acts", "run": run.path, "folder": folder}


def test_the_checkpoints_own_classes_judge_where_they_are_those_of_the_images(tower: dict[str, Any]) -> None:
    found = evaluate_fidelity(tower["run"], tower["store"], study=SEEN, model=CPU)
    assert found.judge is not None
    assert (found.judge.kind, found.judge.loss) == ("head", "softmax")
    assert found.classes == tuple(sorted(LABELS))
    assert found.runs[0].variants["sae+error"].same_prediction == 1
    asked = StudyConfig(on_seen="use", judge="head")
    assert evaluate_fidelity(tower["run"], tower["store"], study=asked, model=CPU).runs == found.runs


def test_a_probe_judges_every_tower(tower: dict[str, Any]) -> None:
    found = evaluate_fidelity(tower["run"], tower["store"], study=StudyConfig(judge="probe", on_seen="use"), model=CPU)
    assert found.judge is not None
    assert found.judge.probe is not None
    has_cls = "cls" in ActivationStore.open(tower["store"]).layout.prefix
    assert found.judge.probe.features == ("cls+patch" if has_cls else "patch")
    assert found.runs[0].variants["original"].accuracy > 0.9  # each class has a color of its own
    if not has_cls:
        cls = StudyConfig(judge="probe", probe_features="cls")
        with pytest.raises(SettingsError, match="no CLS token"):
            evaluate_fidelity(tower["run"], tower["store"], study=cls, model=CPU)


@pytest.mark.parametrize("judge", ["head", "probe"])
def test_patches_alone_matter_where_they_are_read(tower: dict[str, Any], judge: str) -> None:
    config = StudyConfig(judge=judge, on_seen="use", tokens="patch")
    variants = evaluate_fidelity(tower["run"], tower["store"], study=config, model=CPU).runs[0].variants
    reads_patches = judge == "probe" or tower["name"] != "test_vit"  # whose head takes CLS, after the last block
    for name in ("sae", "zero", "mean"):
        assert (variants[name].loss != variants["original"].loss) == reads_patches


def test_the_other_studies_take_them_too(tower: dict[str, Any]) -> None:
    how: dict[str, Any] = {"study": SEEN, "model": CPU}
    curve = mask_latents(tower["run"], tower["store"], None, MaskingConfig(k=(1,)), **how)
    deleted = delete_latents(tower["run"], tower["store"], None, DeletionConfig(n=(1, 4)), **how)
    steered = measure_steerability(tower["run"], tower["store"], None, SteerabilityConfig(n_latents=2), **how)
    assert {result.judge.kind for result in (curve, deleted, steered) if result.judge} == {"head"}
    assert steered.n_words == len(LABELS)
    text = StudyConfig(judge="zero-shot", on_seen="use")
    with pytest.raises(SettingsError, match="no text tower"):
        evaluate_fidelity(tower["run"], tower["store"], study=text, model=CPU)


def test_words_come_from_a_clip_of_the_same_images(
    tower: dict[str, Any], images: Path, tiny_model: dict[str, str]
) -> None:
    codes = encode(tower["run"], tower["store"], tower["folder"] / "x.codes")
    concepts = analyze(codes, tower["folder"] / "x.concepts")
    with pytest.raises(SettingsError, match="no text tower"):
        name_latents(concepts, device="cpu")
    extract(images, tower["folder"] / "clip.acts", **tiny_model, layers=[2])  # type: ignore[arg-type]
    assert name_latents(concepts, with_=tower["folder"] / "clip.acts", device="cpu").num_rows


def test_the_heads_answers_are_those_of_timms_own_model(tmp_path: Path, images: Path) -> None:
    model = save_model("test_vit2", tmp_path / "w.pth")
    extract(
        images, tmp_path / "x.acts", model="timm:test_vit2", pretrained=str(tmp_path / "w.pth"), layers=[3],
        precision="float32", dtype="float32", image_size="32",
    )  # fmt: skip
    store = ActivationStore.open(tmp_path / "x.acts")
    config = TrainConfig(n_steps=20, batch_size=64)
    run = train(store.path, tmp_path / "run", sae=SAEConfig(n_latents=32, k=4), config=config)
    found = evaluate_fidelity(run, store.path, tmp_path / "f.json", study=SEEN, model=CPU)
    from actcache.prompts import open_towers

    transform = open_towers(store.artifact, device="cpu").vision.transform
    table = store.images.to_pylist()
    pixels = torch.stack([transform(Image.open(images / row["uri"]).convert("RGB")) for row in table])
    synsets = ImageNetInfo().label_names()
    columns = [synsets.index(s) for s in ("n01443537", "n01494475", "n01440764")]  # goldfish, hammerhead, tench
    with torch.no_grad():
        logits = np.asarray(model(pixels)[:, columns].double())
    truth = np.array([sorted(LABELS).index(row["label_name"]) for row in table])
    loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(truth)), truth]
    original = found.runs[0].variants["original"]
    assert original.loss == pytest.approx(loss.mean(), rel=1e-4)
    assert original.accuracy == pytest.approx((logits.argmax(1) == truth).mean())
    assert Fidelity.from_json(json.loads((tmp_path / "f.json").read_text()), "f") == found
