"""The open_clip image tower, taken apart: embed -> run_blocks(start, stop) -> head, or run(images, hooks).

In: the name of a model and of its weights, as resolver.py describes.
Out: `VisionTower`. Promises: weights load strictly and without pickle code; a QuickGELU mismatch is an error;
`run` is one pass that stops at the last requested hook point; the prompts of an adapted model come after the patches;
in float32 and not compiled, every hook point equals the output of open_clip's own modules bit for bit, and
`head(run_blocks(embed(x), 0, n_layers))` equals its `visual(x)`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional

from actcache.errors import ModelError, SettingsError
from actcache.hook_point import HookPoint
from actcache.models.clip import Clip, load_clip
from actcache.models.device import choose_device, choose_precision
from actcache.preprocess import Preprocess

Half = Callable[[Any, Tensor], tuple[Tensor, Tensor]]


_CUSTOM = open_clip.transformer.CustomResidualAttentionBlock  # with qk_norm, scale_attn and similar options
_KNOWN_BLOCKS = (open_clip.transformer.ResidualAttentionBlock, _CUSTOM)


def attend(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """A block's first half: resid_pre [B, T, D] -> (attn_out, resid_mid), by open_clip's modules in their order."""
    y = block.ln_1(x)
    y = block.ls_1(block.ln_attn(block.attn(y)) if isinstance(block, _CUSTOM) else block.attention(y))
    return y, x + y


def feed_forward(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """A block's second half: resid_mid [B, T, D] -> (mlp_out, resid_post)."""
    y = block.ls_2(block.mlp(block.ln_2(x)))
    return y, x + y


@dataclass(frozen=True)
class VisionTower:
    """A CLIP image tower in eval mode on its device.

    Attributes:
        visual: open_clip's VisionTransformer.
        model_id: hash of architecture, base weights and preprocessing.
        preprocess: what `transform` does.
        transform: PIL image -> float32 tensor [3, H, W], open_clip's own.
        precision: `float32`, or `bfloat16`: the branches (attention, MLP) in bfloat16, the residual stream and its
            LayerNorms in float32. The stream is what we store, so it is not rounded at every block: after the last
            block of ViT-B/16 the error is 0.34 % instead of 0.89 % with plain autocast (decision 7).
        halves: `attend` and `feed_forward`, or compiled versions of them.
        prompts: prompts of an adapted model (`prompt_vision`), [n, D] for the input and before each of the next blocks.
            They come after the patches, so T is 1 + P + n and every other token keeps its position.
    """

    visual: Any
    model_id: str
    preprocess: Preprocess
    transform: Callable[[Any], Tensor]
    device: torch.device
    precision: str
    halves: tuple[Half, Half] = (attend, feed_forward)
    prompts: tuple[Tensor, ...] = ()

    @property
    def blocks(self) -> nn.ModuleList:
        blocks: nn.ModuleList = self.visual.transformer.resblocks
        return blocks

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        return int(self.visual.positional_embedding.shape[1])

    @property
    def grid(self) -> tuple[int, int]:
        rows, columns = self.visual.grid_size
        return int(rows), int(columns)

    @property
    def n_tokens(self) -> int:
        """CLS and patches, without prompt tokens."""
        return 1 + self.grid[0] * self.grid[1]

    @property
    def n_extra(self) -> int:
        """Number of prompt tokens."""
        return int(self.prompts[0].shape[0]) if self.prompts else 0

    @property
    def patch_size(self) -> tuple[int, int]:
        height, width = self.visual.patch_size
        return int(height), int(width)

    def embed(self, images: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] -> the stream before block 0, [B, T, D] float32."""
        x: Tensor = self.visual._embeds(images.to(self.device))
        if self.prompts:  # without a position, after the patches; ln_pre acts on each token separately
            prompts: Tensor = self.visual.ln_pre(self.prompts[0])
            x = torch.cat([x, prompts.expand(len(x), -1, -1)], 1)
        return x

    def run_blocks(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Run blocks start..stop-1 on the stream [B, T, D] float32. Gradients flow if they are enabled.

        Raises:
            SettingsError: T is not the number of CLS, patches and this tower's prompts.
        """
        if x.shape[1] != self.n_tokens + self.n_extra:
            raise SettingsError(
                f"This tower takes {self.n_tokens} tokens and {self.n_extra} prompts, got {x.shape[1]} in total. "
                "Read the prompts of an adapted model with read_extra."
            )
        with self._autocast():
            for layer in range(self.n_layers)[start:stop]:
                for _, reached in self._reach(layer, x, inside=False):
                    x = reached
        return x

    def _renew_prompts(self, layer: int, x: Tensor) -> Tensor:
        """Input of block `layer`: a deep prompt replaces the output of the blocks before at the prompt tokens."""
        if not 0 < layer < len(self.prompts):
            return x
        return torch.cat([x[:, : -self.n_extra], self.prompts[layer].expand(len(x), -1, -1)], 1)

    @torch.no_grad()  # not inference_mode: bfloat16 autocast inside it gives 4 instead of 18 images/s on a CPU
    def run(self, images: Tensor, hooks: Sequence[HookPoint]) -> dict[HookPoint, Tensor]:
        """One pass that stops at the last requested hook point; nothing after it is computed.

        Args:
            images: [B, 3, H, W] float32, as `transform` makes them.
            hooks: any layers and sites, in any order; duplicates count once.

        Returns:
            Each hook point's activations [B, T, D] float32, in the order in which the pass reaches them. Branches
            computed in bfloat16 are converted to float32, so resid_mid is still exactly resid_pre + attn_out.

        Raises:
            SettingsError: there is no such layer.
            ModelError: a site inside a block whose structure is unknown.
        """
        wanted = sorted(set(hooks))
        self._check(wanted)
        kept: dict[HookPoint, Tensor] = {}
        if not wanted:
            return kept
        opened = {hook.layer for hook in wanted if hook.site != "resid_post"}
        x = self.embed(images)
        with self._autocast():
            for layer in range(wanted[-1].layer + 1):
                for site, reached in self._reach(layer, x, inside=layer in opened):
                    x = reached
                    if (hook := HookPoint(layer, site)) in wanted:
                        kept[hook] = x.float()
                    if len(kept) == len(wanted):
                        break
        return kept

    def _reach(self, layer: int, x: Tensor, inside: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield (site, [B, T, D]) in the order of the pass, resid_post last; what is not requested is not computed.

        A block runs as open_clip's own forward if no site inside it is requested, or if its structure is unknown.
        """
        block, x = self.blocks[layer], self._renew_prompts(layer, x)
        whole = not inside and self.halves == (attend, feed_forward)
        if whole or type(block) not in _KNOWN_BLOCKS:  # a subclass may differ
            yield "resid_post", block(x)
            return
        first, second = self.halves
        attn_out, x = first(block, x)
        yield "attn_out", attn_out
        yield "resid_mid", x
        mlp_out, x = second(block, x)
        yield "mlp_out", mlp_out
        yield "resid_post", x

    def _check(self, hooks: Sequence[HookPoint]) -> None:
        for hook in hooks:
            if hook.layer >= self.n_layers:
                raise SettingsError(
                    f"There is no {hook}: the tower has blocks 0..{self.n_layers - 1}. Choose a layer in that range."
                )
            kind = type(self.blocks[hook.layer])
            if hook.site != "resid_post" and kind not in _KNOWN_BLOCKS:
                raise ModelError(f"{hook} is not available: for a {kind.__name__} only resid_post is supported.")

    def _autocast(self) -> torch.autocast:
        """The stream is float32 and stays so: LayerNorm keeps its dtype, and float32 + bfloat16 gives float32."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16")

    def head(self, x: Tensor) -> Tensor:
        """The stream after the last block -> image embedding [B, E] (not normalised)."""
        pooled: Tensor = self.visual._pool(x[:, : self.n_tokens])[0]
        return pooled if self.visual.proj is None else pooled @ self.visual.proj


def load_vision_tower(
    model: str, pretrained: str | None = None, *, precision: str = "auto", device: str = "auto", compile: bool = False
) -> VisionTower:
    """Build the tower and load its weights.

    Args:
        model, pretrained: see `actcache.models.resolver`.
        precision, device: see `choose_precision`, `choose_device`.
        compile: see `compile_tower`. It changes the speed and the lowest bits.

    Raises:
        SettingsError: the device, precision or compiler is not available.
        ModelError: see `load_clip`.
    """
    tower = make_vision_tower(load_clip(model, pretrained), precision=precision, device=device)
    return compile_tower(tower) if compile else tower


def make_vision_tower(clip: Clip, *, precision: str = "auto", device: str = "auto") -> VisionTower:
    """The frozen image tower of a loaded CLIP. Arguments and errors as for `load_vision_tower`."""
    target = choose_device(device)
    return VisionTower(
        visual=clip.module.visual.requires_grad_(False).eval().to(target),
        model_id=clip.model_id,
        preprocess=clip.preprocess,
        transform=clip.transform,
        device=target,
        precision=choose_precision(precision, target),
    )


@torch.no_grad()
def compile_tower(tower: VisionTower) -> VisionTower:
    """The same tower with compiled halves, for all blocks and batch sizes (a batch of one is compiled again).

    Its values differ from those of the uncompiled tower in the low bits, so a store must not be made with both: the
    stream of ViT-B/16 differs by 3e-7 in float32 and by 0.25 % in bfloat16 (where both are 0.29 % from float32).
    Compiling takes 11 s. On two CPU cores it is 1.06 times as fast in float32 and 0.95 times in bfloat16, so it is off
    by default.

    Raises:
        SettingsError: torch.compile does not work here, e.g. without a C++ compiler.
    """
    first, second = (torch.compile(half, dynamic=True) for half in (_attend_plainly, feed_forward))
    compiled = replace(tower, halves=(first, second))
    height, width = tower.visual.image_size
    try:  # two images, since sizes 0 and 1 are compiled as constants
        compiled.run(torch.zeros(2, 3, height, width), [HookPoint(0)])
    except Exception as error:  # the compiler's stages raise many kinds of errors
        reason = " ".join(str(error).split())
        raise SettingsError(f"--compile cannot be used here: {reason[:200]}. Leave it out.") from error
    return compiled


def _attend_plainly(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """`attend` for the compiler: nn.MultiheadAttention written out, with [B, T, D] throughout.

    The compiler turns the transposed projection of nn.MultiheadAttention into a batched product with copies of the
    weights: 449 ms instead of 47 per block (ViT-B/16, 16 images, bfloat16), 316 of them for copying.
    """
    if isinstance(block, _CUSTOM):
        return attend(block, x)
    attn = block.attn
    qkv = functional.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)
    heads = (*x.shape[:2], attn.num_heads, -1)
    q, k, v = (part.reshape(heads).transpose(1, 2) for part in qkv.chunk(3, 2))  # [B, heads, T, D / heads]
    y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    y = block.ls_1(attn.out_proj(y))
    return y, x + y
