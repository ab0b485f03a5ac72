"""What must hold for a tower of any name."""

from collections.abc import Callable
from typing import Any

import torch
from small_towers import add_noise, make_pixels, make_tower, watch
from torch import Tensor, nn

from actcache import HookPoint
from actcache.hook_point import SITES
from actcache.models import VisionTower

CONVOLUTIONAL_STEMS = "HybridEmbed"
"""A patch's pixels reach several tokens, except in MobileCLIP-B, whose kernels do not overlap."""


def check_all(names: list[str], make: Callable[[str], nn.Module]) -> None:
    """Build one tower after the other and check it; whatever fails, the tower is named."""
    assert names
    for name in names:
        try:
            check(add_noise(make(name)), name)
        except Exception as error:
            error.add_note(f"This was {name}.")
            raise


@torch.no_grad()
def check(module: nn.Module, name: str) -> None:
    """Assert that the tower taken apart computes what the module computes; the messages name the tower."""
    tower = make_tower(module)
    pixels = make_pixels(tower)
    own = watch(module, pixels)
    assert tower.n_layers == 2, name
    assert torch.equal(tower.embed(pixels), own.stream), f"{name}: the stream before block 0"

    hooks = sorted(HookPoint(layer, site) for layer in range(2) for site in tower.sites)
    got = tower.run(pixels, hooks)
    assert set(own.seen) == set(hooks), f"{name}: sites {tower.sites}"
    for hook in hooks:
        assert torch.equal(got[hook], own.seen[hook]), f"{name}: {hook}"
    if tower.sites == SITES:
        for layer, before in enumerate((own.stream, got[HookPoint(0)])):
            attn_out, resid_mid, mlp_out, resid_post = (got[hook] for hook in hooks[4 * layer : 4 * layer + 4])
            assert torch.equal(before + attn_out, resid_mid), f"{name}: attn_out of block {layer}"
            assert torch.equal(resid_mid + mlp_out, resid_post), f"{name}: mlp_out of block {layer}"

    half = tower.run_blocks(own.stream, 0, 1)
    whole = tower.run_blocks(own.stream, 0, 2)
    assert torch.equal(half, own.seen[HookPoint(0)]), f"{name}: block 0"
    assert torch.equal(whole, own.seen[HookPoint(1)]), f"{name}: both blocks"
    assert torch.equal(tower.run_blocks(half, 1, 2), whole), f"{name}: one block after the other"
    assert torch.equal(tower.head(whole), own.output), f"{name}: the output"
    assert own.output.shape == (2, tower.embed_dim), name
    assert tower.pool(whole).ndim == 2, name
    assert tower.final_norm(whole).shape == whole.shape, name
    assert whole.shape[1:] == (tower.n_tokens, tower.d_model), name
    check_prefix(tower, pixels, name)
    check_order(tower, pixels, name)


SPECIAL = {"class_embedding": "cls", "cls_token": "cls", "dist_token": "dist", "reg_token": "reg"}
"""Parameter -> kind."""


def check_prefix(tower: VisionTower, pixels: Tensor, name: str) -> None:
    """Change each special parameter: exactly the tokens of its kind change."""
    stream = tower.embed(pixels)
    kinds = [""] * tower.n_tokens
    for path, value in tower.visual.named_parameters():
        kind = SPECIAL.get(path.rpartition(".")[2])
        if kind is None:
            continue
        kept = value.clone()
        value += torch.linspace(0.5, 1, value.shape[-1])
        for token in (tower.embed(pixels) != stream).any(2).any(0).nonzero().flatten().tolist():
            assert not kinds[token], name
            kinds[token] = kind
        value.copy_(kept)
    n = len(tower.prefix)
    assert tuple(kinds[:n]) == tower.prefix, f"{name}: the prefix is {kinds[:n]}"
    assert not any(kinds[n:]), f"{name}: special tokens behind the prefix"


def check_order(tower: VisionTower, pixels: Tensor, name: str) -> None:
    """Change the pixels of one patch: its token changes, and no other unless the stem is convolutional."""
    rows, columns = tower.grid
    row, column = rows - 2, columns - 1
    height, width = tower.patch_size
    changed = pixels.clone()
    changed[:, :, row * height : (row + 1) * height, column * width : (column + 1) * width] += 1
    moved = (tower.embed(changed) != tower.embed(pixels)).any(2).any(0).nonzero().flatten().tolist()
    token = len(tower.prefix) + row * columns + column
    trunk: Any = getattr(tower.visual, "trunk", tower.visual)
    alone = type(getattr(trunk, "patch_embed", None)).__name__ != CONVOLUTIONAL_STEMS
    assert (moved == [token]) if alone else (token in moved), f"{name}: token {token} moved {moved}"
