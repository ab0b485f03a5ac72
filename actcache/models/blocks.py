"""The two halves of a transformer block, for every kind of block that has a point between attention and MLP.

In: a block of open_clip or timm in eval mode, and the stream that enters it. Out: what attention adds and the stream
after it, then the same for the MLP. Promises: the block's own modules run in their own order, LayerScale comes before
the sum, and the sums are grouped as (x + attn_out) + mlp_out, so both halves together give the bits of the block's
forward. A block is looked up by its exact type, because a subclass may do anything.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import open_clip
import torch
from timm.models import beit, eva, vision_transformer, vision_transformer_relpos
from torch import Tensor
from torch.nn import functional

from actcache.hook_point import SITES

Half = Callable[..., tuple[Tensor, Tensor]]
"""half(block, stream [B, T, D], **what the block takes beside it) -> (branch, stream after the branch)."""
Halves = Mapping[type, tuple[Half, Half]]

OPEN_CLIP = open_clip.transformer.ResidualAttentionBlock
CUSTOM = open_clip.transformer.CustomResidualAttentionBlock  # with qk_norm, scale_attn and similar options


def attend_open_clip(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = block.ls_1(block.attention(block.ln_1(x)))
    return y, x + y


def attend_custom(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = block.ls_1(block.ln_attn(block.attn(block.ln_1(x))))
    return y, x + y


def feed_open_clip(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = block.ls_2(block.mlp(block.ln_2(x)))
    return y, x + y


def attend_before_norm(block: Any, x: Tensor, **context: Tensor) -> tuple[Tensor, Tensor]:
    """LayerNorm, attention, LayerScale: timm's usual block."""
    y = block.ls1(block.attn(block.norm1(x), **context))
    return y, x + y


def feed_before_norm(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = block.ls2(block.mlp(block.norm2(x)))
    return y, x + y


def attend_after_norm(block: Any, x: Tensor, **context: Tensor) -> tuple[Tensor, Tensor]:
    """Attention, then LayerNorm: the residual post-norm of Swin v2, and EVA02-E."""
    y = block.norm1(block.attn(x, **context))
    return y, x + y


def feed_after_norm(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = block.norm2(block.mlp(x))
    return y, x + y


def attend_with_gamma(block: Any, x: Tensor, **context: Tensor) -> tuple[Tensor, Tensor]:
    """LayerScale as a parameter of the block, which may be absent: EVA, DINOv3, PE, BEiT."""
    y = block.attn(block.norm1(x), **context)
    y = y if block.gamma_1 is None else block.gamma_1 * y
    return y, x + y


def feed_with_gamma(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = block.mlp(block.norm2(x))
    y = y if block.gamma_2 is None else block.gamma_2 * y
    return y, x + y


def attend_in_parallel(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Several attentions read the same stream and are added up; each has its own LayerNorm and LayerScale."""
    y = torch.stack([attention(x) for attention in block.attns]).sum(dim=0)
    return y, x + y


def feed_in_parallel(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.stack([mlp(x) for mlp in block.ffns]).sum(dim=0)
    return y, x + y


HALVES: Halves = {
    OPEN_CLIP: (attend_open_clip, feed_open_clip),
    CUSTOM: (attend_custom, feed_open_clip),
    vision_transformer.Block: (attend_before_norm, feed_before_norm),
    vision_transformer.ResPostBlock: (attend_after_norm, feed_after_norm),
    vision_transformer.ParallelThingsBlock: (attend_in_parallel, feed_in_parallel),
    vision_transformer_relpos.RelPosBlock: (attend_before_norm, feed_before_norm),
    vision_transformer_relpos.ResPostRelPosBlock: (attend_after_norm, feed_after_norm),
    eva.EvaBlock: (attend_with_gamma, feed_with_gamma),
    eva.EvaBlockPostNorm: (attend_after_norm, feed_after_norm),
    beit.Block: (attend_with_gamma, feed_with_gamma),
}
"""Blocks that are not listed have no point between attention and MLP, or are unknown: only their output is taken.

timm's ParallelScalingBlock and DiffParallelScalingBlock compute attention and MLP from the same input and project both
at once, so they have neither branch by itself.
"""


def find_sites(blocks: Iterable[object]) -> tuple[str, ...]:
    """The sites that every one of these blocks has."""
    return SITES if all(type(block) in HALVES for block in blocks) else SITES[:1]


def compile_halves(blocks: Iterable[object]) -> Halves:
    """Compiled halves for the kinds of these blocks, for all batch sizes above one."""
    sources = {**HALVES, OPEN_CLIP: (_attend_plainly, feed_open_clip)}
    compiled = {}
    for kind in {type(block) for block in blocks}:
        first, second = (torch.compile(half, dynamic=True) for half in sources[kind])
        compiled[kind] = (first, second)
    return compiled


def _attend_plainly(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """`attend_open_clip` for the compiler: nn.MultiheadAttention written out, with [B, T, D] throughout.

    The compiler turns the transposed projection of nn.MultiheadAttention into a batched product with copies of the
    weights: 449 ms instead of 47 per block (ViT-B/16, 16 images, bfloat16), 316 of them for copying.
    """
    attn = block.attn
    qkv = functional.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)
    heads = (*x.shape[:2], attn.num_heads, -1)
    q, k, v = (part.reshape(heads).transpose(1, 2) for part in qkv.chunk(3, 2))  # [B, heads, T, D / heads]
    y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    y = block.ls_1(attn.out_proj(y))
    return y, x + y
