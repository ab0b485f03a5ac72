"""The forward pass with prompts equals one written from the formulas, for both towers and every method."""

from typing import Any

import pytest
import torch
from plain_clip import METHODS, checkpoint_tensors, image_forward, plain_logits, plain_prompts, put, text_forward

from actcache import HookPoint, ModelError, Prompts, SettingsError
from actcache.models import Clip, load_clip, make_text_tower, make_vision_tower
from actcache.prompts import prompt_vision
from actcache.prompts.towers import classify, embed_images, prompt_text

NAMES = ["cat", "garbage truck", "sea horse"]
TINY = {"width": 32, "text": 16, "embed": 16}
HOW = {"head_width": 16, "quick": False}


@pytest.fixture(scope="module")
def clip(tiny_model: dict[str, str]) -> Clip:
    """Three blocks in the image tower; two in the text tower, so that there are blocks for deep prompts."""
    import json
    from pathlib import Path
    from tempfile import TemporaryDirectory

    config = json.loads(Path(tiny_model["model"]).read_text())
    config["text_cfg"] |= {"layers": 3, "heads": 1}
    with TemporaryDirectory() as folder:
        (Path(folder) / "deep.json").write_text(json.dumps(config))
        return load_clip(f"{folder}/deep.json", "random:3")


def state(clip: Clip) -> dict[str, torch.Tensor]:
    return dict(clip.module.state_dict())


def make(method: str, n: int = 2, depth: int = 3, **other: Any) -> Prompts:
    tensors = checkpoint_tensors(method, **TINY, n=n, depth=depth)
    tensors = {name: value for name, value in tensors.items() if "token_" not in name}
    return Prompts(method, tensors, **other)


def texts_of(method: str, n: int) -> list[str]:
    """The names in the original code."""
    keeps = method in ("vpt", "cocoop") or (method in ("ivlp", "maple") and n <= 4)
    prefix = "a photo of a" if keeps else " ".join(["X"] * n)
    return [f"{prefix} {name}." for name in NAMES]


def logits(clip: Clip, prompts: Prompts, pixels: torch.Tensor, precision: str = "float32") -> torch.Tensor:
    text = make_text_tower(clip, device="cpu")
    vision = prompt_vision(make_vision_tower(clip, precision=precision, device="cpu"), prompts)
    images = embed_images(vision, pixels)
    return classify(
        images, prompt_text(text, prompts, NAMES, precision=precision).embed(prompts, images), text.logit_scale
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n", "depth"), [(2, 3), (2, 1), (4, 2), (5, 3)])
def test_logits_are_those_of_the_formulas(clip: Clip, method: str, n: int, depth: int) -> None:
    n = 4 if method == "cocoop" else n
    prompts = make(method, n, depth)
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = plain_logits(
            method, dict(prompts.tensors), state(clip), clip, pixels, texts_of(method, n), depth, **HOW
        )
        found = logits(clip, prompts, pixels)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        rough = logits(clip, prompts, pixels, "bfloat16")
    assert (rough - wanted).abs().max() < 0.05 * clip.module.logit_scale.exp()  # of a cosine
    assert (rough != wanted).any()


@pytest.mark.parametrize("method", ["vpt", "ivlp", "maple"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_hook_point_is_that_of_the_formulas(clip: Clip, method: str, depth: int) -> None:
    prompts = make(method, 2, depth)
    pixels = torch.randn(2, 3, 24, 24)
    vision, _ = plain_prompts(method, dict(prompts.tensors), depth)
    tower = prompt_vision(make_vision_tower(clip, precision="float32", device="cpu"), prompts)
    assert (tower.n_tokens, tower.n_extra) == (10, 2)
    with torch.no_grad():
        wanted, _ = image_forward(state(clip), pixels, vision, **HOW)
        found = tower.run(pixels, [HookPoint(i) for i in range(3)])
        later = tower.run_blocks(found[HookPoint(0)], 1, 3)  # from a stored layer on
    for i in range(3):
        assert found[HookPoint(i)].shape == (2, 12, 32)
        torch.testing.assert_close(found[HookPoint(i)], wanted[i], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(later, found[HookPoint(2)])


@pytest.mark.parametrize("method", ["coop", "cocoop"])
def test_text_prompts_leave_the_image_tower_as_it_is(clip: Clip, method: str) -> None:
    tower = make_vision_tower(clip, precision="float32", device="cpu")
    assert prompt_vision(tower, make(method)) == tower
    assert make(method).n_vision == 0


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_coop_moves_the_class_name(clip: Clip, position: str) -> None:
    import open_clip

    ctx = checkpoint_tensors("coop", **TINY, n=5, depth=1)["ctx"]
    prompts = Prompts("coop", {"ctx": ctx}, position=position)
    tokenizer, s = open_clip.SimpleTokenizer(), state(clip)
    rows = []
    for name in NAMES:
        tokens = tokenizer([f"X X X X X {name}."])
        x = s["token_embedding.weight"][tokens]
        n_name = len(tokenizer.encode(name))
        start, word, rest = x[:, :1], x[:, 6 : 6 + n_name], x[:, 6 + n_name :]
        a, b = ctx[None, :2], ctx[None, 2:]
        parts = {"end": [a, b, word], "middle": [a, word, b], "front": [word, a, b]}[position]
        rows.append(text_forward(s, tokens, torch.cat([start, *parts, rest], 1), [], **HOW))
    wanted = torch.nn.functional.normalize(torch.cat(rows), dim=-1)
    text = make_text_tower(clip, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(prompt_text(text, prompts, NAMES).embed(prompts), wanted, rtol=1e-4, atol=1e-5)


def test_coop_may_have_prompts_of_each_class(clip: Clip) -> None:
    import open_clip

    ctx = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(2))
    prompts, s = Prompts("coop", {"ctx": ctx}), state(clip)
    tokens = open_clip.SimpleTokenizer()([f"X X X X {name}." for name in NAMES])
    wanted = text_forward(s, tokens, put(s["token_embedding.weight"][tokens], ctx), [], **HOW)
    text = make_text_tower(clip, device="cpu")
    with torch.no_grad():
        found = prompt_text(text, prompts, NAMES).embed(prompts)
    torch.testing.assert_close(found, torch.nn.functional.normalize(wanted, dim=-1), rtol=1e-4, atol=1e-5)
    with pytest.raises(SettingsError, match="for 3 specific classes"):
        prompt_text(text, prompts, NAMES[:2])


def test_prompts_that_are_the_words_change_nothing(clip: Clip) -> None:
    text = make_text_tower(clip, device="cpu")
    words = text.module.token_embedding(text.tokenize(["a photo of a"]))[0, 1:5].detach()
    prompts = Prompts("coop", {"ctx": words})
    with torch.no_grad():
        found = prompt_text(text, prompts, NAMES).embed(prompts)
    torch.testing.assert_close(found, text.embed_classes(NAMES), rtol=1e-4, atol=1e-5)
    plain = make("vpt")
    with torch.no_grad():
        torch.testing.assert_close(
            prompt_text(text, plain, NAMES).embed(plain), text.embed_classes(NAMES), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_every_tensor(clip: Clip, method: str) -> None:
    made = make(method)
    learned = {name: value.clone().requires_grad_() for name, value in made.tensors.items()}
    pixels = torch.randn(16, 3, 24, 24, generator=torch.Generator().manual_seed(0))  # cocoop's ReLU is silent on some
    logits(clip, Prompts(method, learned), pixels).square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in learned.values())
    assert all(value.grad is None for value in clip.module.parameters())


def test_what_does_not_fit_is_named(clip: Clip) -> None:
    tensors = dict(make("maple").tensors)
    shape = "prompt_learner.compound_prompts_text.1"
    with pytest.raises(ModelError, match=rf"{shape} has shape \(3, 16\), expected \(2, 16\)"):
        Prompts("maple", {**tensors, shape: torch.zeros(3, 16)})
    with pytest.raises(ModelError, match=r"prompt_learner.proj.bias is missing"):
        Prompts("maple", {name: value for name, value in tensors.items() if name != "prompt_learner.proj.bias"})
    with pytest.raises(ModelError, match=r"image_encoder.VPT does not belong to maple"):
        Prompts("maple", {**tensors, "image_encoder.VPT": torch.zeros(2, 32)})
    with pytest.raises(
        ModelError, match=r"resblocks.1.VPT_shallow is missing.*resblocks.5.VPT_shallow does not belong to vpt"
    ):
        Prompts("vpt", {"image_encoder.VPT": torch.zeros(2, 32),
                        "image_encoder.transformer.resblocks.5.VPT_shallow": torch.zeros(2, 32)})  # fmt: skip
    with pytest.raises(SettingsError, match="cocoop, coop, maple, ivlp, vpt"):
        Prompts("lora", {})
    with pytest.raises(SettingsError, match="position of the class name must be end"):
        make("maple", position="front")
    with pytest.raises(SettingsError, match="template"):
        make("maple", template="a photo")
    with pytest.raises(ModelError, match="are 33 wide"):
        Prompts("vpt", {"image_encoder.VPT": torch.zeros(2, 33)}).check_towers(clip)
    with pytest.raises(ModelError, match=r"prompts for 4 blocks of the image tower.* has 3"):
        make("vpt", depth=4).check_towers(clip)
    text = make_text_tower(clip, device="cpu")
    with pytest.raises(SettingsError, match="may not fit"):
        prompt_text(text, make("coop", n=76), NAMES)
    with pytest.raises(SettingsError, match="no classes"):
        prompt_text(text, make("coop"), [])
