"""What towers of every kind share: batches, gradients, precision, prompts, sizes, and what is refused."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
from small_towers import GRID, add_noise, make_open_clip, make_pixels, make_timm, make_tower, watch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import nn

from actcache import HookPoint, ModelError
from actcache.hook_point import SITES
from actcache.models import VisionTower, take_apart
from actcache.models.anatomy import check_tokens
from actcache.models.refusals import check_tower

KINDS = {
    "ViT-B-16": ("cls",),
    "ViT-H-14-CLIPA": ("cls",),
    "coca_ViT-B-32": ("cls",),
    "ViT-B-16-SigLIP": (),
    "PE-Core-B-16": ("cls",),
    "ViTamin-S": (),
    "vit_small_patch14_reg4_dinov2": ("cls", *["reg"] * 4),
    "vit_small_patch16_dinov3": ("cls", *["reg"] * 4),
    "vit_base_patch16_rope_reg1_gap_256": ("reg",),
    "vit_small_patch16_rope_mixed_224": ("cls",),
    "eva02_base_patch14_224": ("cls",),
    "deit_tiny_distilled_patch16_224": ("cls", "dist"),
    "beit_base_patch16_224": ("cls",),
    "vit_relpos_small_patch16_224": (),
    "vit_srelpos_small_patch16_224": (),
    "vit_small_patch16_18x2_224": ("cls",),
    "vit_medium_patch16_rope_reg1_gap_256": ("reg",),
    "naflexvit_base_patch16_map": ("reg",),
    "vit_base_patch16_xp_224": ("cls",),
}
"""One tower of every kind -> its prefix."""
ROPE = ("PE-Core-B-16", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224", "eva02_base_patch14_224")
WITH_BIAS = ("beit_base_patch16_224", "vit_relpos_small_patch16_224", "vit_srelpos_small_patch16_224")
ONE_SITE = ("vit_base_patch16_xp_224",)


def build(name: str) -> VisionTower:
    make = make_timm if name in timm.list_models() else make_open_clip
    return make_tower(add_noise(make(name)))


@pytest.fixture(params=sorted(KINDS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@torch.no_grad()
def test_the_kinds_of_the_prefix_are_told(name: str) -> None:
    tower = build(name)
    assert tower.prefix == KINDS[name]
    assert tower.n_tokens == len(tower.prefix) + tower.grid[0] * tower.grid[1]
    assert tower.sites == (SITES[:1] if name in ONE_SITE else SITES)
    assert tower.d_model == 128
    assert tower.embed_dim == tower.visual(make_pixels(tower, 1))[0].shape[-1]


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    tower = build(name)
    pixels = make_pixels(tower, 4)
    hook = HookPoint(1)
    whole = tower.run(pixels, [hook])[hook]
    for i in range(4):
        torch.testing.assert_close(tower.run(pixels[i : i + 1], [hook])[hook][0], whole[i], rtol=1e-5, atol=1e-4)


def test_the_gradient_of_the_output_reaches_every_token(name: str) -> None:
    tower = build(name)
    x = tower.embed(make_pixels(tower, 1)).requires_grad_()
    tower.head(tower.run_blocks(x, 0, 2))[0, 0].backward()
    assert x.grad is not None
    assert (x.grad.abs().amax(2) > 0).all()


@torch.no_grad()
def test_in_bfloat16_the_stream_stays_float32(name: str) -> None:
    tower = build(name)
    rounded, pixels = make_tower(tower.visual, precision="bfloat16"), make_pixels(tower)
    hooks = [HookPoint(layer, site) for layer in range(2) for site in tower.sites]
    got, exact = rounded.run(pixels, hooks), tower.run(pixels, hooks)
    for hook in hooks:
        assert got[hook].dtype == torch.float32
        error = float((got[hook] - exact[hook]).norm() / exact[hook].norm())
        assert 0 < error < 0.05, str(hook)
    stream = got[HookPoint(1)]
    assert not torch.equal(stream, stream.bfloat16().float())
    if tower.sites == SITES:
        before = got[HookPoint(0)]
        assert torch.equal(before + got[HookPoint(1, "attn_out")], got[HookPoint(1, "resid_mid")])
        assert torch.equal(got[HookPoint(1, "resid_mid")] + got[HookPoint(1, "mlp_out")], stream)


@torch.no_grad()
def test_a_run_computes_nothing_after_the_last_hook_point() -> None:
    tower = build("vit_small_patch16_dinov3")
    calls: list[str] = []
    for i, block in enumerate(tower.blocks):
        for part in ("attn", "mlp"):
            getattr(block, part).register_forward_hook(lambda *_, call=f"{part} {i}": calls.append(call))
    pixels = make_pixels(tower)
    for hook, expected in {
        HookPoint(0, "resid_mid"): ["attn 0"],
        HookPoint(0): ["attn 0", "mlp 0"],
        HookPoint(1, "attn_out"): ["attn 0", "mlp 0", "attn 1"],
    }.items():
        calls.clear()
        tower.run(pixels, [hook])
        assert calls == expected


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


@pytest.fixture
def prompts() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(3, 128, generator=generator) for _ in range(2))


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(set(KINDS) - set(WITH_BIAS)))
def test_prompts_come_last_and_are_not_pooled(name: str, prompts: tuple[torch.Tensor, ...]) -> None:
    plain = build(name)
    tower, pixels, n = replace(plain, prompts=prompts), make_pixels(plain), plain.n_tokens
    x = tower.embed(pixels)
    assert torch.equal(x[:, :n], plain.embed(pixels))
    assert x.shape[1] == n + 3 == tower.n_tokens + tower.n_extra
    stream = tower.run_blocks(x, 0, 2)
    assert not torch.allclose(stream[:, :n], plain.run_blocks(x[:, :n], 0, 2), rtol=0.01)  # the prompts are read
    assert torch.equal(tower.head(stream), plain.head(stream[:, :n]))
    assert torch.equal(tower.pool(stream), plain.pool(stream[:, :n]))
    assert torch.equal(tower.final_norm(stream), plain.final_norm(stream[:, :n]))
    hooks = [HookPoint(0), HookPoint(1)]
    got = tower.run(pixels, hooks)
    assert torch.equal(got[hooks[1]], stream)
    assert torch.equal(tower.run_blocks(got[hooks[0]], 1, 2), stream)


@torch.no_grad()
@pytest.mark.parametrize("name", ROPE)
def test_prompts_are_not_rotated(name: str, prompts: tuple[torch.Tensor, ...]) -> None:
    """The same as prompts among the special tokens, which attention does not rotate."""
    plain = build(name)
    tower = replace(plain, prompts=prompts[:1])
    pixels, n, p = make_pixels(plain), plain.n_tokens, len(plain.prefix)
    x = tower.embed(pixels)
    moved = torch.cat([x[:, :p], x[:, n:], x[:, p:n]], 1)
    for block, context in zip(copy.deepcopy(plain.blocks), plain.body.contexts, strict=True):
        block.attn.num_prefix_tokens += 3
        moved = block(moved, **context)
    expected = torch.cat([moved[:, :p], moved[:, p + 3 :], moved[:, p : p + 3]], 1)
    torch.testing.assert_close(tower.run_blocks(x, 0, 2), expected, rtol=1e-4, atol=1e-4)
    for context, longer in zip(plain.body.contexts, tower._contexts, strict=True):
        rope, n_rows = longer["rope"], context["rope"].shape[-2]
        assert torch.equal(rope[..., :n_rows, :], context["rope"])
        q = torch.randn(rope.shape[-1] // 2)
        assert torch.equal(apply_rot_embed_cat(q, rope[..., n_rows:, :]), q.expand(*rope.shape[:-2], 3, -1))


@pytest.mark.parametrize("name", WITH_BIAS)
def test_towers_with_a_bias_for_pairs_of_tokens_refuse_prompts(name: str, prompts: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(ModelError, match=r"^(Beit|VisionTransformerRelPos) cannot take prompts: .*bias.*Choose"):
        replace(build(name), prompts=prompts)


def test_the_gradient_reaches_prompts_of_a_rope_tower(prompts: tuple[torch.Tensor, ...]) -> None:
    learned = tuple(value.requires_grad_() for value in prompts)
    tower = replace(build("vit_small_patch16_dinov3"), prompts=learned)
    tower.head(tower.run_blocks(tower.embed(make_pixels(tower, 1)), 0, 2)).sum().backward()
    assert all(value.grad is not None and (value.grad.abs() > 0).any() for value in learned)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


@torch.no_grad()
def test_the_grid_is_that_of_the_images_that_are_fed() -> None:
    """DINOv3 takes images of any size, ViTamin does not check them."""
    for name, size, grid in (("vit_small_patch16_dinov3", (48, 112), (3, 7)), ("vitamin_xlarge_384", (96, 48), (6, 3))):
        module = add_noise(make_timm(name))
        tower = make_tower(module, size)
        assert (tower.grid, tower.image_size, tower.patch_size) == (grid, size, (16, 16))
        pixels = make_pixels(tower)
        own = watch(module, pixels)
        assert torch.equal(tower.embed(pixels), own.stream)
        assert torch.equal(tower.run(pixels, [HookPoint(1)])[HookPoint(1)], own.seen[HookPoint(1)])
        assert torch.equal(tower.head(own.seen[HookPoint(1)]), own.output)


@torch.no_grad()
def test_pixels_beyond_the_last_whole_patch_are_not_seen() -> None:
    """As SigLIP SO400M-14 at 384: 27 x 27 patches of 14 pixels cover 378."""
    module = add_noise(make_timm("vit_so400m_patch14_siglip_384", img_size=(62, 75)))
    tower = make_tower(module)
    assert (tower.grid, tower.patch_size) == (GRID, (14, 14))
    pixels = make_pixels(tower)
    other = pixels.clone()
    other[:, :, 56:], other[:, :, :, 70:] = 0, 0
    assert torch.equal(tower.embed(other), tower.embed(pixels))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("ViT-B-16", (96, 96)),
        ("ViT-B-16", (8, 8)),
        ("ViT-B-16-SigLIP", (96, 96)),
        ("vit_small_patch14_reg4_dinov2", (96, 96)),
        ("vit_small_patch16_dinov3", (50, 64)),
        ("vit_small_patch16_dinov3", (8, 8)),
        ("beit_base_patch16_224", (96, 96)),
        ("naflexvit_base_patch16_map", (8, 8)),
    ],
)
def test_images_of_a_size_that_does_not_fit_are_refused(name: str, size: tuple[int, int]) -> None:
    module = build(name).visual
    with pytest.raises(ModelError, match=rf"does not take images of {size[0]} x {size[1]} pixels: .*It was built for"):
        take_apart(module, size)


def test_another_number_of_tokens_than_prefix_and_grid_is_refused() -> None:
    body = build("vit_small_patch16_dinov3").body
    with pytest.raises(ModelError, match=r"Eva made 24 tokens .* expected 5 \(cls, reg, .*\) and 4 x 5 patches"):
        check_tokens(body, torch.zeros(1, 24, 128))
    module = add_noise(make_timm("vit_small_patch14_reg4_dinov2"))
    module.reg_token = nn.Parameter(module.reg_token[:, :3])  # positions lie on the patches alone, so it still runs
    assert take_apart(module).n_tokens == 4 + 20
    module.patch_embed.dynamic_feat_size = lambda size: (5, 5)
    with pytest.raises(ModelError, match=r"made 24 tokens of width 128 .* expected 4 .* and 5 x 5 patches"):
        take_apart(module)


def test_a_tower_that_pools_nothing_is_refused() -> None:
    with pytest.raises(ModelError, match=r"output of shape \[1, 21, 1000\].*expected one vector.*pools"):
        take_apart(add_noise(make_timm("vit_base_patch16_224", global_pool="", num_classes=1000)))


# ---------------------------------------------------------------------------------------------------------------------
# Classes that are unknown, or chosen by the environment


def test_of_a_tower_without_a_point_between_its_branches_only_resid_post_is_taken() -> None:
    tower = build(ONE_SITE[0])
    with pytest.raises(ModelError, match=r"blocks\.1\.hook_attn_out.*ParallelScalingBlock.*Choose the site resid_post"):
        tower.check_hooks([HookPoint(0), HookPoint(1, "attn_out")])
    with pytest.raises(ModelError, match="ParallelScalingBlock"):
        tower.run(make_pixels(tower), [HookPoint(0, "mlp_out")])


def test_subclasses_are_not_taken_for_their_parents() -> None:
    module = add_noise(make_timm("vit_base_patch16_224"))
    block = module.blocks[1]
    block.__class__ = type("OtherBlock", (type(block),), {"forward": lambda self, x: 2 * x})
    tower = make_tower(module)
    pixels, hook = make_pixels(tower), HookPoint(1)
    assert tower.sites == ("resid_post",)
    assert torch.equal(tower.run(pixels, [hook])[hook], 2 * tower.run(pixels, [HookPoint(0)])[HookPoint(0)])
    module.__class__ = type("OtherTransformer", (type(module),), {})
    with pytest.raises(ModelError, match=r"OtherTransformer cannot be used: it is neither .*Choose a plain ViT"):
        check_tower(module)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_base_patch16_224", "vit_small_patch16_rope_mixed_224"])
def test_a_name_that_the_environment_turns_into_a_naflexvit_is_taken_apart_too(name: str) -> None:
    module = add_noise(make_timm(name, use_naflex=True))
    tower = make_tower(module)
    assert tower.body.name == "NaFlexVit"
    own = watch(module, make_pixels(tower))
    hooks = [HookPoint(layer, site) for layer in range(2) for site in SITES]
    got = tower.run(make_pixels(tower), hooks)
    assert all(torch.equal(got[hook], own.seen[hook]) for hook in hooks)
    assert torch.equal(tower.head(got[HookPoint(1)]), own.output)
