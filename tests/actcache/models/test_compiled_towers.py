"""--compile for the blocks of timm: the same values but for the low bits, or refused."""

import shutil

import pytest
import torch
from small_towers import add_noise, make_open_clip, make_pixels, make_timm, make_tower

from actcache import HookPoint, SettingsError
from actcache.hook_point import SITES
from actcache.models import compile_tower


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
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
