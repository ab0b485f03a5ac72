"""adapt learns from a few images, resumes bit for bit after SIGKILL, and measures what independent code measures."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actcache import Adaptation, IncompleteError, ParentMismatchError, PromptConfig, SettingsError, adapt, verify
from actcache.models import load_clip, make_text_tower, make_vision_tower
from actcache.prompts import class_words, open_prompts
from actcache.prompts.few_shot import choose_shots, split_classes
from actcache.prompts.training import crop_and_flip, learning_rate
from actcache.sources import decode_image

ROOT = Path(__file__).parents[3]
QUICK: dict[str, Any] = {"shots": 4, "n_epochs": 3, "batch_size": 4, "n_prompts": 2}


@given(st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=9))
def test_base_is_the_first_half_of_the_sorted_names(names: list[str]) -> None:
    split = split_classes([*names, ""], "x")
    assert [*split.base, *split.novel] == sorted(set(names))
    assert len(split.base) - len(split.novel) in (0, 1)


@given(st.integers(0, 99), st.permutations(range(30)))
def test_shots_depend_on_names_and_seed_only(seed: int, order: list[int]) -> None:
    uris, labels = [f"{i:02d}.png" for i in range(30)], [f"c{i % 3}" for i in range(30)]
    first = choose_shots(uris, labels, ["c0", "c2"], 4, seed)
    mixed = choose_shots([uris[i] for i in order], [labels[i] for i in order], ["c0", "c2"], 4, seed)
    assert [uris[i] for i in first] == [uris[order[i]] for i in mixed]
    assert [labels[i] for i in first] == ["c0"] * 4 + ["c2"] * 4
    assert len(set(first.tolist())) == 8


def test_usual_settings_are_the_published_ones() -> None:
    found = {m: PromptConfig(method=m).resolve(12) for m in ("coop", "cocoop", "vpt", "ivlp", "maple")}
    usual = {m: (c.n_prompts, c.depth, c.n_epochs, c.batch_size, c.lr) for m, c in found.items()}
    assert usual == {
        "coop": (16, 1, 200, 32, 0.002), "cocoop": (4, 1, 10, 1, 0.002), "vpt": (8, 12, 5, 4, 0.0025),
        "ivlp": (2, 12, 5, 4, 0.0035), "maple": (2, 9, 5, 4, 0.0035),
    }  # fmt: skip
    assert PromptConfig(method="maple").resolve(6).depth == 6
    rates = [learning_rate(found["maple"], epoch) for epoch in range(5)]
    assert rates[0] == 1e-5
    np.testing.assert_allclose(rates[1:], [0.0035 * (1 + np.cos(np.pi * e / 5)) / 2 for e in range(1, 5)])
    assert class_words("n02951585_can_opener") == "can opener"


def test_a_crop_lies_inside_its_image() -> None:
    ramp = torch.arange(24.0).expand(64, 3, 24, 24) / 23  # value = column
    found = crop_and_flip(ramp, np.random.Generator(np.random.Philox(0)))
    assert found.shape == ramp.shape
    assert found.min() >= 0
    assert found.max() <= 1
    slope = found[:, 0, 12].diff(dim=1).mean(1)
    assert 10 < int((slope < 0).sum()) < 54  # some mirrored, some not
    assert slope.abs().max() <= 1 / 23 + 1e-6  # never shrunk
    again = crop_and_flip(ramp, np.random.Generator(np.random.Philox(0)))
    assert torch.equal(found, again)


def test_crops_are_of_the_published_sizes_and_lie_anywhere() -> None:
    """Position of a crop, from the slopes of two ramps and the values in its middle."""
    line = (torch.arange(64.0) + 0.5) / 64
    ramps = torch.stack([line.expand(64, 64), line[:, None].expand(64, 64), torch.zeros(64, 64)])
    found = crop_and_flip(ramps.expand(400, 3, 64, 64), np.random.Generator(np.random.Philox(0)))
    across, down = found[:, 0, 32], found[:, 1, :, 32]
    size = torch.stack([64 * part[:, 24:40].diff(dim=1).mean(1).abs() for part in (across, down)])  # [2, B]
    middle = torch.stack([part[:, 31:33].mean(1) for part in (across, down)])
    area, ratio = size.prod(0), size[0] / size[1]
    assert 0.079 < area.min() < 0.12
    assert 0.9 < area.max() < 1.001
    assert 0.749 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.334
    first, last = middle - size / 2, middle + size / 2
    assert (first > -1e-3).all()
    assert (last < 1 + 1e-3).all()
    assert (first.amin(1) < 0.05).all()
    assert (last.amax(1) > 0.95).all()


@pytest.mark.parametrize("method", ["coop", "cocoop", "vpt", "ivlp", "maple"])
def test_every_method_learns_and_is_measured(
    method: str, tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str], make_images: Callable[..., Path]
) -> None:
    test = make_images(tmp_path / "test", 30, seed=0)
    rates = {"coop": 1.0, "cocoop": 0.3, "vpt": 0.3, "ivlp": 0.3, "maple": 0.1}
    config = PromptConfig(method=method, **QUICK | {"n_epochs": 12, "n_prompts": 4}, lr=rates[method])
    made = adapt(tiny_images, tmp_path / "x.prompts", **tiny_model, config=config, test=test, precision="float32")
    assert verify(made.artifact.path).ok
    assert np.mean(made.loss[-6:]) < np.mean(made.loss[:6])
    clip = load_clip(**tiny_model)
    prompts = open_prompts(made.artifact.path, clip)
    text = make_text_tower(clip, device="cpu")
    files = sorted(test.rglob("*.png"))
    pixels = torch.stack([clip.transform(decode_image(file)) for file in files])
    truth = [int(file.parent.name[-1]) for file in files]
    with torch.no_grad():
        images = make_vision_tower(clip, precision="float32", device="cpu").visual(pixels)
        plain = (images @ text.embed_classes(["class0", "class1", "class2"]).T).argmax(1).tolist()
    assert made.accuracy.zero_shot.all == np.mean([p == t for p, t in zip(plain, truth, strict=True)])
    assert (prompts.method, prompts.n_vision) == (method, 0 if method in ("coop", "cocoop") else 4)
    assert set(made.accuracy.adapted.per_class) == {"class0", "class1", "class2"}
    assert made.accuracy.adapted.novel is None  # one class only
    assert adapt(tiny_images, made.artifact.path, **tiny_model, config=config, test=test, precision="float32") == made


KILLED = """
import sys
from actcache import PromptConfig, adapt
images, out, model, pretrained = sys.argv[1:]
config = PromptConfig(shots=8, n_epochs=8, batch_size=4, n_prompts=2)
adapt(images, out, model=model, pretrained=pretrained, config=config, checkpoint_every=5)
"""


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str]) -> None:
    out = tmp_path / "killed.prompts"
    command = [sys.executable, "-c", KILLED, str(tiny_images), str(out), *tiny_model.values()]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    started = time.monotonic()
    while not (out / "checkpoint.safetensors").exists() and process.poll() is None and time.monotonic() - started < 60:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (out / "checkpoint.safetensors").exists()
    with pytest.raises(IncompleteError):
        Adaptation.open(out)
    config = PromptConfig(shots=8, n_epochs=8, batch_size=4, n_prompts=2)
    steps: list[int] = []
    again = adapt(tiny_images, out, **tiny_model, config=config, on_progress=lambda done, *_: steps.append(done))
    assert steps[0] > 5  # it went on
    whole = adapt(tiny_images, tmp_path / "whole.prompts", **tiny_model, config=config)
    data = [(one.artifact.path / "prompts.safetensors").read_bytes() for one in (whole, again)]
    assert data[0] == data[1]
    assert (whole.accuracy, whole.loss) == (again.accuracy, again.loss)
    assert not (out / "checkpoint.safetensors").exists()


def test_base_and_novel_are_told_apart(
    tmp_path: Path, tiny_model: dict[str, str], make_images: Callable[..., Path]
) -> None:
    images = make_images(tmp_path / "images", 48, n_classes=4)
    base = adapt(images, tmp_path / "base.prompts", **tiny_model, config=PromptConfig(**QUICK, classes="base"))
    assert base.artifact.settings["classes"] == ["class0", "class1"]
    accuracy = base.accuracy.adapted
    b, n = accuracy.base, accuracy.novel
    assert b is not None
    assert n is not None
    assert accuracy.harmonic == pytest.approx(2 * b * n / (b + n) if b + n else 0)
    config = PromptConfig(**QUICK | {"lr": 1.0}, method="coop", classes="novel", class_specific=True)
    tied = adapt(images, tmp_path / "novel.prompts", **tiny_model, config=config)
    assert (tied.accuracy.adapted.all, tied.accuracy.adapted.base) == (None, None)
    assert tied.accuracy.adapted.novel is not None
    assert "harmonic" not in repr(tied)


def test_bad_input_is_told_and_nothing_written(
    tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str], make_images: Callable[..., Path]
) -> None:
    other = make_images(tmp_path / "other", 8, n_classes=4)
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"shots": 99}, {}, "has 25 images, but --shots is 99"),
        ({"shots": 0}, {}, "--shots must be at least 1"),
        ({"classes": "some"}, {}, "all, base, novel"),
        ({"classes": "novel"}, {}, "There are 1 novel classes"),
        ({}, {"test": other}, "different classes: only one of them has class3"),
        ({"shots": 25}, {}, "all labeled images are used as shots"),
        ({"depth": 9}, {}, "the image tower has 3 blocks"),
        ({"template": "a photo"}, {}, "template"),
        ({"method": "coop", "n_prompts": 76}, {}, "may not fit"),
        ({"method": "vpt", "template": "a" + 80 * " photo" + " {}"}, {}, "longer than the context of 77 tokens"),
    ]
    for fields, options, words in cases:
        with pytest.raises(SettingsError, match=words):
            adapt(tiny_images, tmp_path / "x.prompts", **tiny_model, config=PromptConfig(**QUICK | fields), **options)
        assert not (tmp_path / "x.prompts").exists(), words
    for fields in ({"method": "lora"}, {"class_specific": True}, {"method": "coop", "augment": True}, {"lr": 0.0},
                   {"n_prompts": 0}, {"seed": -1}, {"method": "cocoop", "depth": 2}):  # fmt: skip
        with pytest.raises(SettingsError):
            PromptConfig(**fields)  # type: ignore[arg-type]
    made = adapt(tiny_images, tmp_path / "x.prompts", **tiny_model, config=PromptConfig(**QUICK))
    with pytest.raises(SettingsError, match=r"config.shots: 4 there, 5 asked for"):
        adapt(tiny_images, tmp_path / "x.prompts", **tiny_model, config=PromptConfig(**QUICK | {"shots": 5}))
    with pytest.raises(ParentMismatchError, match="adapts model"):
        open_prompts(shutil.copytree(made.artifact.path, tmp_path / "y"), load_clip(tiny_model["model"], "random:3"))
