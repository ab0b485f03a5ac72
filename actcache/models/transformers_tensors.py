"""The tensors of transformers' vision models under the names of the projects that published them.

DINOv2 and DINOv3 get the names of facebookresearch, which timm's filters know; ViT gets timm's; SigLIP gets those of
open_clip with a trunk of timm. One without a counterpart keeps its name, so that loading names it.
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

_VIT = {
    "embeddings.cls_token": "cls_token", "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed", "embeddings.register_tokens": "register_tokens",
    "embeddings.patch_embeddings.projection": "patch_embed.proj", "embeddings.patch_embeddings": "patch_embed.proj",
    "layernorm": "norm", "norm": "norm", "classifier": "head",
}  # fmt: skip
_VIT_BLOCK = {
    "attention.attention.query": "attn.q", "attention.attention.key": "attn.k", "attention.attention.value": "attn.v",
    "attention.q_proj": "attn.q", "attention.k_proj": "attn.k", "attention.v_proj": "attn.v",
    "attention.output.dense": "attn.proj", "attention.o_proj": "attn.proj", "layernorm_before": "norm1",
    "layernorm_after": "norm2", "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
    "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma", "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
}  # fmt: skip
_PLAIN_MLP = {"mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"}
_GATED_MLP = {"mlp.gate_proj": "mlp.w1", "mlp.up_proj": "mlp.w2", "mlp.down_proj": "mlp.w3"}
_SIGLIP = {
    "vision_model.embeddings.patch_embedding": "visual.trunk.patch_embed.proj",
    "vision_model.post_layernorm": "visual.trunk.norm", "vision_model.head.probe": "visual.trunk.attn_pool.latent",
    "vision_model.head.attention.out_proj": "visual.trunk.attn_pool.proj",
    "vision_model.head.layernorm": "visual.trunk.attn_pool.norm",
    "vision_model.head.mlp.fc1": "visual.trunk.attn_pool.mlp.fc1",
    "vision_model.head.mlp.fc2": "visual.trunk.attn_pool.mlp.fc2",
    "text_model.embeddings.token_embedding": "text.token_embedding", "text_model.final_layer_norm": "text.ln_final",
    "text_model.head": "text.text_projection",
}  # fmt: skip
_SIGLIP_BLOCKS: dict[str, tuple[str, dict[str, str]]] = {
    "vision_model.encoder.layers.": (
        "visual.trunk.blocks.",
        {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.q_proj": "attn.q", "self_attn.k_proj": "attn.k",
         "self_attn.v_proj": "attn.v", "self_attn.out_proj": "attn.proj"},
    ),
    "text_model.encoder.layers.": (
        "text.transformer.resblocks.",
        {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.q_proj": "attn.q", "self_attn.k_proj": "attn.k",
         "self_attn.v_proj": "attn.v", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc",
         "mlp.fc2": "mlp.c_proj"},
    ),
}  # fmt: skip
_DERIVED = ("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids")
"""The numbers 0, 1, 2 ..., which older versions stored."""
_OUTER = ("dinov2_with_registers.", "dinov2.", "dinov3_vit.", "vit.")
"""What stands before a tower's names in a file of a classifier."""


FOREIGN = "transformers' "
"""How the kind of a file begins that had other names."""


def find_renaming(tensors: Mapping[str, object]) -> tuple[str, Callable[[Tensors], Tensors]] | None:
    """(what the file is, the function that renames its tensors), if they have transformers' names."""
    if "vision_model.head.probe" in tensors or "vision_model.embeddings.patch_embedding.bias" in tensors:
        return "transformers' SigLIP", _rename_siglip
    if "head.probe" in tensors and "embeddings.patch_embedding.bias" in tensors:  # an image tower by itself
        return "transformers' SigLIP", lambda t: _rename_siglip({f"vision_model.{k}": v for k, v in t.items()})
    if any(re.search(r"(^|\.)layer\.0\.attention\.(attention\.query|q_proj)\.weight$", name) for name in tensors):
        return "transformers' vision transformers", _rename_vit
    return None


def _rename_vit(tensors: Tensors) -> Tensors:
    """DINOv2 and DINOv3 under their own projects' names, ViT under timm's."""
    gated = any(name.endswith("mlp.gate_proj.weight") for name in tensors)
    blocks = _VIT_BLOCK | (_GATED_MLP if gated else _PLAIN_MLP)
    rope = not any(name.endswith("position_embeddings") for name in tensors)  # DINOv3
    top = _VIT | ({"embeddings.register_tokens": "storage_tokens"} if rope else {})
    renamed: Tensors = {}
    for name, value in tensors.items():
        bare = next((name.removeprefix(outer) for outer in _OUTER if name.startswith(outer)), name)
        bare = bare.removeprefix("model.")
        if match := re.fullmatch(r"(?:encoder\.)?layer\.(\d+)\.(.+)", bare):
            renamed[f"blocks.{match[1]}.{_swap(match[2], blocks)}"] = value
        else:
            renamed[_swap(bare, top)] = value
    if "register_tokens" in renamed or any(name.endswith(".mlp.w12.weight") for name in renamed):
        width = renamed["cls_token"].shape[-1] if "cls_token" in renamed else 1
        renamed.setdefault("mask_token", torch.zeros(1, width))  # by which timm knows a file of DINOv2
    _join(renamed, "attn.qkv.{}")
    return renamed


def _rename_siglip(tensors: Tensors) -> Tensors:
    renamed: Tensors = {}
    for name, value in tensors.items():
        if name in _DERIVED:
            continue
        stem = next((stem for stem in _SIGLIP_BLOCKS if name.startswith(stem)), None)
        if name == "vision_model.embeddings.position_embedding.weight":
            renamed["visual.trunk.pos_embed"] = value[None]
        elif name == "text_model.embeddings.position_embedding.weight":
            renamed["text.positional_embedding"] = value
        elif name.startswith("vision_model.head.attention.in_proj_") and len(value) % 3 == 0:
            kind, width = name.rsplit("_", 1)[1], len(value) // 3
            renamed[f"visual.trunk.attn_pool.q.{kind}"] = value[:width]
            renamed[f"visual.trunk.attn_pool.kv.{kind}"] = value[width:]
        elif stem is not None:
            ours, blocks = _SIGLIP_BLOCKS[stem]
            number, _, rest = name.removeprefix(stem).partition(".")
            renamed[f"{ours}{number}.{_swap(rest, blocks)}"] = value
        else:
            renamed[_swap(name, _SIGLIP)] = value
    _join(renamed, "attn.qkv.{}", "visual.")
    _join(renamed, "attn.in_proj_{}", "text.")
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in renamed and renamed[scalar].numel() == 1:
            renamed[scalar] = renamed[scalar].reshape(())
    return renamed


def _swap(name: str, table: Mapping[str, str]) -> str:
    """A name with its module renamed; a name that the table does not have stays."""
    if name in table:
        return table[name]
    module, _, kind = name.rpartition(".")
    return f"{table[module]}.{kind}" if module in table else name


def _join(tensors: Tensors, joined: str, prefix: str = "") -> None:
    """Join the three matrices of every attention, and their biases; a key without a bias gets zeros, as in DINOv3."""
    for name in [name for name in tensors if name.startswith(prefix) and name.endswith(".attn.q.weight")]:
        stem = name.removesuffix("attn.q.weight")
        for kind in ("weight", "bias"):
            parts = [tensors.get(f"{stem}attn.{letter}.{kind}") for letter in "qkv"]
            query, key, value = parts
            if kind == "bias" and key is None and query is not None:
                key = torch.zeros_like(query)
            if query is None or key is None or value is None or not query.shape == key.shape == value.shape:
                continue
            for letter in "qkv":
                tensors.pop(f"{stem}attn.{letter}.{kind}", None)
            tensors[stem + joined.format(kind)] = torch.cat([query, key, value])
