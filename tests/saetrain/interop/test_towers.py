"""Which tower a checkpoint names, in the spelling of each package, and what a store is held to."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import cli
from actcache import HookPoint, SettingsError
from saetrain import Run, convert
from saetrain.interop.matching import match_store, match_tokens
from saetrain.interop.towers import TowerHint, name_tower

QUICK, XL = "ViT-B-16-quickgelu", "datacomp_xl_s13b_b90k"
PRISMA = {"model_name": "open-clip:laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K", "hook_point_layer": 9,
          "layer_subtype": "hook_resid_post", "context_size": 50}  # fmt: skip
DINOV2 = "facebook/dinov2-with-registers-base"

STATED: dict[str, tuple[str, str, dict[str, Any], tuple[Any, ...]]] = {
    "prisma": ("prisma", "config.json", PRISMA, ("ViT-B-32", XL, 9, "resid_post", "all")),
    "prisma cls": (
        "prisma", "config.json", PRISMA | {"cls_token_only": True}, ("ViT-B-32", XL, 9, "resid_post", "cls")
    ),
    "prisma mlp": (
        "prisma", "config.json", PRISMA | {"layer_subtype": "hook_mlp_out"}, ("ViT-B-32", XL, 9, "mlp_out", "all")
    ),
    "prisma timm": (
        "prisma", "config.json", PRISMA | {"model_name": "timm/vit_base_patch16_224.dino"},
        ("timm:vit_base_patch16_224.dino", None, 9, "resid_post", "all"),
    ),
    "saelens 6": (
        "saelens", "cfg.json",
        {"metadata": {"model_name": "openai/clip-vit-base-patch16", "hook_name": "vision_model.encoder.layers.10"}},
        (QUICK, "openai", 10, "resid_post", None),
    ),
    "saelens 5": (
        "saelens", "cfg.json",
        {"model_name": "laion/CLIP-ViT-L-14-laion2B-s32B-b82K", "hook_name": "blocks.5.hook_mlp_out"},
        ("ViT-L-14", "laion2b_s32b_b82k", 5, "mlp_out", None),
    ),
    "the stream before a block": (
        "saelens", "cfg.json", {"model_name": "x", "hook_point": "blocks.5.hook_resid_pre"},
        (None, None, 4, "resid_post", None),
    ),
    "dictionary_learning": (
        "dictionary_learning", "config.json", {"trainer": {"lm_name": DINOV2, "layer": 8}, "run": {}},
        (f"hf-hub:{DINOV2}", None, 8, "resid_post", None),
    ),
    "visaebench": (
        "visaebench", "config.json", {"backbone": "clip_vitb16"}, (QUICK, "openai", 11, "resid_post", "patch")
    ),
    "saev": (
        "saev", "metadata.json", {"family": "clip", "ckpt": "ViT-B-16/openai", "layers": [10]},
        (QUICK, "openai", 10, "resid_post", None),
    ),
    "saev dinov2": (
        "saev", "metadata.json", {"vit_family": "dinov2", "vit_ckpt": "dinov2_vitb14_reg", "layers": [10, 11]},
        (f"hf-hub:{DINOV2}", None, None, None, None),
    ),
}  # fmt: skip


def fields(hint: TowerHint | None) -> tuple[Any, ...]:
    assert hint is not None
    return hint.model, hint.pretrained, hint.layer, hint.site, hint.tokens


@pytest.mark.parametrize("name", STATED)
def test_what_the_settings_state(tmp_path: Path, name: str) -> None:
    format_name, file, config, wanted = STATED[name]
    (tmp_path / file).write_text(json.dumps(config))
    hint = name_tower(format_name, tmp_path)
    assert fields(hint) == wanted
    assert hint is not None
    assert hint.stated
    assert file in hint.origin
    assert hint.layer_stated == (name != "visaebench")
    assert bool(hint.caution) == (name in ("prisma timm", "the stream before a block"))


def test_patchsae_counts_layers_from_the_end(tmp_path: Path) -> None:
    config = {"model_name": "openai/clip-vit-base-patch16", "module_name": "resid", "block_layer": -2}
    torch.save({"cfg": config, "state_dict": {}}, tmp_path / "out.pt")
    assert fields(name_tower("patchsae", tmp_path)) == (QUICK, "openai", 10, "resid_post", "all")


@pytest.mark.parametrize(
    ("format_name", "place", "origin", "wanted"),
    [
        ("saev", "x", "hf://osunlp/SAE_CLIP_24K_ViT-B-16_IN1K", (QUICK, "openai", 10, "resid_post", "patch")),
        ("saev", "models--osunlp--SAE_DINOv3_ViT-L-16_IN1K/snapshots/abc/layer_23/lnle", "",
         ("hf-hub:facebook/dinov3-vitl16-pretrain-lvd1689m", None, 23, "resid_post", "patch")),
        ("clipscope", "20_resid", "hf://lewington/CLIP-ViT-L-scope",
         ("ViT-L-14", "laion2b_s32b_b82k", 20, "resid_post", "all")),
        ("ra_sae", "x", "", (f"hf-hub:{DINOV2}", None, 11, "resid_post", "all")),
        ("universal_sae", "x", "", (None, None, 11, "resid_post", "patch")),
        ("sparsify", "vision_model.encoder.layers.10", "", (None, None, 10, "resid_post", None)),
        ("dictionary_learning", "facebook_dinov2-with-registers-base/enc_res_out_layer_7_top_k_2048_6/trainer_0", "",
         (f"hf-hub:{DINOV2}", None, 7, "resid_post", None)),
        ("dictionary_learning", "imagenet_train_activations_clip-vit-large-patch14-336_22_in_x_20_x4/trainer_0", "",
         ("ViT-L-14-336-quickgelu", "openai", 22, "resid_post", "cls")),
    ],
)  # fmt: skip
def test_what_names_let_us_guess(
    tmp_path: Path, format_name: str, place: str, origin: str, wanted: tuple[Any, ...]
) -> None:
    path = tmp_path / place
    path.mkdir(parents=True)
    hint = name_tower(format_name, path, origin)
    assert fields(hint) == wanted
    assert hint is not None
    assert hint.stated == (format_name == "clipscope")  # its package has one model, and its folders are the layers


@pytest.mark.parametrize("model", ["../../etc/passwd", "/etc/shadow", "gpt2", "x.json", "local-dir:/etc", 7, None])
def test_no_name_of_a_stranger_is_taken_as_a_path(tmp_path: Path, model: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PRISMA | {"model_name": model}))
    hint = name_tower("prisma", tmp_path)
    assert hint is not None
    assert (hint.model, hint.hook_point) == (None, HookPoint(9))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"hook_point_layer": "nine"}', '{"hook_point_layer": -1}'])
def test_settings_that_say_nothing_give_no_hint(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert name_tower("prisma", tmp_path) is None


# ---------------------------------------------------------------------------------------------------------------------
# What a store is held to


POINTS = ["blocks.0.hook_resid_post", "blocks.9.hook_resid_post"]


def write_named(path: Path, model: str | None, pretrained: str | None, **paths: str) -> Path:
    """A store of random values that says which model it is of, as `extract` records it."""
    from small_store import make_settings, write_store

    names = {name: value for name, value in (("model", model), ("pretrained", pretrained)) if value is not None}
    write_store(path, make_settings(16, d_model=32, hook_points=POINTS), provenance={**names, "paths": names | paths})
    return path


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from actcache import open_stores

    folder = tmp_path_factory.mktemp("named")
    names: dict[str, tuple[str, str | None]] = {
        "same": ("ViT-B-32", XL), "weights": ("ViT-B-32", "laion2b_s34b_b79k"), "model": ("ViT-B-16", "openai"),
        "random": ("ViT-B-32", "random:0"), "file": ("ViT-B-32", "../weights/b32.safetensors"),
        "hub": ("hf-hub:laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K", None),
        "timm": ("timm:vit_base_patch32_224.x", None),
    }  # fmt: skip
    return {name: open_stores(write_named(folder / f"{name}.acts", *each)) for name, each in names.items()}


HINT = TowerHint("ViT-B-32", XL, 9, "resid_post", "all", stated=True, origin="config.json")


@pytest.mark.parametrize("store", ["same", "hub", "file", "timm"])
def test_the_stated_model_is_taken_and_what_cannot_be_compared_is_said(stores: dict[str, Any], store: str) -> None:
    hook_point, notes = match_store(HINT, stores[store], None)
    assert hook_point == HookPoint(9)  # of the two that the store holds
    assert len(notes) == (store in ("file", "timm"))
    assert "cannot be compared" in "".join(notes) or not notes


@pytest.mark.parametrize("store", ["weights", "model", "random"])
def test_another_model_is_refused_unless_asked_for(stores: dict[str, Any], store: str) -> None:
    with pytest.raises(SettingsError, match=r"^By config.json, the SAE reads ViT-B-32 with datacomp.*--any-model"):
        match_store(HINT, stores[store], None)
    hook_point, notes = match_store(HINT, stores[store], None, any_model=True)
    assert hook_point == HookPoint(9)
    assert "the SAE reads ViT-B-32 with datacomp" in notes[0]
    _, notes = match_store(replace(HINT, stated=False), stores[store], None)  # a guess refuses nothing
    assert notes[0].startswith("Guessed from config.json")


def test_another_hook_point_is_refused_unless_asked_for(stores: dict[str, Any]) -> None:
    elsewhere = replace(HINT, layer=5)
    with pytest.raises(SettingsError, match=r"reads blocks.5.hook_resid_post, but .* holds blocks.0.*--layer"):
        match_store(elsewhere, stores["same"], None)
    hook_point, notes = match_store(elsewhere, stores["same"], 0)
    assert hook_point == HookPoint(0)
    assert "you asked for blocks.0.hook_resid_post" in notes[0]
    with pytest.raises(SettingsError, match="several"):
        match_store(replace(elsewhere, layer_stated=False), stores["same"], None)
    guessed, notes = match_store(replace(HINT, layer_stated=False), stores["same"], None)
    assert guessed == HookPoint(9)
    assert notes == ("That the SAE reads blocks.9.hook_resid_post is guessed from config.json.",)


def test_convert_holds_a_checkpoint_to_its_model(tmp_path: Path) -> None:
    from foreign_files import CHECKPOINTS

    write, config, tensors = CHECKPOINTS["prisma relu"]
    write(tmp_path / "sae", config() | PRISMA, tensors())
    write_named(tmp_path / "same.acts", "ViT-B-32", XL)
    write_named(tmp_path / "other.acts", "ViT-B-16", "openai")

    def ask(*words: str) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            return CliRunner().invoke(cli.app, ["--json", "convert", "sae", *words])

    refused = ask("run", "--store", "other.acts")
    assert refused.exit_code == 1
    assert refused.stderr.count("\n") == 1
    assert "config.json, the SAE reads ViT-B-32 with datacomp_xl_s13b_b90k, but other.acts" in refused.stderr
    assert not (tmp_path / "run").exists()
    done = ask("run", "--store", "same.acts")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["notes"] == []
    run = Run.open(tmp_path / "run")
    assert run.hook_point == HookPoint(9)
    assert (run.tower.model, run.tower.pretrained) == ("ViT-B-32", XL)
    other = ask("other", "--store", "other.acts", "--any-model", "--layer", "0")
    assert other.exit_code == 0, other.output
    assert len(json.loads(other.stdout)["notes"]) == 2


@pytest.mark.parametrize(("field", "kind"), [("cls_token_only", "cls"), ("use_patches_only", "patch")])
def test_a_checkpoint_of_some_tokens_is_a_run_of_these_tokens(tmp_path: Path, field: str, kind: str) -> None:
    from foreign_files import CHECKPOINTS

    write, config, tensors = CHECKPOINTS["prisma relu"]
    write(tmp_path / "sae", config() | PRISMA | {field: True}, tensors())
    done = convert(tmp_path / "sae", tmp_path / "run", store=write_named(tmp_path / "same.acts", "ViT-B-32", XL))
    run = Run.open(tmp_path / "run")
    assert run.train_config.tokens == kind
    assert set(run.quality) >= {kind}
    assert "all" not in run.quality
    assert "only these are encoded" in done.notes[-1]


def test_a_store_without_cls_has_no_run_of_cls(stores: dict[str, Any]) -> None:
    assert match_tokens(replace(HINT, tokens=None), stores["same"]) == ("all", ())
    without = SimpleNamespace(path="x.acts", layout=replace(stores["same"].layout, prefix=()))
    assert match_tokens(replace(HINT, tokens="patch"), without) == ("patch", ())  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=r"the SAE reads CLS, but the model of x.acts has none"):
        match_tokens(replace(HINT, tokens="cls"), without)  # type: ignore[arg-type]
