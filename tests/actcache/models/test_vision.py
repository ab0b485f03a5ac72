"""The tower taken apart computes what open_clip computes, at every site; models that do not fit are refused."""

import copy
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_towers import BLOCKS, build_open_clip_tower
from torch import Tensor

from actcache import HookPoint, ModelError, SettingsError, load_vision_tower
from actcache.hook_point import SITES
from actcache.models import VisionTower, choose_device, own_gpu
from actcache.models.resolver import check_quick_gelu
from actcache.sources import decode_image
from actcache.workers import Worker

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tower(tiny_model: dict[str, str]) -> VisionTower:
    return load_vision_tower(**tiny_model, precision="float32", device="cpu")


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(5, 3, 24, 24, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_parts_make_the_whole_bit_for_bit(tower: VisionTower, pixels: torch.Tensor) -> None:
    x = tower.embed(pixels)
    assert torch.equal(tower.head(tower.run_blocks(x, 0, 3)), tower.visual(pixels))
    assert torch.equal(tower.run_blocks(tower.run_blocks(x, 0, 2), 2, 3), tower.run_blocks(x, 0, 3))


@torch.no_grad()
def test_every_layer_equals_open_clips_intermediates(tower: VisionTower, pixels: torch.Tensor) -> None:
    out = tower.visual.forward_intermediates(
        pixels, indices=[0, 1, 2], output_fmt="NLC", output_extra_tokens=True, intermediates_only=True
    )
    for layer in range(3):
        expected = torch.cat([out["image_intermediates_prefix"][layer], out["image_intermediates"][layer]], 1)
        assert torch.equal(tower.run_blocks(tower.embed(pixels), 0, layer + 1), expected)


@torch.no_grad()
def test_bfloat16_rounds_the_branches_not_the_stream(
    tower: VisionTower, tiny_model: dict[str, str], pixels: torch.Tensor
) -> None:
    rounded = load_vision_tower(**tiny_model, precision="bfloat16", device="cpu")
    assert rounded.model_id == tower.model_id
    exact, got = tower.run_blocks(tower.embed(pixels), 0, 3), rounded.run_blocks(rounded.embed(pixels), 0, 3)
    assert got.dtype == torch.float32
    assert not torch.equal(got, got.bfloat16().float())
    assert 0 < float((got - exact).norm() / exact.norm()) < 0.02


@pytest.fixture(scope="module")
def every_hook() -> list[HookPoint]:
    """Hook points of three layers, in the order in which a forward pass reaches them."""
    return [HookPoint(layer, site) for layer in range(3) for site in ("attn_out", "resid_mid", "mlp_out", "resid_post")]


BuildTower = Callable[..., VisionTower]


@pytest.fixture
def build_tower(tmp_path: Path, tiny_model: dict[str, str]) -> BuildTower:
    """build(fields of vision_cfg, **options)"""
    return partial(build_open_clip_tower, Path(tiny_model["model"]), tmp_path / "other.json")


@torch.no_grad()
def open_clips_own(tower: VisionTower, pixels: torch.Tensor) -> dict[HookPoint, torch.Tensor]:
    """Every hook point, by forward hooks on open_clip's modules during its own forward."""
    seen: dict[HookPoint, torch.Tensor] = {}
    handles = []

    def keep(module: torch.nn.Module, hook: HookPoint) -> None:
        handles.append(module.register_forward_hook(lambda _, __, out: seen.__setitem__(hook, out)))

    def keep_input(module: torch.nn.Module, hook: HookPoint) -> None:
        handles.append(module.register_forward_pre_hook(lambda _, args: seen.__setitem__(hook, args[0])))

    for layer, block in enumerate(tower.blocks):
        keep(block.ls_1, HookPoint(layer, "attn_out"))
        keep_input(block.ln_2, HookPoint(layer, "resid_mid"))
        keep(block.ls_2, HookPoint(layer, "mlp_out"))
        keep(block, HookPoint(layer))
    tower.visual(pixels)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_every_site_equals_open_clips_own_modules_bit_for_bit(
    build_tower: BuildTower, kind: str, pixels: torch.Tensor, every_hook: list[HookPoint]
) -> None:
    tower = build_tower(BLOCKS[kind], precision="float32")
    expected, got = open_clips_own(tower, pixels), tower.run(pixels, every_hook)
    assert list(got) == every_hook
    for hook, x in got.items():
        assert torch.equal(x, expected[hook]), str(hook)
    before = tower.embed(pixels)
    for layer in range(3):
        attn_out, resid_mid, mlp_out, resid_post = (got[hook] for hook in every_hook[4 * layer : 4 * layer + 4])
        assert torch.equal(before + attn_out, resid_mid)
        assert torch.equal(resid_mid + mlp_out, resid_post)
        before = resid_post
    assert torch.equal(tower.run_blocks(tower.embed(pixels), 0, 3), before)
    assert torch.equal(tower.head(before), tower.visual(pixels))


@torch.no_grad()
def test_without_layer_scale_the_branches_are_attn_and_mlp(tower: VisionTower, pixels: torch.Tensor) -> None:
    seen: dict[str, torch.Tensor] = {}
    block = tower.blocks[1]
    handles = [
        block.attn.register_forward_hook(lambda _, __, out: seen.__setitem__("attn_out", out[0])),
        block.mlp.register_forward_hook(lambda _, __, out: seen.__setitem__("mlp_out", out)),
    ]
    tower.visual(pixels)
    for handle in handles:
        handle.remove()
    for site, expected in seen.items():
        assert torch.equal(tower.run(pixels, [HookPoint(1, site)])[HookPoint(1, site)], expected)


@given(data=st.data())
def test_any_hook_points_in_any_order_give_the_same(
    data: st.DataObject, tower: VisionTower, pixels: torch.Tensor, every_hook: list[HookPoint]
) -> None:
    hooks = data.draw(st.lists(st.sampled_from(every_hook), max_size=6))
    whole, got = tower.run(pixels, every_hook), tower.run(pixels, hooks)
    assert list(got) == sorted(set(hooks))
    assert all(torch.equal(got[hook], whole[hook]) for hook in hooks)


@pytest.mark.parametrize(
    ("last", "n_attn", "n_mlp"), [("attn_out", 2, 1), ("resid_mid", 2, 1), ("mlp_out", 2, 2), ("resid_post", 2, 2)]
)
def test_a_run_stops_at_the_last_hook_point(
    tower: VisionTower, pixels: torch.Tensor, last: str, n_attn: int, n_mlp: int
) -> None:
    calls: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        for block in tower.blocks
        for name, module in (("attn", block.attn), ("mlp", block.mlp))
    ]
    tower.run(pixels, [HookPoint(1, last), HookPoint(0)])
    for handle in handles:
        handle.remove()
    assert (calls.count("attn"), calls.count("mlp")) == (n_attn, n_mlp)


def test_no_hook_points_no_pass_and_no_such_layer_no_run(tower: VisionTower, pixels: torch.Tensor) -> None:
    assert tower.run(pixels, []) == {}
    with pytest.raises(SettingsError, match=r"no blocks\.3\.hook_attn_out.*0\.\.2"):
        tower.run(pixels, [HookPoint(0), HookPoint(3, "attn_out")])


def test_of_a_block_of_unknown_making_only_resid_post_is_taken(
    build_tower: BuildTower, pixels: torch.Tensor, every_hook: list[HookPoint]
) -> None:
    tower = build_tower({}, precision="float32")
    expected = tower.run(pixels, every_hook)
    block = tower.blocks[1]
    block.__class__ = type("OtherBlock", (type(block),), {})  # may do anything, here it does the same
    known = [hook for hook in every_hook if hook.layer != 1 or hook.site == "resid_post"]
    got = tower.run(pixels, known)
    assert all(torch.equal(got[hook], expected[hook]) for hook in known)
    with pytest.raises(ModelError, match=r"blocks\.1\.hook_mlp_out.*OtherBlock"):
        tower.run(pixels, [HookPoint(1, "mlp_out")])


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_bfloat16_is_of_the_branches_alone(
    build_tower: BuildTower, kind: str, pixels: torch.Tensor, every_hook: list[HookPoint]
) -> None:
    tower = build_tower(BLOCKS[kind], precision="bfloat16")
    dtypes: dict[str, set[torch.dtype]] = {name: set() for name in ("ln_1", "ln_2", "c_fc", "out_proj", "c_proj")}
    for name, module in tower.blocks.named_modules():
        if (last := name.split(".")[-1]) in dtypes:  # nn.MultiheadAttention does not call its out_proj
            module.register_forward_hook(lambda _, __, out, last=last: dtypes[last].add(out.dtype))
    got = tower.run(pixels, every_hook)
    assert dtypes["ln_1"] == dtypes["ln_2"] == {torch.float32}
    assert dtypes["c_fc"] == dtypes["c_proj"] == {torch.bfloat16}
    assert dtypes["out_proj"] <= {torch.bfloat16}
    assert {x.dtype for x in got.values()} == {torch.float32}
    before = tower.embed(pixels)
    for layer in range(3):
        attn_out, resid_mid, mlp_out, resid_post = (got[hook] for hook in every_hook[4 * layer : 4 * layer + 4])
        assert torch.equal(before + attn_out, resid_mid)
        assert torch.equal(resid_mid + mlp_out, resid_post)
        if "ls_init_value" not in BLOCKS[kind]:  # LayerScale's product is float32
            assert torch.equal(attn_out, attn_out.bfloat16().float())
            assert torch.equal(mlp_out, mlp_out.bfloat16().float())
        assert not torch.equal(resid_post, resid_post.bfloat16().float())
        before = resid_post


def test_without_a_compiler_compile_is_refused_in_one_line(tiny_model: dict[str, str], tmp_path: Path) -> None:
    code = (
        "from actcache import PipelineError, load_vision_tower\n"
        f"try: load_vision_tower(**{tiny_model!r}, device='cpu', compile=True)\n"
        "except PipelineError as error: print(type(error).__name__, error)"
    )
    environment = {**os.environ, "CXX": "absent", "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith("SettingsError --compile cannot be used here: ")


@torch.no_grad()
def test_a_float32_stream_errs_less_than_autocast_everywhere(tiny_model: dict[str, str], tiny_images: Path) -> None:
    """Relative RMS errors after every block; the other precisions are open_clip's own modules run here."""
    exact = load_vision_tower(**tiny_model, precision="float32", device="cpu")
    files = sorted(tiny_images.rglob("*.png"))[:5]
    images = torch.stack([exact.transform(decode_image(file)) for file in files])
    hooks = [HookPoint(layer) for layer in range(exact.n_layers)]
    reference, ours = exact.run(images, hooks), replace(exact, precision="bfloat16").run(images, hooks)

    def run_plainly(visual: Any, x: Tensor) -> list[Tensor]:
        x = visual._embeds(x)
        return [x := block(x) for block in visual.transformer.resblocks]

    def error(got: Tensor, wanted: Tensor) -> float:
        wanted = wanted.double()
        return float(((got.double() - wanted).square().sum() / wanted.square().sum()).sqrt())

    double = run_plainly(copy.deepcopy(exact.visual).double(), images.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        everywhere = run_plainly(exact.visual, images)
    for layer, hook in enumerate(hooks):
        assert 0 < error(reference[hook], double[layer]) < 1e-5
        assert 0 < error(ours[hook], reference[hook]) < error(everywhere[layer], reference[hook]) < 0.05


@given(st.integers(0, 99), st.sampled_from(SITES))
def test_hook_points_round_trip_at_every_site(layer: int, site: str) -> None:
    hook = HookPoint(layer, site)
    assert str(hook) == f"blocks.{layer}.hook_{site}"
    assert HookPoint.parse(str(hook)) == hook


def test_hook_points_sort_as_a_pass_reaches_them(every_hook: list[HookPoint]) -> None:
    assert sorted(random.Random(0).sample(every_hook, 12)) == every_hook
    assert HookPoint(0) == HookPoint(0, "resid_post") < HookPoint(1, "attn_out")
    assert HookPoint(2, "attn_out") >= HookPoint(1)


def test_shapes_are_the_models(tower: VisionTower) -> None:
    assert (tower.n_layers, tower.d_model, tower.grid, tower.patch_size) == (3, 32, (3, 3), (8, 8))
    assert tower.preprocess.size == (24, 24)


def test_model_id_names_weights_not_their_file(tmp_path: Path, tiny_model: dict[str, str], tower: VisionTower) -> None:
    weights = load_file(tiny_model["pretrained"])
    torch.save({"state_dict": weights}, tmp_path / "same.pt")
    assert load_vision_tower(tiny_model["model"], str(tmp_path / "same.pt")).model_id == tower.model_id
    weights["visual.ln_post.bias"][3] += 1e-3
    save_file(weights, tmp_path / "other.safetensors")
    assert load_vision_tower(tiny_model["model"], str(tmp_path / "other.safetensors")).model_id != tower.model_id


def test_model_id_is_that_of_the_stored_numbers_whatever_their_type(
    tmp_path: Path, tiny_model: dict[str, str], tower: VisionTower
) -> None:
    halved = {name: value.half() for name, value in load_file(tiny_model["pretrained"]).items()}
    save_file(halved, tmp_path / "half.safetensors")
    save_file({name: value.float() for name, value in halved.items()}, tmp_path / "widened.safetensors")
    torch.save(halved, tmp_path / "half.pt")
    ids = {
        load_vision_tower(tiny_model["model"], str(tmp_path / name)).model_id
        for name in ("half.safetensors", "widened.safetensors", "half.pt")
    }
    assert len(ids) == 1
    assert ids != {tower.model_id}


def test_model_id_names_the_preprocessing(tmp_path: Path, tiny_model: dict[str, str], tower: VisionTower) -> None:
    config = {"model_cfg": json.loads(Path(tiny_model["model"]).read_text()), "preprocess_cfg": {"mean": [0, 0, 0]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    other = load_vision_tower(str(tmp_path / "open_clip_config.json"), tiny_model["pretrained"])
    assert other.preprocess.mean == (0, 0, 0)
    assert other.model_id != tower.model_id


def test_random_weights_come_from_their_seed(tiny_model: dict[str, str]) -> None:
    model = tiny_model["model"]
    before = torch.random.get_rng_state()
    assert load_vision_tower(model, "random:3").model_id == load_vision_tower(model, "random:3").model_id
    assert load_vision_tower(model, "random:3").model_id != load_vision_tower(model, "random:4").model_id
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(ModelError, match="random:SEED"):
        load_vision_tower(model, "random:x")


def test_quick_gelu_must_agree() -> None:
    with pytest.raises(ModelError, match=r"trained with QuickGELU.*--model ViT-B-32-quickgelu"):
        load_vision_tower("ViT-B-32", "openai")  # known from the tag alone, before any download
    with pytest.raises(ModelError, match=r"without QuickGELU.*--model ViT-B-32"):
        check_quick_gelu("ViT-B-32-quickgelu", True, "laion2b", False)
    check_quick_gelu("ViT-B-32", False, "laion2b", False)


def test_unknown_names_are_answered_with_near_ones(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"Near: .*ViT-B-16"):
        load_vision_tower("ViT-B16", "openai")
    with pytest.raises(ModelError, match=r"Near: openai.*Tags of ViT-B-16: "):
        load_vision_tower("ViT-B-16", "openia")
    (tmp_path / "bad.json").write_text('{"vision": 1}')
    with pytest.raises(ModelError, match="embed_dim"):
        load_vision_tower(str(tmp_path / "bad.json"), "random:0")
    with pytest.raises(ModelError, match="cannot be read"):
        load_vision_tower(str(tmp_path / "absent.json"), "random:0")


def test_towers_that_are_no_vision_transformer_are_refused() -> None:
    for name in ("RN50", "RN50x4-quickgelu"):
        with pytest.raises(ModelError, match="is a convolutional network"):
            load_vision_tower(name, "random:0")


class Evil:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


def test_checkpoints_that_do_not_fit_are_refused(
    tmp_path: Path, tiny_model: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    model, good = tiny_model["model"], Path(tiny_model["pretrained"]).read_bytes()
    (tmp_path / "short.safetensors").write_bytes(good[: len(good) // 2])
    weights = load_file(tiny_model["pretrained"])
    save_file({k: v for k, v in weights.items() if "ln_post" not in k}, tmp_path / "missing.safetensors")
    other = {**weights, "visual.conv1.weight": torch.zeros(48, 3, 8, 8)}
    save_file(other, tmp_path / "wider.safetensors")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"state_dict": Evil()}))
    torch.save({"state_dict": Evil()}, tmp_path / "evil2.pt")
    for name in (
        "short.safetensors",
        "missing.safetensors",
        "wider.safetensors",
        "text.pt",
        "evil.pt",
        "evil2.pt",
    ):
        with pytest.raises(ModelError, match=name.replace(".", r"\.") + " cannot be loaded"):
            load_vision_tower(model, str(tmp_path / name))
    assert "code ran" not in capsys.readouterr().out


def test_devices_and_precisions_that_are_not_here_are_refused(tiny_model: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match="--device"):
        choose_device("cuda:99" if torch.cuda.is_available() else "cuda")
    with pytest.raises(SettingsError, match="--device"):
        choose_device("toaster")
    with pytest.raises(SettingsError, match="--precision"):
        load_vision_tower(**tiny_model, precision="float8")


@pytest.mark.parametrize(
    ("worker", "n_visible", "gpu"),
    [
        (Worker(), 8, "cuda"),
        (Worker(5, 8, 5), 8, "cuda:5"),
        (Worker(13, 16, 5), 8, "cuda:5"),  # the sixth of the second host
        (Worker(5, 8, 5), 1, "cuda:0"),  # srun --gpus-per-task 1 hides the others
        (Worker(5, 8, 5), 4, "cuda:1"),
    ],
)
def test_each_worker_of_a_host_has_its_own_gpu(worker: Worker, n_visible: int, gpu: str) -> None:
    assert own_gpu(worker, n_visible) == torch.device(gpu)


def test_a_builtin_architecture_is_built_as_open_clip_builds_it() -> None:
    tower = load_vision_tower("ViT-S-32-alt", "random:0", precision="float32")
    assert isinstance(tower.visual, open_clip.transformer.VisionTransformer)
    assert tower.grid == (7, 7)
