"""take_apart(): an image tower of open_clip or timm as embed -> blocks -> head, and what is known about its tokens.

In: a module in eval mode: `visual` of a model of open_clip (its own VisionTransformer, or a trunk of timm in a
TimmModel), or a model of timm. Out: a `Body`. Promises: only the module's own parts are called, in their order, so
head(blocks(embed(x))) has the bits of the module's forward; what blocks take beside the stream (rotary positions, a
shared bias) depends on the weights and the grid alone, and is computed once; the prefix, the grid and the width of the
output are compared with what the module does with one blank image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from torch import Tensor, nn

from actcache.errors import ModelError
from actcache.models.refusals import NATIVE, WRAPPER, check_tower
from actcache.models.trunks import TRUNKS, Context


@dataclass(frozen=True)
class Body:
    """An image tower, taken apart. Prefix tokens come first in the stream, then the patches in raster order.

    Attributes:
        name: the tower's class, for messages.
        module: the tower as its library made it.
        embed: pixels [B, 3, H, W] -> the stream before block 0, [B, T, D].
        blocks: the transformer blocks.
        contexts: what each block takes beside the stream.
        norm_pre: the norm that acts on each token before block 0; identity where there is none.
        final_norm: the norm that acts on each token after the last block; identity where there is none before pooling.
        pool: the stream after the last block -> [B, W], before any classifier or projection.
        head: the stream after the last block -> [B, E], the module's output.
        prefix: kind of each special token: `cls`, `dist` or `reg`.
        image_size: height and width in pixels of the images that are fed.
        grid: rows and columns of patches in such an image.
        patch_size: height and width in pixels of a patch, or the stride of a convolutional stem.
        d_model: width of the stream.
        takes_prompts: whether further tokens can be added to the stream.
        embed_dim: width of the output.
    """

    name: str
    module: Any
    embed: Callable[[Tensor], Tensor]
    blocks: Sequence[nn.Module]
    contexts: tuple[Context, ...]
    norm_pre: Callable[[Tensor], Tensor]
    final_norm: Callable[[Tensor], Tensor]
    pool: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    prefix: tuple[str, ...]
    image_size: tuple[int, int]
    grid: tuple[int, int]
    patch_size: tuple[int, int]
    d_model: int
    takes_prompts: bool = True
    embed_dim: int = 0

    @property
    def n_tokens(self) -> int:
        """Prefix and patches."""
        return len(self.prefix) + self.grid[0] * self.grid[1]

    def extend_contexts(self, n: int) -> tuple[Context, ...]:
        """`contexts` for a stream with `n` more tokens behind the patches: they are rotated by nothing.

        A row of rotary positions is [sin, cos], so sin 0 and cos 1 are exactly the identity.
        """
        if not n:
            return self.contexts
        extended = {id(rope): _extend_rope(rope, n) for context in self.contexts for rope in context.values()}
        return tuple({name: extended[id(rope)] for name, rope in context.items()} for context in self.contexts)


def _extend_rope(rope: Tensor, n: int) -> Tensor:
    rows = torch.zeros(*rope.shape[:-2], n, rope.shape[-1], dtype=rope.dtype, device=rope.device)
    rows[..., rope.shape[-1] // 2 :] = 1
    return torch.cat([rope, rows], -2)


@torch.no_grad()
def take_apart(module: Any, image_size: tuple[int, int] | None = None) -> Body:
    """Take an image tower apart.

    Args:
        module: in eval mode, on its device.
        image_size: height and width of the images that will be fed; by default what the tower declares. It decides the
            grid of a tower that takes images of any size.

    Raises:
        ModelError: it is not such a tower (see `check_tower`), it does not take images of this size, or it does not
            give one vector for an image.
    """
    check_tower(module)
    name, declared = _name(module), _declared_size(module)
    size = image_size or declared
    blank = torch.zeros(1, 3, *size, device=next(module.parameters()).device)
    try:
        body = _take_apart_native(module) if type(module) is NATIVE else _take_apart_timm(module, blank)
        x = body.embed(blank)
        output = body.head(blank.new_zeros(1, body.n_tokens, body.d_model))
    except (AssertionError, RuntimeError) as error:  # timm asserts a size, torch cannot add positions
        raise _wrong_size(name, size, declared, _shorten(error)) from error
    except (AttributeError, TypeError) as error:
        raise ModelError(
            f"{name} of timm {timm.__version__} cannot be taken apart: {_shorten(error)}. Other versions make it in "
            "another way; install a newer one."
        ) from error
    if 0 in body.grid:
        raise _wrong_size(name, size, declared, "they are smaller than one patch")
    check_tokens(body, x)
    if output.ndim != 2:
        raise ModelError(
            f"{name} gives an output of shape {list(output.shape)} for one image, expected one vector. "
            "Choose a model that pools its tokens."
        )
    return replace(body, image_size=size, embed_dim=output.shape[1])


def _shorten(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


def _wrong_size(name: str, size: tuple[int, int], declared: tuple[int, int], reason: str) -> ModelError:
    return ModelError(
        f"{name} does not take images of {size[0]} x {size[1]} pixels: {reason}. It was built for {declared[0]} x "
        f"{declared[1]}; feed that size, or build it for this one."
    )


def check_tokens(body: Body, x: Tensor) -> None:
    """Raise ModelError unless the stream x [B, T, D] has as many tokens as prefix and grid together."""
    if x.shape[1:] != (body.n_tokens, body.d_model):
        rows, columns = body.grid
        raise ModelError(
            f"{body.name} made {x.shape[1]} tokens of width {x.shape[2]} from an image, expected {len(body.prefix)} "
            f"({', '.join(body.prefix) or 'no prefix'}) and {rows} x {columns} patches of width {body.d_model}. "
            "Feed images of the size for which it was built."
        )


def _name(module: Any) -> str:
    return type(module.trunk if type(module) is WRAPPER else module).__name__


def _declared_size(module: Any) -> tuple[int, int]:
    if type(module) in (NATIVE, WRAPPER):
        height, width = module.image_size
    elif (embed := getattr(module, "patch_embed", None)) is not None and embed.img_size is not None:
        height, width = embed.img_size
    else:
        height, width = module.pretrained_cfg["input_size"][-2:]
    return int(height), int(width)


def _take_apart_native(visual: Any) -> Body:
    """open_clip's VisionTransformer. Its last norm acts before pooling or after it."""
    norm_first = not visual.final_ln_after_pool
    if visual.attn_pool is not None:
        norm_first = visual.attn_pool_contrastive is not None  # else CoCa's pooling reads the stream itself

    def pool(x: Tensor) -> Tensor:
        pooled: Tensor = visual._pool(x)[0]
        return pooled

    return Body(
        name=_name(visual),
        module=visual,
        embed=visual._embeds,
        blocks=visual.transformer.resblocks,
        contexts=({},) * len(visual.transformer.resblocks),
        norm_pre=visual.ln_pre,
        final_norm=visual.ln_post if norm_first else nn.Identity(),
        pool=pool,
        head=lambda x: pool(x) if visual.proj is None else pool(x) @ visual.proj,
        prefix=("cls",),
        image_size=_declared_size(visual),
        grid=_pair(visual.grid_size),
        patch_size=_pair(visual.patch_size),
        d_model=int(visual.positional_embedding.shape[1]),
    )


def _take_apart_timm(module: Any, blank: Tensor) -> Body:
    """A trunk of timm, alone or in open_clip's TimmModel, whose head follows that of the trunk."""
    trunk, last = (module.trunk, module.head) if type(module) is WRAPPER else (module, nn.Identity())
    kind = TRUNKS[type(trunk)]
    tokens = getattr(trunk, "embeds", trunk)  # NaFlexVit has a module for both
    patches = getattr(trunk, "patch_embed", tokens)
    prefix: list[str] = []
    for name in ("cls", "dist", "reg"):  # a tower has either registers or a distillation token
        token = getattr(tokens, f"{name}_token", None)
        prefix += [name] * (0 if token is None else token.shape[1])
    return Body(
        name=_name(module),
        module=module,
        embed=lambda images: kind.embed(trunk, images),
        blocks=trunk.blocks,
        contexts=kind.find_contexts(trunk, blank),
        norm_pre=getattr(trunk, "norm_pre", nn.Identity()),
        final_norm=trunk.norm,
        pool=lambda x: trunk.forward_head(trunk.norm(x), pre_logits=True),
        head=lambda x: last(trunk.forward_head(trunk.norm(x))),
        prefix=tuple(prefix),
        image_size=_pair(blank.shape[-2:]),
        grid=_pair(patches.dynamic_feat_size(blank.shape[-2:])),
        patch_size=_pair(patches.feat_ratio(as_scalar=False)),
        d_model=int(trunk.embed_dim),
        takes_prompts=kind.takes_prompts,
    )


def _pair(values: Sequence[int]) -> tuple[int, int]:
    first, second = values
    return int(first), int(second)
