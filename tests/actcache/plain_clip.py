"""An independent CLIP with prompts, written from the formulas alone: tensor products on a state dict, all 77 tokens.

And original checkpoints of every method, built from the documented key layout with random tensors.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]


def norm(x: Tensor, s: State, name: str) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return (
        centered / torch.sqrt(centered.square().mean(-1, keepdim=True) + 1e-5) * s[f"{name}.weight"] + s[f"{name}.bias"]
    )


def block(x: Tensor, s: State, name: str, head_width: int, mask: Tensor | None, quick: bool) -> Tensor:
    B, T, D = x.shape
    h = norm(x, s, f"{name}.ln_1") @ s[f"{name}.attn.in_proj_weight"].T + s[f"{name}.attn.in_proj_bias"]
    q, k, v = (part.view(B, T, D // head_width, head_width).transpose(1, 2) for part in h.split(D, -1))
    scores = q @ k.transpose(-1, -2) / head_width**0.5
    weights = (scores if mask is None else scores + mask).softmax(-1)
    h = (weights @ v).transpose(1, 2).reshape(B, T, D)
    x = x + h @ s[f"{name}.attn.out_proj.weight"].T + s[f"{name}.attn.out_proj.bias"]
    h = norm(x, s, f"{name}.ln_2") @ s[f"{name}.mlp.c_fc.weight"].T + s[f"{name}.mlp.c_fc.bias"]
    h = h * torch.sigmoid(1.702 * h) if quick else h * (1 + torch.erf(h / 2**0.5)) / 2
    return x + h @ s[f"{name}.mlp.c_proj.weight"].T + s[f"{name}.mlp.c_proj.bias"]


def image_forward(
    s: State, pixels: Tensor, prompts: Sequence[Tensor], *, head_width: int, quick: bool
) -> tuple[list[Tensor], Tensor]:
    """(stream after every block [B, 1 + P + n, D], image embedding [B, E])."""
    kernel = s["visual.conv1.weight"]
    size, B, D = kernel.shape[-1], len(pixels), len(kernel)
    patches = pixels.unfold(2, size, size).unfold(3, size, size)  # [B, 3, rows, columns, size, size]
    patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(B, -1, 3 * size * size) @ kernel.reshape(D, -1).T
    x = torch.cat([s["visual.class_embedding"].expand(B, 1, D), patches], 1) + s["visual.positional_embedding"]
    n = 0
    if prompts:
        n = len(prompts[0])
        x = torch.cat([x, prompts[0].expand(B, n, D)], 1)
    x = norm(x, s, "visual.ln_pre")
    streams, i = [], 0
    while f"visual.transformer.resblocks.{i}.ln_1.weight" in s:
        if 0 < i < len(prompts):
            x = torch.cat([x[:, :-n], prompts[i].expand(B, n, D)], 1)
        x = block(x, s, f"visual.transformer.resblocks.{i}", head_width, None, quick)
        streams.append(x)
        i += 1
    return streams, norm(x[:, 0], s, "visual.ln_post") @ s["visual.proj"]


def text_forward(
    s: State, tokens: Tensor, x: Tensor, deep: Sequence[Tensor], *, head_width: int, quick: bool
) -> Tensor:
    """Embeddings [C, E] of token embeddings x [C, 77, W] that already contain the first prompts."""
    length = x.shape[1]
    x = x + s["positional_embedding"]
    mask = torch.full((length, length), float("-inf")).triu(1)
    i = 0
    while f"transformer.resblocks.{i}.ln_1.weight" in s:
        if 0 < i <= len(deep):
            n = len(deep[i - 1])
            x = torch.cat([x[:, :1], deep[i - 1].expand(len(x), n, -1), x[:, 1 + n :]], 1)
        x = block(x, s, f"transformer.resblocks.{i}", head_width, mask, quick)
        i += 1
    ends = torch.stack([row[end] for row, end in zip(x, tokens.argmax(1).tolist(), strict=True)])
    return norm(ends, s, "ln_final") @ s["text_projection"]


def checkpoint_tensors(
    method: str, *, width: int, text: int, embed: int, n: int, depth: int, n_classes: int = 3
) -> State:
    """The keys that the method's original code saves, prompts and class words, with random values."""
    g = torch.Generator().manual_seed(METHODS.index(method))

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) * 0.1

    if method in ("coop", "cocoop"):
        state = {"ctx": make(n, text)}
        if method == "cocoop":
            for name, n_in, n_out in (("linear1", embed, embed // 16), ("linear2", embed // 16, text)):
                state |= {f"meta_net.{name}.weight": make(n_out, n_in), f"meta_net.{name}.bias": make(n_out)}
        return state | {"token_prefix": make(n_classes, 1, text), "token_suffix": make(n_classes, 76 - n, text)}
    state = {}
    if method in ("ivlp", "vpt"):
        state["image_encoder.VPT"] = make(n, width)
        for i in range(1, depth):
            state[f"image_encoder.transformer.resblocks.{i}.VPT_shallow"] = make(n, width)
    if method != "vpt":
        state["prompt_learner.ctx"] = make(n, text)
        state["prompt_learner.token_prefix"] = make(n_classes, 1, text)
        state["prompt_learner.token_suffix"] = make(n_classes, 76 - n, text)
    if method == "ivlp":
        for i in range(1, depth):
            state[f"text_encoder.transformer.resblocks.{i}.VPT_shallow"] = make(n, text)
    if method == "maple":
        for name in ("proj", *(f"compound_prompt_projections.{i}" for i in range(depth - 1))):
            state |= {f"prompt_learner.{name}.weight": make(width, text), f"prompt_learner.{name}.bias": make(width)}
        for i in range(depth - 1):
            state[f"prompt_learner.compound_prompts_text.{i}"] = make(n, text)
    return state


METHODS = ("coop", "cocoop", "vpt", "ivlp", "maple")


def frozen_tensors(s: State) -> State:
    """The rest of a checkpoint of the whole model: the CLIP's weights under CustomCLIP's names."""
    names = {f"image_encoder.{name.removeprefix('visual.')}": name for name in s if name.startswith("visual.")}
    for name in s:
        if name.startswith("transformer.") or name in ("positional_embedding", "text_projection") or "ln_final" in name:
            names[f"text_encoder.{name}"] = name
    return {**{new: s[old] for new, old in names.items()}, "logit_scale": s["logit_scale"]}


def plain_prompts(method: str, t: State, depth: int) -> tuple[list[Tensor], list[Tensor]]:
    """(prompts of the image tower, deep prompts of the text tower) from a checkpoint's tensors."""
    blocks = range(1, depth)
    if method == "maple":
        texts = [t["prompt_learner.ctx"], *(t[f"prompt_learner.compound_prompts_text.{i - 1}"] for i in blocks)]
        maps = ["proj", *(f"compound_prompt_projections.{i - 1}" for i in blocks)]
        weights = [(t[f"prompt_learner.{name}.weight"], t[f"prompt_learner.{name}.bias"]) for name in maps]
        return [x @ w.T + b for x, (w, b) in zip(texts, weights, strict=True)], texts[1:]
    vision = [t["image_encoder.VPT"]] if method in ("vpt", "ivlp") else []
    vision += [t[f"image_encoder.transformer.resblocks.{i}.VPT_shallow"] for i in blocks if vision]
    text = [t[f"text_encoder.transformer.resblocks.{i}.VPT_shallow"] for i in blocks if method == "ivlp"]
    return vision, text


def plain_logits(
    method: str, t: State, s: State, clip: Any, pixels: Tensor, texts: Sequence[str], depth: int, **how: Any
) -> Tensor:
    """Logits [B, C] of an adapted CLIP, from the tensors of its checkpoint `t` and of the base model `s`.

    Args:
        texts: of the classes, with words where prompts will be.
    """
    import open_clip

    vision, deep = plain_prompts(method, t, depth)
    _, images = image_forward(s, pixels, vision, **how)
    images = images / images.norm(dim=-1, keepdim=True)
    tokens = open_clip.SimpleTokenizer()(list(texts))
    x = s["token_embedding.weight"][tokens]
    scale = s["logit_scale"].exp()
    ctx = t.get("ctx", t.get("prompt_learner.ctx"))
    if method == "cocoop":
        rows = []
        for image in images:
            hidden = (t["meta_net.linear1.weight"] @ image + t["meta_net.linear1.bias"]).clamp(min=0)
            shifted = ctx + (t["meta_net.linear2.weight"] @ hidden + t["meta_net.linear2.bias"])
            found = text_forward(s, tokens, put(x, shifted), [], **how)
            rows.append(scale * (found / found.norm(dim=-1, keepdim=True)) @ image)
        return torch.stack(rows)
    found = text_forward(s, tokens, x if ctx is None else put(x, ctx), deep, **how)
    return scale * images @ (found / found.norm(dim=-1, keepdim=True)).T


def put(x: Tensor, ctx: Tensor) -> Tensor:
    n = ctx.shape[-2]
    return torch.cat([x[:, :1], ctx.expand(len(x), n, -1), x[:, 1 + n :]], 1)
