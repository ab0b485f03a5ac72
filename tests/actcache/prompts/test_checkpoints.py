"""Original checkpoints, built from the documented layout of keys, are read, written back, or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from plain_clip import METHODS, State, checkpoint_tensors, frozen_tensors, plain_logits

from actcache import ModelError, SettingsError, read_prompt_checkpoint, write_prompt_checkpoint
from actcache.models import Clip, load_clip, make_text_tower, make_vision_tower
from actcache.prompts import prompt_vision
from actcache.prompts.towers import classify, embed_images, prompt_text

FULL = {"width": 768, "text": 512, "embed": 512}
TINY = {"width": 32, "text": 16, "embed": 16}
RELEASED = {"coop": (16, 1), "cocoop": (4, 1), "vpt": (8, 12), "ivlp": (2, 12), "maple": (2, 9)}
"""(prompts, depth) of the released files."""


@pytest.fixture(scope="module")
def clip(tiny_model: dict[str, str]) -> Clip:
    return load_clip(**tiny_model)


@pytest.fixture(scope="module")
def full_clip() -> Clip:
    """OpenAI's ViT-B/16 architecture with random weights that float16 represents exactly, as in the original."""
    loaded = load_clip("ViT-B-16-quickgelu", "random:0")
    with torch.no_grad():
        for value in loaded.module.parameters():
            value.copy_(value.half())
    return loaded


def save(path: Path, state: State, **more: Any) -> Path:
    torch.save({"state_dict": {name: value.half() for name, value in state.items()}, "epoch": 5, **more}, path)
    return path


@pytest.mark.parametrize("method", METHODS)
def test_a_released_checkpoint_classifies_as_its_formulas_say(full_clip: Clip, method: str, tmp_path: Path) -> None:
    n, depth = RELEASED[method]
    state = checkpoint_tensors(method, **FULL, n=n, depth=depth)
    base = full_clip.module.state_dict()
    frozen = frozen_tensors(base) if method == "maple" else {}  # 300 MB once are enough
    path = save(tmp_path / "model.pth.tar-5", state | frozen)
    prompts = read_prompt_checkpoint(path, full_clip)
    assert (prompts.method, prompts.n_text, prompts.n_vision) == (
        method, 0 if method == "vpt" else n, 0 if method in ("coop", "cocoop") else n,
    )  # fmt: skip
    assert set(prompts.tensors) == {name for name in state if "token_" not in name}
    names = ["goldfish", "great white shark"]
    keeps = method in ("vpt", "cocoop", "ivlp", "maple")
    texts = [f"{'a photo of a' if keeps else ' '.join(['X'] * n)} {name}." for name in names]
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    rounded = {name: value.half().float() for name, value in state.items()}
    with torch.no_grad():
        wanted = plain_logits(method, rounded, base, full_clip, pixels, texts, depth, head_width=64, quick=True)
        tower = prompt_vision(make_vision_tower(full_clip, precision="float32", device="cpu"), prompts)
        text, images = make_text_tower(full_clip, device="cpu"), embed_images(tower, pixels)
        found = classify(images, prompt_text(text, prompts, names).embed(prompts, images), text.logit_scale)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_writing_back_gives_the_file_that_was_read(clip: Clip, method: str, tmp_path: Path) -> None:
    state = checkpoint_tensors(method, **TINY, n=2, depth=1 if method in ("coop", "cocoop", "ivlp") else 3)
    whole = method not in ("coop", "cocoop")
    path = save(tmp_path / "model.pth.tar-5", state | (frozen_tensors(clip.module.state_dict()) if whole else {}))
    prompts = read_prompt_checkpoint(path, clip, template="a picture of the {}.")
    assert prompts.template == "a picture of the {}."
    written = write_prompt_checkpoint(prompts, tmp_path / "out", clip, epoch=5)
    folder = {"maple": "MultiModalPromptLearner", "ivlp": "VLPromptLearner"}.get(method, "prompt_learner")
    assert written == tmp_path / "out" / folder / "model.pth.tar-5"
    before, after = (torch.load(file, weights_only=True) for file in (path, written))
    assert after["epoch"] == 5
    assert set(after["state_dict"]) == {name for name in before["state_dict"] if "token_" not in name}
    for name, value in after["state_dict"].items():
        assert torch.equal(value, before["state_dict"][name]), name
    assert read_prompt_checkpoint(written, clip).description["hash"] == prompts.description["hash"]
    with pytest.raises(SettingsError, match="already exists"):
        write_prompt_checkpoint(prompts, tmp_path / "out", clip, epoch=5)


def test_prompts_of_text_blocks_and_of_language_alone(tmp_path: Path, full_clip: Clip) -> None:
    state = checkpoint_tensors("ivlp", **FULL, n=4, depth=12)
    language = {name: value for name, value in state.items() if not name.startswith("image_encoder.")}
    prompts = read_prompt_checkpoint(save(tmp_path / "model.pth.tar-5", language), full_clip)
    assert (prompts.method, len(prompts.text), prompts.vision) == ("ivlp", 12, ())


def test_the_optimizer_and_scheduler_of_a_run_are_passed_over(clip: Clip, tmp_path: Path) -> None:
    state = checkpoint_tensors("maple", **TINY, n=2, depth=3)
    parameter = torch.nn.Parameter(state["prompt_learner.ctx"].clone())
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.sum().backward()
    optimizer.step()
    successor = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    more = {"optimizer": optimizer.state_dict(), "scheduler": {"successor": successor, "last_epoch": 2}}
    path = save(tmp_path / "model.pth.tar-5", state, **more)
    with pytest.raises(Exception, match="weights_only"):
        torch.load(path, weights_only=True)  # a scheduler is not a tensor
    assert read_prompt_checkpoint(path, clip).method == "maple"


class Evil:
    def __reduce__(self) -> Any:
        return print, ("run",)


def test_a_file_that_would_run_code_is_refused(clip: Clip, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "model.pth.tar-5", checkpoint_tensors("coop", **TINY, n=2, depth=1), scheduler=Evil())
    with pytest.raises(ModelError, match="print, which could run code"):
        read_prompt_checkpoint(path, clip)
    assert capsys.readouterr().out == ""


def test_a_mismatch_names_the_keys(clip: Clip, tmp_path: Path) -> None:
    maple = checkpoint_tensors("maple", **TINY, n=2, depth=3)
    frozen = frozen_tensors(clip.module.state_dict())
    weight = "image_encoder.transformer.resblocks.1.mlp.c_fc.weight"
    cases: list[tuple[State, str]] = [
        (checkpoint_tensors("maple", **FULL, n=2, depth=3), "768 wide, but that of tiny.json is 32"),
        (checkpoint_tensors("vpt", **TINY, n=2, depth=4), "for 4 blocks of the image tower, but tiny.json has 3"),
        (checkpoint_tensors("cocoop", width=32, text=16, embed=32, n=4, depth=1), "meta_net.linear1.weight takes"),
        ({n: v for n, v in maple.items() if n != "prompt_learner.proj.bias"}, "prompt_learner.proj.bias is missing"),
        (maple | {"prompt_learner.extra": torch.zeros(2)}, "prompt_learner.extra does not belong to maple"),
        (maple | {"adapter.weight": torch.zeros(2)}, "adapter.weight are neither prompts nor weights"),
        (maple | {n: v for n, v in frozen.items() if n != weight}, f"{weight} are missing"),
        (maple | frozen | {weight: frozen[weight] + 1}, f"{weight} are not tiny.json's"),
        (maple | {"prompt_learner.ctx": torch.full((2, 16), torch.nan)}, "prompt_learner.ctx contain NaN or infinity"),
        ({"weight": torch.zeros(2)}, "are not the keys of prompts (weight"),
        ({}, "state_dict does not hold tensors"),
    ]
    for state, words in cases:
        with pytest.raises(ModelError) as caught:
            read_prompt_checkpoint(save(tmp_path / "model.pth.tar-5", state), clip)
        assert words in str(caught.value)
        assert "model.pth.tar-5" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x80\x02."])
def test_a_file_of_another_kind_is_refused(clip: Clip, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pth.tar-5"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not a prompt checkpoint"):
        read_prompt_checkpoint(path, clip)
    with pytest.raises(ModelError, match="not a prompt checkpoint"):
        read_prompt_checkpoint(tmp_path / "nowhere", clip)
