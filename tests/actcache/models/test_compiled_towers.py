"""--compile for the blocks of open_clip and timm: the same values but for the low bits, or refused.

All of them in one file, and so in one process: the compiler takes longer to be loaded than to compile.
"""

import shutil
from pathlib import Path

import pytest
import torch
from small_towers import (
    BLOCKS,
    add_noise,
    build_open_clip_tower,
    make_open_clip,
    make_pixels,
    make_timm,
    make_tower,
)

from actcache import HookPoint, SettingsError
from actcache.hook_point import SITES
from actcache.models import compile_tower

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@NEEDS_COMPILER
@pytest.mark.parametrize("kind", ["layer scale", "custom, every option"])
def test_compiled_blocks_of_open_clip_give_the_same_but_for_low_bits_and_are_compiled_once(
    tmp_path: Path, tiny_model: dict[str, str], kind: str
) -> None:
    torch.compiler.reset()
    pixels = torch.randn(5, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    hooks = [
        HookPoint(layer, site) for layer in range(3) for site in ("attn_out", "resid_mid", "mlp_out", "resid_post")
    ]
    tower = build_open_clip_tower(Path(tiny_model["model"]), tmp_path / "other.json", BLOCKS[kind], precision="float32")
    compiled = compile_tower(tower)
    with torch.compiler.set_stance("fail_on_recompile"):
        for n_images in (5, 2, 4, 3):
            expected, got = (t.run(pixels[:n_images], hooks) for t in (tower, compiled))
            for hook in hooks:
                torch.testing.assert_close(got[hook], expected[hook])


@NEEDS_COMPILER
@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "PE-Core-B-16"])
def test_a_compiled_tower_gives_the_same_but_for_low_bits(name: str) -> None:
    torch.compiler.reset()
    tower = make_tower(add_noise(make_open_clip(name) if name.startswith("PE") else make_timm(name)))
    compiled = compile_tower(tower)
    hooks = [HookPoint(layer, site) for layer in range(2) for site in SITES]
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (3, 2, 4):
            pixels = make_pixels(tower, n)
            got, expected = compiled.run(pixels, hooks), tower.run(pixels, hooks)
            for hook in hooks:
                torch.testing.assert_close(got[hook], expected[hook], rtol=1e-4, atol=1e-4)


def test_blocks_without_halves_are_not_compiled() -> None:
    with pytest.raises(SettingsError, match=r"--compile cannot be used here: .*ParallelScalingBlock has none"):
        compile_tower(make_tower(add_noise(make_timm("vit_base_patch16_xp_224"))))
