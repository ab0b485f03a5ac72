"""The open_clip image tower, taken apart: embed -> run_blocks(start, stop) -> head, or run(images, hooks).

In: an architecture (an open_clip name or config JSON) and weights (a tag, a file, or `random:SEED`).
Out: `VisionTower`. Promises: weights load strictly and without pickle code; a QuickGELU mismatch is an error;
`run` is one pass that stops at the last hook point wanted; prompts of an adapted model lie behind the patches; in
float32 and not compiled, every hook point equals what open_clip's own modules give bit for bit, and
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


_CUSTOM = open_clip.transformer.CustomResidualAttentionBlock  # qk_norm, scale_attn and their like
_KNOWN_BLOCKS = (open_clip.transformer.ResidualAttentionBlock, _CUSTOM)


def attend(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """A block's first half: resid_pre [B, T, D] -> (attn_out, resid_mid), by open_clip's own modules in its order."""
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
            LayerNorms in float32. The stream is what we keep, so it is not rounded at every block: after the last
            block of ViT-B/16 0.34 % of error instead of plain autocast's 0.89 % (decision 7).
        halves: `attend` and `feed_forward`, or their compiled twins.
        prompts: of an adapted model (`prompt_vision`): [n, D] for the input and before each of the next blocks. They
            lie behind the patches, so T is 1 + P + n and every other token keeps its place.
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
        """CLS and patches; prompt tokens do not count."""
        return 1 + self.grid[0] * self.grid[1]

    @property
    def n_extra(self) -> int:
        """Prompt tokens."""
        return int(self.prompts[0].shape[0]) if self.prompts else 0

    @property
    def patch_size(self) -> tuple[int, int]:
        height, width = self.visual.patch_size
        return int(height), int(width)

    def embed(self, images: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] -> the stream before block 0, [B, T, D] float32."""
        x: Tensor = self.visual._embeds(images.to(self.device))
        if self.prompts:  # without a position, behind the patches; ln_pre knows each token alone
            prompts: Tensor = self.visual.ln_pre(self.prompts[0])
            x = torch.cat([x, prompts.expand(len(x), -1, -1)], 1)
        return x

    def run_blocks(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Run blocks start..stop-1 on the stream [B, T, D] float32. Gradients pass where they are enabled.

        Raises:
            SettingsError: T is not that of CLS, patches and this tower's prompts.
        """
        if x.shape[1] != self.n_tokens + self.n_extra:
            raise SettingsError(
                f"This tower takes {self.n_tokens} tokens and {self.n_extra} prompts, got {x.shape[1]} in all. "
                "An adapted model's prompts are read by read_extra."
            )
        with self._autocast():
            for layer in range(self.n_layers)[start:stop]:
                for _, reached in self._reach(layer, x, inside=False):
                    x = reached
        return x

    def _renew_prompts(self, layer: int, x: Tensor) -> Tensor:
        """What block `layer` takes: a deep prompt replaces what the blocks before made of the last one."""
        if not 0 < layer < len(self.prompts):
            return x
        return torch.cat([x[:, : -self.n_extra], self.prompts[layer].expand(len(x), -1, -1)], 1)

    @torch.no_grad()  # not inference_mode: bfloat16 autocast inside it gives 4 instead of 18 images/s on a CPU
    def run(self, images: Tensor, hooks: Sequence[HookPoint]) -> dict[HookPoint, Tensor]:
        """One pass that stops at the last hook point wanted; what lies behind it is not computed.

        Args:
            images: [B, 3, H, W] float32, as `transform` makes them.
            hooks: any layers and sites, in any order; the same one twice is one.

        Returns:
            Each hook point's activations [B, T, D] float32, in the order reached. Branches that were computed in
            bfloat16 come widened, so resid_mid is still exactly resid_pre + attn_out.

        Raises:
            SettingsError: no block of that layer.
            ModelError: a site inside a block whose inside is not known.
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
        """(site, [B, T, D]) as a pass reaches them, the last one resid_post. Lazy: who stops asking stops the pass.

        A block whose inside is not wanted, or not known, runs as open_clip's own forward.
        """
        block, x = self.blocks[layer], self._renew_prompts(layer, x)
        whole = not inside and self.halves == (attend, feed_forward)
        if whole or type(block) not in _KNOWN_BLOCKS:  # a subclass may do anything
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
                raise SettingsError(f"There is no {hook}: the tower's blocks are 0..{self.n_layers - 1}.")
            kind = type(self.blocks[hook.layer])
            if hook.site != "resid_post" and kind not in _KNOWN_BLOCKS:
                raise ModelError(f"{hook} cannot be taken: of a {kind.__name__} only resid_post is known.")

    def _autocast(self) -> torch.autocast:
        """The stream enters in float32 and stays so: LayerNorm keeps its type, float32 + bfloat16 gives float32."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16")

    def head(self, x: Tensor) -> Tensor:
        """The stream after the last block -> image embedding [B, E] (not normalised)."""
        pooled: Tensor = self.visual._pool(x[:, : self.n_tokens])[0]
        return pooled if self.visual.proj is None else pooled @ self.visual.proj


def load_vision_tower(
    model: str, pretrained: str, *, precision: str = "auto", device: str = "auto", compile: bool = False
) -> VisionTower:
    """Build the tower and load its weights.

    Args:
        model: an open_clip architecture name, or the path of an open_clip config JSON.
        pretrained: an open_clip tag, the path of a checkpoint (safetensors, or a state dict), or `random:SEED`.
        precision, device: see `choose_precision`, `choose_device`.
        compile: see `compile_tower`. Speed only, but for the low bits.

    Raises:
        SettingsError: a device, precision or compiler that is not here.
        ModelError: unknown name or tag (near ones are listed), not a VisionTransformer, QuickGELU mismatch, or a
            checkpoint that is truncated or has other tensors than the architecture.
    """
    tower = make_vision_tower(load_clip(model, pretrained), precision=precision, device=device)
    return compile_tower(tower) if compile else tower


def make_vision_tower(clip: Clip, *, precision: str = "auto", device: str = "auto") -> VisionTower:
    """The image tower of a loaded CLIP, frozen. Arguments and errors as `load_vision_tower`."""
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
    """The same tower with its halves compiled, once for all blocks and batch sizes; a batch of one is compiled apart.

    Its values differ from the uncompiled tower's in the low bits, so one store is not to be made by both: of the stream
    of ViT-B/16 by 3e-7 in float32, by 0.25 % in bfloat16 (where either is 0.29 % from float32). Compiling takes 11 s.
    On two CPU cores it is 1.06 times as fast in float32 and 0.95 times in bfloat16; so it is off unless asked for.

    Raises:
        SettingsError: torch.compile cannot work here, e.g. without a C++ compiler.
    """
    first, second = (torch.compile(half, dynamic=True) for half in (_attend_plainly, feed_forward))
    compiled = replace(tower, halves=(first, second))
    height, width = tower.visual.image_size
    try:  # two images, since sizes 0 and 1 are compiled as constants
        compiled.run(torch.zeros(2, 3, height, width), [HookPoint(0)])
    except Exception as error:  # the compiler's stages raise what they like
        reason = " ".join(str(error).split())
        raise SettingsError(f"--compile cannot be used here: {reason[:200]}. Leave it out.") from error
    return compiled


def _attend_plainly(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """`attend` for the compiler: nn.MultiheadAttention written out, [B, T, D] throughout.

    Of its own transposed projection the compiler makes a batched product with copies of the weights: 449 ms instead
    of 47 a block (ViT-B/16, 16 images, bfloat16), 316 of them copying.
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
