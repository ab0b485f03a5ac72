"""timm's vision transformers: how each class makes its stream from images, and what its blocks take beside it.

Rotary positions and shared biases follow from weights and grid alone, never from an image, so they are computed once.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from timm.models import beit, deit, eva, naflexvit, vision_transformer, vision_transformer_relpos
from torch import Tensor

Context = Mapping[str, Tensor]
"""Keyword arguments of a block beside the stream."""


class Trunk(NamedTuple):
    """How a class of timm makes its stream, and what its blocks take beside it."""

    embed: Callable[[Any, Tensor], Tensor]
    find_contexts: Callable[[Any, Tensor], tuple[Context, ...]]
    takes_prompts: bool = True  # not where a bias is added for every pair of the tower's own tokens


def _repeat(trunk: Any, **context: Tensor | None) -> tuple[Context, ...]:
    """The same for every block, without what the tower does not have."""
    return ({name: value for name, value in context.items() if value is not None},) * len(trunk.blocks)


def _find_nothing(trunk: Any, blank: Tensor) -> tuple[Context, ...]:
    return _repeat(trunk)


def _embed_vit(trunk: Any, images: Tensor) -> Tensor:
    x: Tensor = trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(images))))
    return x


def _embed_eva(trunk: Any, images: Tensor) -> Tensor:
    x: Tensor = trunk.norm_pre(trunk._pos_embed(trunk.patch_embed(images))[0])
    return x


def _find_rope_eva(trunk: Any, blank: Tensor) -> tuple[Context, ...]:
    rope = trunk._pos_embed(trunk.patch_embed(blank))[1]
    return _share_rope(trunk, rope, by_block=trunk.rope_mixed)


def _share_rope(trunk: Any, rope: Tensor | None, by_block: bool) -> tuple[Context, ...]:
    """Rotary positions [P, 2 * head width], or [block, head, P, 2 * head width] where each block has its own."""
    if rope is not None and by_block:
        return tuple({"rope": each} for each in rope)
    return _repeat(trunk, rope=rope)


def _embed_beit(trunk: Any, images: Tensor) -> Tensor:
    x: Tensor = trunk.patch_embed(images)
    x = torch.cat((trunk.cls_token.expand(len(x), -1, -1), x), dim=1)
    return x if trunk.pos_embed is None else x + trunk.pos_embed


def _find_bias_beit(trunk: Any, blank: Tensor) -> tuple[Context, ...]:
    return _repeat(trunk, shared_rel_pos_bias=None if trunk.rel_pos_bias is None else trunk.rel_pos_bias())


def _embed_relpos(trunk: Any, images: Tensor) -> Tensor:
    x: Tensor = trunk.patch_embed(images)
    return x if trunk.cls_token is None else torch.cat((trunk.cls_token.expand(len(x), -1, -1), x), dim=1)


def _find_bias_relpos(trunk: Any, blank: Tensor) -> tuple[Context, ...]:
    return _repeat(trunk, shared_rel_pos=None if trunk.shared_rel_pos is None else trunk.shared_rel_pos.get_bias())


def _embed_naflex(trunk: Any, images: Tensor) -> Tensor:
    """Images of one size. Lists of patches of images of many sizes are another shape of data."""
    x: Tensor = trunk._forward_embeds(images, None, None, None)["patches"]
    return x


def _find_rope_naflex(trunk: Any, blank: Tensor) -> tuple[Context, ...]:
    rope = trunk._forward_embeds(blank, None, None, None)["rope_embeds"]
    return _share_rope(trunk, rope, by_block=trunk.rope_is_mixed)


TRUNKS: Mapping[type, Trunk] = {
    vision_transformer.VisionTransformer: Trunk(_embed_vit, _find_nothing),
    deit.VisionTransformerDistilled: Trunk(_embed_vit, _find_nothing),
    eva.Eva: Trunk(_embed_eva, _find_rope_eva),
    beit.Beit: Trunk(_embed_beit, _find_bias_beit, takes_prompts=False),
    vision_transformer_relpos.VisionTransformerRelPos: Trunk(_embed_relpos, _find_bias_relpos, takes_prompts=False),
    naflexvit.NaFlexVit: Trunk(_embed_naflex, _find_rope_naflex),
}
"""By exact type: a subclass may do anything in its forward."""
