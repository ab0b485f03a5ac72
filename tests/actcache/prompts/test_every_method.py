"""Every method on every architecture of open_clip: exact, or refused with a reason from the table.

What shows that prompts are put in exactly: prompts that are what stands in their place change nothing. For texts these
are the embeddings of the template's own words, and before later blocks what the plain tower has there. For images these
are copies of the whole stream before every block: attention over every token twice is attention over each token once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import open_clip
import pytest
import torch
from other_tokenizers import VOCABULARY, Ended, Words
from small_towers import add_noise, make_both_towers, make_open_clip, make_pixels, make_tower, timm_families
from torch import Tensor, nn
from torch.nn import functional as F

from actcache import ModelError, Prompts
from actcache.models import PROMPTS_REFUSED, TextTower, VisionTower
from actcache.models.refusals import ACCEPTED
from actcache.prompts.methods import METHODS, VPT_BLOCKS
from actcache.prompts.towers import Towers, check_method, embed_images, prompt_text

N, NAME = 4, "garbage truck"


def is_plain(config: dict[str, Any]) -> bool:
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        return timm_families().get(vision["timm_model_name"]) in ACCEPTED
    return not isinstance(vision["layers"], list)


CONFIGS = {name: config for name in open_clip.list_models() if is_plain(config := open_clip.get_model_config(name))}
N_PARTS = 4


def text_kind(name: str) -> str:
    """clip, tokenizer or transformers, from the config alone."""
    text = CONFIGS[name]["text_cfg"]
    return "transformers" if "hf_model_name" in text else "tokenizer" if "hf_tokenizer_name" in text else "clip"


def test_as_many_names_as_documented_take_prompts_in_their_texts() -> None:
    kinds = [text_kind(name) for name in CONFIGS]
    assert [kinds.count(kind) for kind in ("clip", "tokenizer", "transformers")] == [67, 39, 10]


@pytest.mark.parametrize("part", range(N_PARTS))
def test_every_method_is_exact_or_refused(part: int) -> None:
    names = list(CONFIGS)[part::N_PARTS]
    for name in names:
        try:
            check(name)
        except Exception as error:
            error.add_note(f"This was {name}.")
            raise


@torch.no_grad()
def check(name: str) -> None:
    towers, pairs = make_towers(name), "relpos" in CONFIGS[name]["vision_cfg"].get("timm_model_name", "")
    if not pairs:
        check_images(towers.vision)
    for method, kind in METHODS.items():
        reason = "pairs" if pairs and kind.adapts_images else text_kind(name) if kind.text else "clip"
        if reason != "clip":
            with pytest.raises(ModelError, match=f"^{name} cannot be adapted by {method}: .*(vpt|positions)") as raised:
                check_method(method, towers, name)
            assert PROMPTS_REFUSED[reason] in str(raised.value)
            continue
        check_method(method, towers, name)
        if text_kind(name) != "transformers":  # whose package is not installed
            check_texts(method, towers.text)


def make_towers(name: str) -> Towers:
    if text_kind(name) == "transformers":
        visual: Any = add_noise(make_open_clip(name))
        module: Any = nn.Module()
        module.text = open_clip.hf_model.HFTextEncoder.__new__(open_clip.hf_model.HFTextEncoder)
        tokenize: Any = None
    else:
        own = text_kind(name) == "clip"
        module = add_noise(make_both_towers(name, 49408 if own else VOCABULARY))
        visual = module.visual
        context = int(CONFIGS[name]["text_cfg"].get("context_length", 77))
        other: Any = Ended if CONFIGS[name]["text_cfg"].get("pool_type") == "eos" else Words
        tokenize = clip_tokenizer(context) if own else other(context)
    vision = make_tower(visual)
    return Towers(vision, TextTower(module, tokenize, "", torch.device("cpu"), 10.0, vision.embed_dim))


@cache
def clip_tokenizer(context: int) -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=context)


def check_texts(method: str, text: TextTower) -> None:
    """Words as prompts give the model's own embedding of the text with these words."""
    wanted = text.module.encode_text(text.tokenize([f"a photo of a {NAME}."]), normalize=True)
    prompts, image = word_prompts(method, text), torch.zeros(1, text.embed_dim)
    got = prompt_text(text, prompts, [NAME]).embed(prompts, image)
    if METHODS[method].texts_by_image:
        got = got[0]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    if METHODS[method].text is None:
        return
    other_words = word_prompts(method, text, factor=-1)  # what was put in is read
    other = prompt_text(text, other_words, [NAME]).embed(other_words, image)
    assert (other - wanted).abs().max() > 1e-4


def word_prompts(method: str, text: TextTower, factor: float = 1.0) -> Prompts:
    """Prompts of a method that are the words "a photo of a", before every block that it reaches."""
    kind = METHODS[method]
    tensors: dict[str, Tensor] = {}
    if kind.text is not None:
        blocks = list(text.modules.transformer.resblocks)
        with watch_inputs([text.modules.token_embedding, *blocks[1:]]) as seen:
            text.module.encode_text(text.tokenize([f"a photo of a {NAME}."]))
        words = text.modules.token_embedding(seen[0])[0, 1 : 1 + N] * factor
        tensors[kind.text] = words
        width = words.shape[1]
        if kind.texts_by_image:
            for layer, (n_in, n_out) in enumerate([(text.embed_dim, 8), (8, width)], start=1):
                tensors |= {f"meta_net.linear{layer}.weight": torch.zeros(n_out, n_in)}
                tensors |= {f"meta_net.linear{layer}.bias": torch.zeros(n_out)}
        if kind.text_blocks:
            first = 0 if kind.maps_text else 1
            tensors |= {kind.text_blocks.format(first + i): x[0, 1 : 1 + N] for i, x in enumerate(seen[1:])}
        if kind.maps_text:
            for name in ("prompt_learner.proj", "prompt_learner.compound_prompt_projections.0"):
                tensors |= {f"{name}.weight": torch.zeros(16, width), f"{name}.bias": torch.zeros(16)}
    if kind.vision:
        tensors |= {kind.vision: torch.zeros(2, 16), VPT_BLOCKS.format(1): torch.zeros(2, 16)}
    return Prompts(method, tensors)


def check_images(vision: VisionTower) -> None:
    """Prompts that are copies of the whole stream give the model's own embedding of the image.

    A tower with rotary positions rotates the stream and not its copies, so it is compared with the tower whose own
    blocks take prompts for special tokens.
    """
    pixels = make_pixels(vision, 1)
    if any(context for context in vision.body.contexts):
        generator = torch.Generator().manual_seed(2)
        prompts = tuple(torch.randn(3, vision.d_model, generator=generator) for _ in range(2))
        wanted = run_among_special_tokens(vision, pixels, prompts)
    else:
        norm: Any = vision.body.norm_pre
        with watch_inputs([norm]) as seen:
            x = vision.embed(pixels)
        prompts = (seen[0] if seen else x)[0], vision.run_blocks(x, 0, 1)[0]
        wanted = vision.visual(pixels)
    wanted = F.normalize(wanted[0] if isinstance(wanted, tuple) else wanted, dim=1)  # CoCa's gives its tokens too
    got = embed_images(replace(vision, prompts=prompts), pixels)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    other = embed_images(replace(vision, prompts=(prompts[0], -prompts[1])), pixels)  # what was put in is read
    assert (other - wanted).abs().max() > 1e-4


def run_among_special_tokens(vision: VisionTower, pixels: Tensor, prompts: tuple[Tensor, ...]) -> Tensor:
    """The output with prompts between special tokens and patches, by the blocks' own count of what is not rotated."""
    p, n = len(vision.prefix), len(prompts[0])
    x = vision.embed(pixels)
    x = torch.cat([x[:, :p], vision.body.norm_pre(prompts[0])[None], x[:, p:]], 1)
    for layer, (block, context) in enumerate(zip(vision.blocks, vision.body.contexts, strict=True)):
        attention: Any = block.attn
        attention.num_prefix_tokens += n
        x[:, p : p + n] = x[:, p : p + n] if layer == 0 else prompts[layer]
        x = block(x, **context)
        attention.num_prefix_tokens -= n
    return vision.head(torch.cat([x[:, :p], x[:, p + n :]], 1))


@contextmanager
def watch_inputs(modules: list[Any]) -> Iterator[list[Tensor]]:
    """Inside, the first input of every call of these modules is collected."""
    seen: list[Tensor] = []
    handles = [module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone())) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
