"""An image tower, taken apart: embed -> run_blocks(start, stop) -> head, or run(images, hooks).

In: the name of a model and of its weights, as resolver.py describes.
Out: `VisionTower`. Promises: weights load strictly and without pickle code; a QuickGELU mismatch is an error;
`run` is one pass that stops at the last requested hook point; the prompts of an adapted model come after the patches;
in float32 and not compiled, every hook point equals the output of the library's own modules bit for bit, and
`head(run_blocks(embed(x), 0, n_layers))` equals its `visual(x)`.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from actcache.errors import ModelError, SettingsError
from actcache.hook_point import HookPoint
from actcache.models.anatomy import Body, take_apart
from actcache.models.blocks import HALVES, Halves, compile_halves, find_sites
from actcache.models.clip import Clip, load_clip
from actcache.models.device import choose_device, choose_precision
from actcache.models.refusals import PROMPTS_REFUSED
from actcache.models.trunks import Context
from actcache.preprocess import Preprocess


@dataclass(frozen=True)
class VisionTower:
    """An image tower in eval mode on its device.

    The stream holds the special tokens first (`prefix`), then the patches in raster order, then the prompts.

    Attributes:
        body: the parts of the tower.
        model_id: hash of architecture, base weights and preprocessing.
        preprocess: what `transform` does.
        transform: PIL image -> float32 tensor [3, H, W], the library's own.
        precision: `float32`, or `bfloat16`: the branches (attention, MLP) in bfloat16, the residual stream and its
            LayerNorms in float32. The stream is what we store, so it is not rounded at every block: after the last
            block of ViT-B/16 the error is 0.34 % instead of 0.89 % with plain autocast (decision 7).
        halves: the two halves of each kind of block, or compiled versions of them.
        prompts: prompts of an adapted model (`prompt_vision`), [n, D] for the input and before each of the next blocks.
            They come after the patches, so every other token keeps its position.

    Raises:
        ModelError: prompts for a tower that cannot take them.
    """

    body: Body
    model_id: str
    preprocess: Preprocess
    transform: Callable[[Any], Tensor]
    device: torch.device
    precision: str
    halves: Halves = field(default_factory=lambda: HALVES, repr=False)
    prompts: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        if self.prompts and not self.body.takes_prompts:
            raise ModelError(
                f"{self.body.name} cannot take prompts: {PROMPTS_REFUSED['pairs']}. Choose a tower with positions of "
                "another kind, such as ViT-B-16."
            )

    @property
    def visual(self) -> Any:
        """The tower as its library made it: `visual` of open_clip's model, or timm's model."""
        return self.body.module

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.body.blocks

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        return self.body.d_model

    @property
    def embed_dim(self) -> int:
        """Width of what `head` gives: E, the embedding's, or the number of classes."""
        return self.body.embed_dim

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that are fed."""
        return self.body.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in an image that is fed."""
        return self.body.grid

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.body.patch_size

    @property
    def prefix(self) -> tuple[str, ...]:
        """Kind of each special token, in the order of the stream: `cls`, `dist` or `reg`."""
        return self.body.prefix

    @property
    def n_tokens(self) -> int:
        """Prefix and patches, without prompt tokens."""
        return self.body.n_tokens

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that every block has."""
        return find_sites(self.blocks)

    @property
    def n_extra(self) -> int:
        """Number of prompt tokens."""
        return int(self.prompts[0].shape[0]) if self.prompts else 0

    @cached_property
    def _contexts(self) -> tuple[Context, ...]:
        return self.body.extend_contexts(self.n_extra)

    def embed(self, images: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] -> the stream before block 0, [B, T, D] float32."""
        x = self.body.embed(images.to(self.device))
        if self.prompts:  # without a position, after the patches; the norm before block 0 acts on each token separately
            prompts = self.body.norm_pre(self.prompts[0])
            x = torch.cat([x, prompts.expand(len(x), -1, -1)], 1)
        return x

    def run_blocks(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Run blocks start..stop-1 on the stream [B, T, D] float32. Gradients flow if they are enabled.

        Raises:
            SettingsError: T is not the number of special tokens, patches and this tower's prompts.
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
        self.check_hooks(wanted)
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

        A block runs as its own forward if no site inside it is requested, or if it has none.
        """
        block, context, x = self.blocks[layer], self._contexts[layer], self._renew_prompts(layer, x)
        halves = self.halves.get(type(block))
        if halves is None or (not inside and self.halves is HALVES):
            yield "resid_post", block(x, **context)
            return
        first, second = halves
        attn_out, x = first(block, x, **context)
        yield "attn_out", attn_out
        yield "resid_mid", x
        mlp_out, x = second(block, x)
        yield "mlp_out", mlp_out
        yield "resid_post", x

    def check_hooks(self, hooks: Sequence[HookPoint]) -> None:
        """Raise SettingsError for a layer that the tower lacks, ModelError for a site that its block lacks."""
        for hook in hooks:
            if hook.layer >= self.n_layers:
                raise SettingsError(
                    f"There is no {hook}: the tower has blocks 0..{self.n_layers - 1}. Choose a layer in that range."
                )
            kind = type(self.blocks[hook.layer])
            if hook.site != "resid_post" and kind not in HALVES:
                raise ModelError(
                    f"{hook} is not available: a {kind.__name__} has no point between attention and MLP, or it is "
                    "unknown. Choose the site resid_post."
                )

    def _autocast(self) -> torch.autocast:
        """The stream is float32 and stays so: LayerNorm keeps its dtype, and float32 + bfloat16 gives float32."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16")

    def final_norm(self, x: Tensor) -> Tensor:
        """The stream after the last block, without prompts, after the tower's last norm: [B, T, D].

        It is the stream itself where the tower has no norm before it pools.
        """
        return self.body.final_norm(x[:, : self.n_tokens])

    def pool(self, x: Tensor) -> Tensor:
        """The stream after the last block -> the pooled vector [B, W], before any classifier or projection."""
        return self.body.pool(x[:, : self.n_tokens])

    def head(self, x: Tensor) -> Tensor:
        """The stream after the last block -> image embedding or logits of classes, [B, E] (not normalised)."""
        return self.body.head(x[:, : self.n_tokens])


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
    """The frozen image tower of a loaded model.

    Args:
        precision, device: as for `load_vision_tower`.

    Raises:
        SettingsError: as for `load_vision_tower`.
        ModelError: the tower cannot be taken apart (`REFUSED` says why), or does not take images as they are prepared.
    """
    target = choose_device(device)
    module = getattr(clip.module, "visual", clip.module)
    tower = VisionTower(
        body=take_apart(module.requires_grad_(False).eval().to(target), clip.preprocess.size),
        model_id=clip.model_id,
        preprocess=clip.preprocess,
        transform=clip.transform,
        device=target,
        precision=choose_precision(precision, target),
    )
    if tower.precision == "bfloat16" and any("RmsNorm" in type(part).__name__ for part in tower.blocks[0].modules()):
        with warnings.catch_warnings():  # torch says once that weights are float32 and inputs bfloat16, which we want
            warnings.simplefilter("ignore")
            tower.run(torch.zeros(1, 3, *tower.image_size), [HookPoint(0)])
    return tower


@torch.no_grad()
def compile_tower(tower: VisionTower) -> VisionTower:
    """The same tower with compiled halves, for all blocks and batch sizes (a batch of one is compiled again).

    Its values differ from those of the uncompiled tower in the low bits, so a store must not be made with both: the
    stream of ViT-B/16 differs by 3e-7 in float32 and by 0.25 % in bfloat16 (where both are 0.29 % from float32).
    Compiling takes 11 s. On two CPU cores it is 1.06 times as fast in float32 and 0.95 times in bfloat16, so it is off
    by default.

    Raises:
        SettingsError: torch.compile does not work here, e.g. without a C++ compiler, or the blocks have no halves.
    """
    if len(tower.sites) == 1:
        kinds = ", ".join(sorted({type(block).__name__ for block in tower.blocks if type(block) not in HALVES}))
        raise SettingsError(
            f"--compile cannot be used here: it needs blocks of two halves, and {kinds} has none. Leave it out."
        )
    compiled = replace(tower, halves=compile_halves(tower.blocks))
    height, width = tower.image_size
    try:  # two images, since sizes 0 and 1 are compiled as constants
        compiled.run(torch.zeros(2, 3, height, width), [HookPoint(0)])
    except Exception as error:  # the compiler's stages raise many kinds of errors
        reason = " ".join(str(error).split())
        raise SettingsError(f"--compile cannot be used here: {reason[:200]}. Leave it out.") from error
    return compiled
