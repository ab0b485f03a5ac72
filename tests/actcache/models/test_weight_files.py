"""Weights are read from every kind of file that people have, to the same model; nothing in a file is ever run."""

import copy
import io
import json
import math
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from actcache import ModelError
from actcache.models import load_clip

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def tensors(tiny_model: dict[str, str]) -> Tensors:
    return load_file(tiny_model["pretrained"])


@pytest.fixture(scope="module")
def model_id(tiny_model: dict[str, str]) -> str:
    return load_clip(**tiny_model).model_id


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()}


def to_transformers(tensors: Tensors) -> Tensors:
    """open_clip's names to those of transformers' CLIPModel, written from its module tree."""
    out: Tensors = {"logit_scale": tensors["logit_scale"]}
    for ours, theirs, tower in (("visual.", "vision_model", "vision"), ("", "text_model", "text")):
        blocks = f"{ours}transformer.resblocks."
        for name, value in tensors.items():
            if name.startswith(blocks):
                number, rest = name.removeprefix(blocks).split(".", 1)
                place = f"{theirs}.encoder.layers.{number}."
                if rest.startswith("attn.in_proj_"):
                    for letter, part in zip("qkv", value.chunk(3), strict=True):
                        out[f"{place}self_attn.{letter}_proj.{rest.removeprefix('attn.in_proj_')}"] = part.clone()
                else:
                    for old, new in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"),
                                     ("mlp.c_proj", "mlp.fc2"), ("attn.out_proj", "self_attn.out_proj")):  # fmt: skip
                        rest = rest.replace(old, new)
                    out[place + rest] = value
        for kind in ("weight", "bias"):
            last, final = (
                ("visual.ln_post", "post_layernorm") if tower == "vision" else ("ln_final", "final_layer_norm")
            )
            out[f"{theirs}.{final}.{kind}"] = tensors[f"{last}.{kind}"]
            if tower == "vision":
                out[f"{theirs}.pre_layrnorm.{kind}"] = tensors[f"visual.ln_pre.{kind}"]
        out[f"{theirs}.embeddings.position_embedding.weight"] = tensors[f"{ours}positional_embedding"]
    out["vision_model.embeddings.class_embedding"] = tensors["visual.class_embedding"]
    out["vision_model.embeddings.patch_embedding.weight"] = tensors["visual.conv1.weight"]
    out["text_model.embeddings.token_embedding.weight"] = tensors["token_embedding.weight"]
    out["visual_projection.weight"] = tensors["visual.proj"].T.contiguous()
    out["text_projection.weight"] = tensors["text_projection"].T.contiguous()
    out["vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    return out


def save_script(tensors: Tensors, path: Path, config: dict[str, Any], *, half: bool = False) -> None:
    """A TorchScript archive as OpenAI's, with its three numbers as buffers."""
    clip = open_clip.CLIP(**copy.deepcopy(config)).eval()
    clip.load_state_dict(tensors)
    for name, number in (("input_resolution", 24), ("context_length", 77), ("vocab_size", 49408)):
        if hasattr(clip, name):
            delattr(clip, name)
        clip.register_buffer(name, torch.tensor(number))
    clip = clip.half() if half else clip

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and tracing warns of shapes
        image = torch.zeros(1, 3, 24, 24, dtype=clip.logit_scale.dtype)
        traced = torch.jit.trace_module(clip, {"encode_image": image}, check_trace=False)
        torch.jit.save(traced, path)


WRAPPED: dict[str, Callable[[Tensors], Any]] = {
    "state_dict": lambda t: {"state_dict": t, "epoch": 3, "optimizer": {"state": {}}},
    "model": lambda t: {"model": t, "args": None},
    "model_state_dict": lambda t: {"model_state_dict": t},
    "model in state_dict": lambda t: {"state_dict": {"model": t}},
    "module.": lambda t: prefixed(t, "module."),
    "_orig_mod.": lambda t: prefixed(t, "_orig_mod."),
    "module._orig_mod.": lambda t: {"state_dict": prefixed(t, "module._orig_mod.")},
    "_orig_mod.module.": lambda t: {"model": prefixed(t, "_orig_mod.module.")},
    "transformers": to_transformers,
    "transformers, compiled": lambda t: {"state_dict": prefixed(to_transformers(t), "_orig_mod.")},
    "logit_scale as a vector": lambda t: t | {"logit_scale": t["logit_scale"].reshape(1)},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_state_dict_is_found_under_what_wraps_it(
    tmp_path: Path, tiny_model: dict[str, str], tensors: Tensors, model_id: str, name: str
) -> None:
    torch.save(WRAPPED[name](dict(tensors)), tmp_path / "weights.pt")
    assert load_clip(tiny_model["model"], str(tmp_path / "weights.pt")).model_id == model_id


def test_safetensors_of_transformers_are_read(
    tmp_path: Path, tiny_model: dict[str, str], tensors: Tensors, model_id: str
) -> None:
    save_file(to_transformers(tensors), tmp_path / "model.safetensors")
    assert load_clip(tiny_model["model"], str(tmp_path / "model.safetensors")).model_id == model_id


def test_a_folder_of_transformers_is_a_model(tmp_path: Path, tiny_model: dict[str, str], tensors: Tensors) -> None:
    save_file(to_transformers(tensors), tmp_path / "model.safetensors")
    vision = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2,
              "image_size": 24, "patch_size": 8}  # fmt: skip
    text = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "clip", "projection_dim": 16, "vision_config": vision, "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config))
    preprocess = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 2, "size": {"height": 24, "width": 24},
                  "do_center_crop": False}  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocess))
    clip = load_clip(str(tmp_path))
    assert (clip.preprocess.std, clip.preprocess.resize_mode) == ((0.25, 0.25, 0.25), "squash")
    assert clip.config["quick_gelu"]  # transformers' default, which config.json leaves out
    assert torch.equal(clip.module.visual.proj, tensors["visual.proj"])
    with pytest.raises(ModelError, match=r"beside model\.safetensors says quick_gelu True"):
        load_clip(tiny_model["model"], str(tmp_path / "model.safetensors"))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocess | {"resample": 1}))
    with pytest.raises(ModelError, match="preprocess_cfg"):
        load_clip(str(tmp_path))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_torchscript_archives_are_read_without_running_them(
    tmp_path: Path, tiny_model: dict[str, str], tensors: Tensors, quick_gelu: bool, half: bool
) -> None:
    config = json.loads(Path(tiny_model["model"]).read_text()) | {"quick_gelu": quick_gelu}
    (tmp_path / "same.json").write_text(json.dumps(config))
    (tmp_path / "other.json").write_text(json.dumps(config | {"quick_gelu": not quick_gelu}))
    save_script(tensors, tmp_path / "clip.pt", config, half=half)
    clip = load_clip(str(tmp_path / "same.json"), str(tmp_path / "clip.pt"))
    for name, value in clip.module.state_dict().items():
        assert torch.equal(value, tensors[name].half().float() if half else tensors[name]), name
    with pytest.raises(ModelError, match=r"clip\.pt was trained .*QuickGELU"):
        load_clip(str(tmp_path / "other.json"), str(tmp_path / "clip.pt"))


class Malice:
    def __init__(self, what: Any, *arguments: Any) -> None:
        self.call = what, arguments

    def __reduce__(self) -> Any:
        return self.call


def as_archive(path: Path, data: bytes, code: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("clip/data.pkl", data)
        archive.writestr("clip/constants.pkl", pickle.dumps(()))
        archive.writestr("clip/code/__torch__.py", code)
    return path


def test_no_pickle_in_an_archive_is_run(tmp_path: Path, tiny_model: dict[str, str]) -> None:
    witness = tmp_path / "witness"
    bad = {
        "system": pickle.dumps(Malice(os.system, f"touch {witness}"), 2),
        "eval": pickle.dumps({"a": Malice(eval, f"open({str(witness)!r}, 'w')")}),
        "path": pickle.dumps(Malice(Path.touch, witness)),
        "torch": pickle.dumps(Malice(torch.load, str(witness))),
        "module's code": b"\x80\x02c__torch__\nsystem\n(S'touch'\ntR.",
        "getattr": b"cbuiltins\ngetattr\n(c__torch__.x\nY\nS'__init__'\ntR.",
        "not a pickle": b"hello",
        "cut": pickle.dumps([1, 2])[:-3],
        "deep": b"(" * 100_000 + b".",
        "no module": pickle.dumps(3),
    }
    for name, data in bad.items():
        with pytest.raises(ModelError, match="cannot be loaded") as caught:
            load_clip(tiny_model["model"], str(as_archive(tmp_path / "bad.pt", data, "torch.save(1, 'x')")))
        assert "\n" not in str(caught.value), name
    assert not witness.exists()


def test_tensors_of_an_archive_stay_inside_their_storage(
    tmp_path: Path, tiny_model: dict[str, str], tensors: Tensors
) -> None:
    save_script(tensors, tmp_path / "clip.pt", json.loads(Path(tiny_model["model"]).read_text()))
    with zipfile.ZipFile(tmp_path / "clip.pt") as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    largest = max((name for name in entries if "/data/" in name), key=lambda name: len(entries[name]))
    for name, data in ((largest, entries[largest][:100]), (largest, None)):
        changed = entries | {name: data} if data is not None else {k: v for k, v in entries.items() if k != name}
        with zipfile.ZipFile(tmp_path / "bad.pt", "w") as archive:
            for key, value in changed.items():
                archive.writestr(key, value)
        with pytest.raises(ModelError, match=r"bad\.pt cannot be loaded"):
            load_clip(tiny_model["model"], str(tmp_path / "bad.pt"))


def test_files_that_hold_no_weights_are_refused(tmp_path: Path, tiny_model: dict[str, str], tensors: Tensors) -> None:
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\0" * (1 << 26))
    (tmp_path / "bomb.pt").write_bytes(bomb.getvalue())
    contents: dict[str, Any] = {
        "list.pt": [1], "nothing.pt": {}, "numbers.pt": {"a": 1}, "both.pt": {"model": dict(tensors), "state_dict": {}},
        "names.pt": {1: torch.zeros(2)}, "sparse.pt": tensors | {"logit_scale": torch.zeros(2).to_sparse()},
        "left.pt": tensors | {"adapter.weight": torch.zeros(3)},
        "missing.pt": {name: value for name, value in tensors.items() if "ln_post" not in name},
        "complex.pt": tensors | {"logit_scale": torch.zeros((), dtype=torch.complex64)},
        "half mapped.pt": {k: v for k, v in to_transformers(dict(tensors)).items() if "k_proj" not in k},
    }  # fmt: skip
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    for name in (*contents, "bomb.pt", "arrays.npz"):
        with pytest.raises(ModelError, match="cannot be loaded") as caught:
            load_clip(tiny_model["model"], str(tmp_path / name))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 700
    with pytest.raises(ModelError, match=r"left over: adapter\.weight"):
        load_clip(tiny_model["model"], str(tmp_path / "left.pt"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, -1e30])
@pytest.mark.parametrize("name", ["logit_scale", "visual.proj", "token_embedding.weight", "visual.ln_pre.bias"])
def test_numbers_that_overflow_are_refused(
    tmp_path: Path, tiny_model: dict[str, str], tensors: Tensors, name: str, value: float
) -> None:
    bad = tensors[name].clone()
    bad.view(-1)[-1] = value
    save_file(tensors | {name: bad}, tmp_path / "bad.safetensors")
    with pytest.raises(ModelError, match=f"{name} holds numbers that are not finite"):
        load_clip(tiny_model["model"], str(tmp_path / "bad.safetensors"))


HOSTILE: list[tuple[str, Any]] = [
    ("vision_cfg", None), ("text_cfg", None), ("vision_cfg", []), ("text_cfg", 3), ("embed_dim", 0),
    ("embed_dim", 10**400),
    ("embed_dim", None), ("quick_gelu", "yes"), ("vision_cfg.patch_size", 0), ("vision_cfg.patch_size", -8),
    ("vision_cfg.patch_size", [0, 8]), ("vision_cfg.patch_size", [8]), ("vision_cfg.patch_size", 48),
    ("vision_cfg.head_width", 0), ("vision_cfg.head_width", 33), ("vision_cfg.width", 10**9),
    ("vision_cfg.layers", 10**9), ("vision_cfg.layers", 0), ("vision_cfg.layers", True), ("vision_cfg.layers", 2.5),
    ("vision_cfg.image_size", 10**12), ("vision_cfg.image_size", "24"), ("vision_cfg.mlp_ratio", math.nan),
    ("vision_cfg.mlp_ratio", 1e300), ("vision_cfg.nonsense", 1), ("vision_cfg.act_kwargs", 3),
    ("text_cfg.vocab_size", 10**15), ("text_cfg.vocab_size", 10**7), ("text_cfg.layers", 10**6), ("text_cfg.heads", 0),
    ("text_cfg.heads", 3), ("text_cfg.width", 0), ("text_cfg.context_length", 10**9), ("text_cfg.context_length", -1),
    ("text_cfg.context_length", None), ("text_cfg.pool_type", "x"), ("init_logit_scale", "a"), ("nonsense", 1),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value"), HOSTILE, ids=lambda value: str(value)[:24])
def test_a_config_out_of_bounds_is_one_line(tmp_path: Path, tiny_model: dict[str, str], place: str, value: Any) -> None:
    config = json.loads(Path(tiny_model["model"]).read_text())
    if place == "text_cfg.vocab_size" and value == 10**7:
        config["text_cfg"] |= {"width": 65536, "heads": 1}  # in bounds each, but 2,600 GB together
    *outer, key = place.split(".")
    (config[outer[0]] if outer else config)[key] = value
    with open(tmp_path / "bad.json", "w") as file:
        json.dump(config, file)
    with pytest.raises(ModelError) as caught:
        load_clip(str(tmp_path / "bad.json"), "random:0")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


NO_CONFIG = ["", "[]", "3", '"x"', "[" * 100_000, '{"model_cfg": null}', '{"model_cfg": []}', "{}", "{" + "\0" * 99]


@pytest.mark.parametrize("text", [*NO_CONFIG, '{"embed_dim": ' + "9" * 5000 + "}"], ids=lambda text: text[:12])
def test_a_file_that_is_no_config_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ModelError) as caught:
        load_clip(str(tmp_path / "bad.json"), "random:0")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


MAKE = """
import sys, torch
from transformers import CLIPConfig, CLIPModel
torch.manual_seed(0)
config = CLIPConfig(
    projection_dim=16,
    vision_config=dict(hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, image_size=24,
                       patch_size=8, hidden_act=sys.argv[2], projection_dim=16),
    text_config=dict(hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=49408,
                     hidden_act=sys.argv[2], projection_dim=16, eos_token_id=49407, bos_token_id=49406))
model = CLIPModel(config).eval()
with torch.no_grad():
    for value in model.parameters():
        value.add_(0.05 * torch.randn_like(value))
model.save_pretrained(sys.argv[1])
pixels, ids = torch.load(sys.argv[1] + "/inputs.pt")
with torch.no_grad():
    outputs = model(pixel_values=pixels, input_ids=ids)
torch.save((outputs.image_embeds, outputs.text_embeds), sys.argv[1] + "/outputs.pt")
"""


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_transformers_own_clip_computes_the_same(
    tmp_path: Path, activation: str, run_peers: Callable[..., str]
) -> None:
    ids = open_clip.SimpleTokenizer(context_length=77)(["a dog", "a photo of two cats"])
    pixels = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    torch.save((pixels, ids), tmp_path / "inputs.pt")
    run_peers("-c", MAKE, tmp_path, activation)
    clip = load_clip(str(tmp_path))
    assert clip.config["quick_gelu"] == (activation == "quick_gelu")
    images, texts = torch.load(tmp_path / "outputs.pt")
    with torch.no_grad():
        torch.testing.assert_close(clip.module.encode_image(pixels, normalize=True), images, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(clip.module.encode_text(ids, normalize=True), texts, rtol=1e-4, atol=1e-5)
