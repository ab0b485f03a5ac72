"""How images are prepared is the model's own, or it is given; where nothing says it, nothing is assumed in silence."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
from small_models import make, write_folder

from actcache import ModelError
from actcache.models import load_clip
from actcache.models.preprocessing import read_timm
from actcache.models.resolver import resolve_model

KEYS = ("mean", "std", "interpolation", "crop_mode", "crop_pct")
VIT = "vit_base_patch16_224"


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "weights.pt").write_bytes(b"not read here")
    return str(tmp_path / "weights.pt")


def fields_of(name: str) -> tuple[Any, ...]:
    cfg = read_timm(timm.get_pretrained_cfg(name).to_dict())
    return tuple(cfg[key] if isinstance(cfg[key], str | float | int) else tuple(cfg[key]) for key in KEYS)


def plain_names() -> list[str]:
    modules = ("vision_transformer", "eva", "beit", "deit", "vision_transformer_relpos", "vision_transformer_hybrid")
    return [name for module in modules for name in timm.list_models(module=module)]


def test_a_bare_timm_name_takes_what_its_tags_share_or_nothing(file: str) -> None:
    differing = []
    for name in plain_names():
        kinds = {fields_of(tag) for tag in timm.list_pretrained(f"{name}.*")}
        if len(kinds) > 1:
            differing.append(name)
            with pytest.raises(ModelError, match=r"weights\.pt does not say .*--preprocess") as caught:
                resolve_model(f"timm:{name}", file)
            assert "\n" not in str(caught.value)
        else:
            source = resolve_model(f"timm:{name}", file)
            made = tuple(getattr(source.preprocess, key) for key in KEYS)
            assert {made} == (kinds or {fields_of(name)}), name
            assert "Assumed: mean" in source.notes[0]
            assert "--preprocess" in source.notes[0]
    assert {VIT, "vit_base_patch16_clip_224"} <= set(differing)
    assert 20 < len(differing) < 40


def test_a_tag_says_it(file: str) -> None:
    for name in (f"{VIT}.mae", f"{VIT}.augreg_in21k", "vit_small_patch14_dinov2.lvd142m"):
        source = resolve_model(f"timm:{name}", file)
        assert tuple(getattr(source.preprocess, key) for key in KEYS) == fields_of(name)
        assert source.sources["preprocess"] == f"preprocessing in timm's {name}"
        assert not source.notes


def test_open_clips_names_whose_tags_differ_need_it(file: str) -> None:
    for name in open_clip.list_models():
        tags = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
        kinds = {tuple(str(tag[key]) for key in ("mean", "std", "interpolation", "resize_mode")) for tag in tags}
        if len(kinds) > 1:
            with pytest.raises(ModelError, match=f"weights of {name} differ in it.*--preprocess: a tag .*{name}"):
                resolve_model(name, file)


GIVEN: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("default", {"library": "open_clip", "resize_mode": "shortest"}),
    "a tag of open_clip": ("ViT-L-14.laion2b_s32b_b82k", {"mean": (0.5, 0.5, 0.5), "library": "open_clip"}),
    "a name of open_clip": ("ViT-B-16-SigLIP", {"resize_mode": "squash", "mean": (0.5, 0.5, 0.5)}),
    "a tag of timm": ("timm:vit_base_patch16_224.mae", {"library": "timm", "crop_pct": 0.9}),
    "a tag of timm without prefix": ("vit_small_patch14_dinov2.lvd142m", {"library": "timm", "crop_pct": 1.0}),
}


@pytest.mark.parametrize("case", GIVEN)
def test_it_may_be_given_by_a_name(case: str, file: str) -> None:
    given, wanted = GIVEN[case]
    for model in ("ViT-L-14", f"timm:{VIT}"):
        source = resolve_model(model, file, preprocess_as=given)
        if case == "default" and model != "ViT-L-14":
            wanted = {"library": "timm", "mean": (0.5, 0.5, 0.5)}
        assert {key: getattr(source.preprocess, key) for key in wanted} == wanted
        assert source.preprocess.size == (224, 224)
        assert not source.notes


@pytest.mark.parametrize(
    "content",
    [{"mean": [0.1] * 3, "std": [0.2] * 3, "interpolation": "bilinear", "resize_mode": "squash"},
     {"preprocess_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3, "interpolation": "bilinear", "resize_mode": "squash"}},
     {"mean": [0.1] * 3, "std": [0.2] * 3, "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"},
     {"pretrained_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3, "interpolation": "bilinear", "crop_mode": "squash",
                         "crop_pct": 1.0}, "architecture": VIT}],
    ids=["fields", "preprocess_cfg", "timm's fields", "timm's config"],
)  # fmt: skip
def test_it_may_be_given_in_a_file(content: dict[str, Any], file: str, tmp_path: Path) -> None:
    (tmp_path / "steps.json").write_text(json.dumps(content))
    preprocess = resolve_model("ViT-L-14", file, preprocess_as=str(tmp_path / "steps.json")).preprocess
    assert (preprocess.mean, preprocess.std, preprocess.fit) == ((0.1,) * 3, (0.2,) * 3, "squash")
    assert preprocess.interpolation == "bilinear"


@pytest.mark.parametrize(
    ("given", "message"),
    [("ViT-L-14", "its tags differ. Name one of them"), ("timm:vit_base_patch16_224", "its tags differ"),
     ("ViT-L-14.nothing", "no tag nothing"), ("nothing", "no name of open_clip or timm"), ("", "no name of"),
     ("absent.json", "cannot be read"), ("timm:nothing.x", "no name of open_clip or timm")],
)  # fmt: skip
def test_what_is_neither_is_one_line(given: str, message: str, file: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        resolve_model("ViT-L-14", file, preprocess_as=given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", ["[]", "3", "{", '{"mean": [1], "crop_pct": 0.9}', '{"std": [0, 0, 0]}', '{"crop_pct": 0.9, "x": 1}',
                '{"crop_pct": "a"}', '{"crop_pct": 0}', '{"crop_mode": "random"}', '{"nonsense": 1}'],
)  # fmt: skip
def test_a_file_that_says_nothing_usable_is_one_line(content: str, file: str, tmp_path: Path) -> None:
    (tmp_path / "steps.json").write_text(content)
    with pytest.raises(ModelError) as caught:
        resolve_model("ViT-L-14", file, preprocess_as=str(tmp_path / "steps.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "resample": 3,
       "do_center_crop": True}, ("center", 0.875, (224, 224), (256, 256))),
     ({"size": {"height": 224, "width": 224}, "resample": 2}, ("squash", 1.0, (224, 224), (224, 224))),
     ({"size": 224, "resample": 2}, ("squash", 1.0, (224, 224), (224, 224))),
     ({"size": {"shortest_edge": 251}, "crop_size": 224, "do_center_crop": True},
      ("center", None, (224, 224), (251, 251)))],
)  # fmt: skip
def test_transformers_steps_are_spelled_as_timms(
    steps: dict[str, Any], wanted: tuple[Any, ...], tmp_path: Path
) -> None:
    config = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 518}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"no preprocessor_config\.json.*--preprocess"):
        resolve_model(str(tmp_path))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(steps))
    preprocess = resolve_model(str(tmp_path)).preprocess
    assert (preprocess.crop_mode, preprocess.size, preprocess.scale) == (wanted[0], wanted[2], wanted[3])
    assert wanted[1] is None or preprocess.crop_pct == wanted[1]


@pytest.mark.parametrize(
    "steps",
    [{"size": {"shortest_edge": 200}, "crop_size": 224, "do_center_crop": True}, {"size": {"longest_edge": 224}},
     {"size": {"height": 224, "width": 224}, "resample": 1}, {"size": 224, "do_normalize": False},
     {"size": 224, "rescale_factor": 1}, {"size": "a"}, {"size": None}],
    ids=str,
)  # fmt: skip
def test_transformers_steps_that_timm_lacks_are_refused(steps: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(steps))
    with pytest.raises(ModelError, match=r"--preprocess|preprocessing"):
        resolve_model(str(tmp_path), "random:0")


def test_a_config_beside_a_timm_file_says_it(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "model", VIT, make(VIT, img_size=32), size=32, img_size=32, cfg={"crop_pct": 0.8})
    source = resolve_model(f"timm:{VIT}", str(path / "model.safetensors"))
    assert source.preprocess.crop_pct == 0.8
    assert load_clip(str(path)).preprocess.crop_pct == 0.8


def test_a_config_beside_a_file_contradicts_another_construction(tmp_path: Path) -> None:
    """Of the same tensors: nothing else could tell them apart."""
    one = write_folder(tmp_path / "one", VIT, make(VIT, img_size=32), size=32, img_size=32)
    for change in ({"act_layer": "gelu_tanh"}, {"num_heads": 4}):
        other = write_folder(tmp_path / "other", VIT, None, size=32, img_size=32, **change)
        with pytest.raises(ModelError, match=f"beside model.safetensors says {next(iter(change))}.*--model {one}"):
            load_clip(str(other), str(one / "model.safetensors"))
    same = write_folder(tmp_path / "same", VIT, None, size=48, img_size=48, drop_path_rate=0.1)
    assert load_clip(str(same), str(one / "model.safetensors")).module.patch_embed.img_size == (48, 48)
