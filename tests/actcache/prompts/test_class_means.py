"""VPT of a tower without texts: its classes are the mean features of their shots, checked against numpy and timm."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from plain_clip import checkpoint_tensors
from timm_folders import SIDE, model_of, write_tower

from actcache import Adaptation, ModelError, PromptConfig, adapt
from actcache.models import load_clip
from actcache.prompts import open_prompts, recorded_shots

TOWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "average": ("vit_small_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "map": ("vit_base_patch16_siglip_224", {}),
    "rope": ("vit_small_patch16_dinov3", {}),
}
QUICK: dict[str, Any] = {
    "method": "vpt", "shots": 4, "n_epochs": 12, "batch_size": 4, "n_prompts": 2, "depth": 2, "lr": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, make_images: Callable[..., Path]) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "shots", 40, n_classes=4, size=SIDE)


@torch.no_grad()
def read_features(model: Any, files: list[Path], prompts: tuple[torch.Tensor, ...]) -> NDArray[np.float64]:
    """[N, E]: what timm's model pools, without looking at the prompts behind the patches."""
    pixels = [np.asarray(Image.open(file), np.float32) for file in files]
    x = (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    x = model.patch_drop(model._pos_embed(model.patch_embed(x)))
    n = x.shape[1]
    x = model.norm_pre(torch.cat([x, *(value.expand(len(x), -1, -1) for value in prompts[:1])], 1))
    for number, block in enumerate(model.blocks):
        if 0 < number < len(prompts):
            x[:, n:] = prompts[number]
        x = block(x)
    return np.asarray(model.forward_head(model.norm(x[:, :n]), pre_logits=True).double().numpy())


@pytest.mark.parametrize("name", TOWERS)
def test_prompts_move_features_towards_the_means_of_the_shots(
    name: str, images: Path, tmp_path: Path, make_images: Callable[..., Path]
) -> None:
    model = write_tower(tmp_path / "model", *TOWERS[name])
    test = make_images(tmp_path / "test", 40, n_classes=4, size=SIDE, seed=0)
    made = adapt(images, tmp_path / "x.prompts", model=model_of(tmp_path), config=PromptConfig(**QUICK), test=test,
                 precision="float32")  # fmt: skip
    assert made.judge == Adaptation.open(made.artifact.path).judge == "class means"
    assert np.mean(made.loss[-6:]) < np.mean(made.loss[:6])
    prompts = open_prompts(made.artifact.path, load_clip(model_of(tmp_path)))
    assert (prompts.method, prompts.n_vision, len(prompts.vision)) == ("vpt", 2, 2)
    if name == "rope":  # whose blocks do not take prompts behind the patches by themselves
        return
    recorded = recorded_shots(made.artifact.path)
    assert recorded is not None
    shots = [images / uri for uri in recorded.uri]
    plain = read_features(model, shots, ())
    center, labels = plain.mean(0), np.array([file.parent.name for file in shots])
    unit = (plain - center) / np.linalg.norm(plain - center, axis=1, keepdims=True)
    classes = sorted(set(labels))
    means = np.stack([unit[labels == each].mean(0) for each in classes])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    files = sorted(test.rglob("*.png"))
    for given, accuracy in (((), made.accuracy.zero_shot), (prompts.vision, made.accuracy.adapted)):
        features = read_features(model, files, given) - center
        nearest = (features / np.linalg.norm(features, axis=1, keepdims=True) @ means.T).argmax(1)
        right = np.array([classes[k] == file.parent.name for k, file in zip(nearest, files, strict=True)])
        assert accuracy.all == pytest.approx(right.mean())
        assert accuracy.base is not None
        assert accuracy.novel is not None


def test_classes_without_shots_are_not_judged(images: Path, tmp_path: Path) -> None:
    write_tower(tmp_path / "model", *TOWERS["average"])
    config = PromptConfig(**QUICK | {"n_epochs": 1}, classes="base")
    made = adapt(images, tmp_path / "x.prompts", model=model_of(tmp_path), config=config)
    for accuracy in (made.accuracy.zero_shot, made.accuracy.adapted):
        assert (accuracy.all, accuracy.novel, accuracy.harmonic) == (None, None, None)
        assert accuracy.base is not None


@pytest.mark.parametrize(
    ("tower", "method", "words"),
    [
        ("vit_small_patch16_224", "coop", r"cannot be adapted by coop: it has no text tower.*Use --method vpt"),
        ("vit_small_patch16_224", "maple", r"cannot be adapted by maple: it has no text tower"),
        ("beitv2_base_patch16_224", "vpt", r"cannot be adapted by vpt: it adds a bias for every pair .*positions"),
        ("vit_relpos_base_patch16_224", "vpt", r"cannot be adapted by vpt: it adds a bias for every pair"),
    ],
)
def test_a_method_that_does_not_suit_is_refused_before_anything_is_written(
    tower: str, method: str, words: str, images: Path, tmp_path: Path
) -> None:
    write_tower(tmp_path / "model", tower, {})
    with pytest.raises(ModelError, match=words):
        adapt(images, tmp_path / "x.prompts", model=model_of(tmp_path), config=PromptConfig(method=method, shots=4))
    assert not (tmp_path / "x.prompts").exists()


def test_prompts_of_texts_are_refused_for_a_model_without_texts(tmp_path: Path) -> None:
    write_tower(tmp_path / "model", *TOWERS["average"])
    torch.save({"state_dict": checkpoint_tensors("coop", width=32, text=16, embed=16, n=2, depth=1)}, tmp_path / "a")
    with pytest.raises(ModelError, match=r"coop prompts, which go into texts, but .* has no text tower"):
        open_prompts(tmp_path / "a", load_clip(model_of(tmp_path)))
