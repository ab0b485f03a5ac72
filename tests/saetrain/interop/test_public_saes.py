"""SAEs in the layouts in which they were published: names, shapes, orientation and settings as the hub has them.

What is expected is computed here, by the formulas that docs/reference/public-saes.md gives, from the tensors alone.
"""

import gzip
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_files
import numpy as np
import pytest
import torch
from foreign_files import (
    COPIES,
    MSAE_STATE,
    D,
    F,
    K,
    Tensors,
    generic_tensors,
    msae_config,
    msae_tensors,
    plain_tensors,
    write,
)
from safetensors.torch import save_file
from torch import Tensor

from actcache import PipelineError
from saetrain import Run, convert
from saetrain.interop.constants import InputConstants
from saetrain.interop.formats import Foreign, read_foreign

Expected = tuple[Tensor, Tensor]
T = plain_tensors()


def rows(d: int = D, n: int = 64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(5)) * 1.5 + 0.3


def keep(z: Tensor, k: int) -> Tensor:
    return torch.where(z >= z.topk(k).values[:, -1:], z, 0)


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def check(foreign: Foreign, x: Tensor, expected: Expected) -> None:
    """The SAE and the formulas give the expected codes and reconstruction, to 1e-5 of the largest of them."""
    sae = foreign.sae
    at, latents, values = sae.encode(x)
    codes = torch.zeros(len(x), sae.config.n_latents).index_put_((at, latents), values)
    codes = codes if sae.norms is None else codes / sae.norms
    for ours, wanted in zip((codes, sae.decode(at, latents, values, len(x), like=x)), expected, strict=True):
        assert float((ours - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    for theirs, wanted in zip(foreign.forward(x), expected, strict=True):
        assert float((theirs - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def save(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# CLIP-Scope


def clipscope(path: Path, **more: Any) -> Path:
    tensors = {"pre_b": T["b_dec"], "enc": T["W_enc"], "dec": T["W_dec"]}
    fields = {"n_features": F, "d_in": D, "k": K, "epoch": 1, **more}
    return save(path / "20_resid" / "1200013184.pt", {"model_state_dict": tensors, **fields})


def test_clipscope_reads_raw_activations_as_its_package_does(tmp_path: Path) -> None:
    foreign, x = read_foreign(clipscope(tmp_path)), rows()
    codes = keep((x - T["b_dec"]) @ T["W_enc"], K)
    check(foreign, x, (codes, codes @ T["W_dec"] + T["b_dec"]))
    assert foreign.format == "clipscope"
    assert "raw activations" in foreign.notes[0]
    assert not foreign.lacks_constants  # so that nothing is estimated unasked


def test_what_is_in_no_file_is_said_and_recorded(tmp_path: Path, planted_store: Path) -> None:
    made = convert(clipscope(tmp_path), tmp_path / "run", store=planted_store, layer=0, any_model=True)
    notes = read_foreign(tmp_path / "20_resid").notes
    assert made.notes[: len(notes)] == notes
    assert Run.open(made.path).artifact.provenance["notes"] == list(notes)
    estimated = convert(write("visaebench topk", tmp_path / "in"), tmp_path / "other", store=planted_store)
    assert "estimated from" in str(estimated.input)
    assert "notes" not in Run.open(estimated.path).artifact.provenance


def test_clipscope_reads_normalized_activations_with_constants(tmp_path: Path) -> None:
    x, g = rows(), torch.Generator().manual_seed(1)
    mean, deviation = torch.randn(D, generator=g), torch.rand(D, generator=g) + 0.5
    constants = InputConstants(mean.double().numpy(), 1 / deviation.double().numpy(), "given")
    codes = keep(((x - mean) / deviation - T["b_dec"]) @ T["W_enc"], K)
    expected = codes, (codes @ T["W_dec"] + T["b_dec"]) * deviation + mean
    check(read_foreign(clipscope(tmp_path), constants), x, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Universal SAE

UNIVERSAL = {
    "SigLIP": (768, -0.030537, 2.231515), "DinoV2": (384, 0.032905, 2.474064), "ViT": (768, -0.028633, 2.137650),
}  # fmt: skip


def universal(path: Path, d: int, f: int = 96) -> tuple[Path, Tensors]:
    g = torch.Generator().manual_seed(2)
    block = "encoder.final_block."
    p = {
        f"{block}0.weight": torch.randn(f, d, generator=g) / d**0.5, f"{block}0.bias": torch.randn(f, generator=g) / 4,
        f"{block}1.weight": torch.rand(f, generator=g) + 0.5, f"{block}1.bias": torch.randn(f, generator=g) / 4,
        f"{block}1.running_mean": torch.randn(f, generator=g),
        f"{block}1.running_var": torch.rand(f, generator=g) + 0.2,
        f"{block}1.num_batches_tracked": torch.tensor(1000), "dictionary._weights": torch.randn(f, d, generator=g),
    }  # fmt: skip
    optimizer = {"state": {0: {"step": torch.tensor(9.0)}}, "param_groups": [{"lr": 3e-4, "betas": (0.9, 0.999)}]}
    content = {"epoch": 29, "model_state_dict": p, "optimizer_state_dict": optimizer, "learning_rate": 1e-6}
    return save(path, content), p


def encode_universal(p: Tensors, x: Tensor) -> Tensor:
    z = x @ p["encoder.final_block.0.weight"].T + p["encoder.final_block.0.bias"]
    norm = {name: p[f"encoder.final_block.1.{name}"] for name in ("weight", "bias", "running_mean", "running_var")}
    z = (z - norm["running_mean"]) / (norm["running_var"] + 1e-5).sqrt() * norm["weight"] + norm["bias"]
    return keep(z.relu(), 32)


@pytest.mark.parametrize("tower", UNIVERSAL)
def test_universal_saes_standardize_as_was_published(tmp_path: Path, tower: str) -> None:
    d, m, s = UNIVERSAL[tower]
    path, p = universal(tmp_path / f"uni_{tower}_checkpoint_29.pth", d)
    foreign, x = read_foreign(path), rows(d)
    codes = encode_universal(p, (x - m) / (s + 1e-5))
    expected = codes, (codes @ unit(p["dictionary._weights"])) * (s + 1e-5) + m
    check(foreign, x, expected)
    assert not foreign.lacks_constants
    assert any(f"{m:.6f}" in note and tower in note for note in foreign.notes)
    assert ("14 x 14" in " ".join(foreign.notes)) == (tower == "DinoV2")


def test_a_universal_sae_of_another_name_lacks_its_constants(tmp_path: Path) -> None:
    path, p = universal(tmp_path / "mine.pth", 32)
    foreign, x = read_foreign(path), rows()
    assert foreign.lacks_constants
    codes = encode_universal(p, (x - 0.5) * 2)
    given = foreign.with_constants(InputConstants(np.array(0.5), np.array(2.0), "given"))
    check(given, x, (codes, codes @ unit(p["dictionary._weights"]) / 2 + 0.5))


# ---------------------------------------------------------------------------------------------------------------------
# MSAE

MSAE = {
    f"{F}_{D}_TopKReLU_{K}_RW_False_False_0.0_cc3m_ViT-L~14_train_image_2905936_{D}.pth": ("topk", False),
    f"{F}_{D}_TopKReLU_{K}_UW_True_False_0.0_cc3m.pth": ("topk", True),
    f"{F}_{D}_TopK_{K}_False_False_0.0_cc3m.pth": ("topk", False),
    f"{F}_{D}_ReLU_03_False_False_0.0_cc3m.pth": ("relu", False),
    f"{F}_{D}_BatchTopKReLU_{K}_False_False_0.0_cc3m.pt": ("relu", False),
}
"""Name of the file -> activation, and whether the decoder is the encoder."""


@pytest.mark.parametrize("name", MSAE)
def test_msae_keeps_its_settings_in_its_name(tmp_path: Path, name: str) -> None:
    activation, tied = MSAE[name]
    tensors = {key: value for key, value in msae_tensors().items() if not (tied and key == "decoder")}
    foreign, x = read_foreign(save(tmp_path / name, {"model": {**tensors, **MSAE_STATE}, **msae_config()})), rows()
    mean, s = msae_config()["mean_center"], msae_config()["scaling_factor"]
    z = ((x - mean) * s - T["b_dec"]) @ T["W_enc"] + T["b_enc"]
    codes = keep(z, K).relu() if activation == "topk" else z.relu()
    decoder = T["W_enc"].T if tied else T["W_dec"]
    check(foreign, x, (codes, (codes @ decoder + T["b_dec"]) / s + mean))
    assert foreign.format == "msae"
    assert bool(foreign.notes) == ("Batch" in name)


# ---------------------------------------------------------------------------------------------------------------------
# Discover-then-Name


@pytest.mark.parametrize("dot", ["._", "."])
@pytest.mark.parametrize("axis", [True, False])
def test_discover_then_name_is_read_with_and_without_its_axis(tmp_path: Path, axis: bool, dot: str) -> None:
    tensors = {
        "tied_bias": T["b_dec"], f"encoder{dot}weight": T["W_enc"].T, f"encoder{dot}bias": T["b_enc"],
        f"decoder{dot}weight": T["W_dec"].T, **dict.fromkeys(COPIES, T["b_dec"]),
    }  # fmt: skip
    content = {name: value[None] if axis else value for name, value in tensors.items()}
    foreign, x = read_foreign(save(tmp_path / "sparse_autoencoder_final.pt", content)), rows()
    codes = ((x - T["b_dec"]) @ T["W_enc"] + T["b_enc"]).relu()
    check(foreign, x, (codes, codes @ T["W_dec"] + T["b_dec"]))


# ---------------------------------------------------------------------------------------------------------------------
# ViSAEBench

YAML = f"""activation_dir: /mnt/NAS/activations/clip_vitb16/layer_11/
architecture: %s
backbone: clip_vitb16
batch_size: 4096
d_model: {D}
dict_size: {F}
expansion_factor: 16
k: {K}
lr: 0.001
num_epochs: 3
seed: 42
total_steps: 52734
"""


def visaebench_folder(path: Path, tensors: Tensors, config: dict[str, Any] | str, name: str = "sae.pt") -> Path:
    folder = path / "batchtopk_16x_k128"
    folder.mkdir()
    if name.endswith(".safetensors"):
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, folder / name)
    else:
        torch.save(tensors, folder / name)
    is_yaml = isinstance(config, str)
    (folder / ("config.yaml" if is_yaml else "config.json")).write_text(config if is_yaml else json.dumps(config))
    return folder


VISAEBENCH: dict[str, tuple[dict[str, Any] | str, Tensors, str, Callable[[Tensor], Tensor]]] = {
    "topk": (
        {"backbone": "clip_vitb16", "activation": "TopK", "input_dim": D, "hidden_dim": F, "k": K}, {}, "sae.pt",
        lambda z: keep(z, K),
    ),
    "a threshold in the settings": (
        {"backbone": "mae_vitb16", "architecture": "batchtopk", "k": K, "threshold": 0.7, "expansion_factor": 8},
        {"_running_threshold": torch.tensor(9.0)}, "sae.pt", lambda z: z * (z >= 0.7),
    ),
    "a threshold in the tensors": (YAML % "batchtopk", {"_running_threshold": torch.tensor(0.7)}, "sae.pt",
                                   lambda z: z * (z >= 0.7)),
    "no threshold": ({"backbone": "deit_vitb16", "architecture": "batchtopk", "k": K}, {}, "sae.pt", lambda z: z),
    "thresholds": (
        YAML % "jumprelu", {"jump_thresholds": torch.linspace(0, 1, F)}, "sae.pt",
        lambda z: z * (z > torch.linspace(0, 1, F)),
    ),
    "safetensors": (
        {"backbone": "siglip_vitb16", "sae_type": "topk", "k": K}, {}, "model.safetensors", lambda z: keep(z, K),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VISAEBENCH)
def test_visaebench_is_read_in_its_own_layout(tmp_path: Path, name: str) -> None:
    config, more, file, choose = VISAEBENCH[name]
    tensors = generic_tensors() | more
    foreign, x = read_foreign(visaebench_folder(tmp_path, tensors, config, file)), rows()
    codes = choose((x @ T["W_enc"] + T["b_enc"]).relu())
    check(foreign, x, (codes, codes @ T["W_dec"] + T["b_dec"]))
    assert foreign.format == "visaebench"
    assert foreign.lacks_constants
    assert bool(foreign.notes) == (name == "no threshold")


@pytest.mark.parametrize("normalization", ["l2", "max_l2", "l1", "max_l1", "identity"])
def test_visaebench_is_read_with_the_names_of_overcomplete(tmp_path: Path, normalization: str) -> None:
    tensors = foreign_files.overcomplete_tensors(_running_threshold=torch.tensor(0.9))
    settings = YAML % "batchtopk" + f"normalization: '{normalization}'\n"
    foreign, x = read_foreign(visaebench_folder(tmp_path, tensors, settings)), rows()
    z = (x @ T["W_enc"] + T["b_enc"]).relu()
    codes, w = z * (z >= 0.9), T["W_dec"]
    lengths = {"l1": w.abs().sum(1, keepdim=True), "l2": w.norm(dim=1, keepdim=True), "identity": torch.ones(1)}
    scale = lengths[normalization.removeprefix("max_")]
    scale = scale.max() if normalization.startswith("max") else scale
    check(foreign, x, (codes, codes @ (w / scale) * np.exp(0.4)))
    assert foreign.format == "overcomplete"
    assert foreign.lacks_constants


# ---------------------------------------------------------------------------------------------------------------------
# What descends from PatchSAE's and SAELens' code: {"cfg" or "config", "state_dict"}


def pickled(monkeypatch: pytest.MonkeyPatch, module: str, name: str, fields: dict[str, Any]) -> object:
    """An object of the class `module.name`, which can be pickled until the test ends."""
    kind = type(name, (), {"__module__": module})
    for depth in range(1, module.count(".") + 2):
        part = ".".join(module.split(".")[:depth])
        monkeypatch.setitem(sys.modules, part, type(sys)(part))
    setattr(sys.modules[module], name, kind)
    made = kind()
    made.__dict__.update(fields)
    return made


PICKLED = {
    "PatchSAE": ("patchsae", "src.sae_training.config", "ViTSAERunnerConfig", "cfg", "out.pt"),
    "PatchSAE before": ("patchsae", "sae_training.config", "Config", "config", "out.pt"),
    "ConceptScope": (
        "patchsae", "src.sae_training.config", "Config", "config", "clip-vit-large-patch14_-2_resid_32768.pt",
    ),
    "SAELens .pt": (
        "saelens_pickle", "sae_training.config", "LanguageModelSAERunnerConfig", "cfg",
        "final_sparse_autoencoder_gpt2-small_blocks.1.hook_resid_pre_40.pt",
    ),
    "SAELens .pkl.gz": (
        "saelens_pickle", "sae_lens.training.config", "LanguageModelSAERunnerConfig", "cfg", "final.pkl.gz",
    ),
    "ViT-Prisma": (
        "prisma", "vit_prisma.sae.config", "VisionModelSAERunnerConfig", "cfg", "n_images_2600058.pt",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLED)
def test_pickled_settings_are_read_without_their_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    format_name, module, kind, key, file = PICKLED[name]
    fields = {
        "patchsae": {"d_in": D, "d_sae": F, "block_layer": -2, "module_name": "resid", "dtype": torch.float32},
        "saelens_pickle": foreign_files.training_of_2024(),
        "prisma": {"architecture": "standard", "d_in": D, "normalize_activations": None, "hook_point_layer": 3},
    }[format_name]
    path = tmp_path / file
    with monkeypatch.context() as patch:
        content = {key: pickled(patch, module, kind, fields), "state_dict": T}
        if file.endswith("gz"):
            with gzip.open(path, "wb") as stream:
                pickle.dump(content, stream)
        else:
            torch.save(content, path)
    foreign, x = read_foreign(path), rows()
    codes = ((x - T["b_dec"]) @ T["W_enc"] + T["b_enc"]).relu()
    check(foreign, x, (codes, codes @ T["W_dec"] + T["b_dec"]))
    assert foreign.format == format_name


def test_prisma_is_found_by_the_number_of_its_images(tmp_path: Path) -> None:
    """As its CLIP SAEs lie on the hub: the settings beside a file whose name counts the images."""
    config = {
        "model_class_name": "HookedViT", "model_name": "open-clip:laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K",
        "hook_point_layer": 5, "layer_subtype": "hook_resid_post", "context_size": 50, "cls_token_only": False,
        "d_in": D, "d_sae": F, "expansion_factor": 64, "activation_fn_str": "relu", "activation_fn_kwargs": {},
        "architecture": "standard", "normalize_activations": None, "is_transcoder": False,
        "dtype": {"__type__": "torch.dtype", "value": "torch.float32"}, "device": "cuda", "out_hook_point_layer": 0,
        "transcoder_with_skip_connection": True, "layer_out_subtype": "hook_mlp_out", "d_out": 768,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    save(tmp_path / "n_images_2600058.pt", T)
    foreign, x = read_foreign(tmp_path), rows()
    codes = ((x - T["b_dec"]) @ T["W_enc"] + T["b_enc"]).relu()
    check(foreign, x, (codes, codes @ T["W_dec"] + T["b_dec"]))
    assert foreign.format == "prisma"
    save(tmp_path / "n_images_5200116.pt", T)
    with pytest.raises(PipelineError, match=r"2 checkpoints \('n_images_2600058.pt', 'n_images_5200116.pt'\)"):
        read_foreign(tmp_path)
    assert read_foreign(tmp_path / "n_images_5200116.pt").format == "prisma"


# ---------------------------------------------------------------------------------------------------------------------
# dictionary_learning and sparsify, in the folders in which they were published


@pytest.mark.parametrize("subset", ["patches", "registers_only"])
def test_a_dictionary_of_registers_says_what_it_really_reads(tmp_path: Path, subset: str) -> None:
    folder = tmp_path / f"enc_res_out_layer_11_top_k_{F}_{K}_0.1_x" / "trainer_0"
    config = foreign_files.trainer(
        "AutoEncoderTopK", k=K, lm_name="facebook/dinov2-with-registers-base", layer=11, submodule_name="resid"
    )
    tensors = foreign_files.linear_tensors(k=torch.tensor(K), threshold=torch.tensor(-1.0))
    foreign_files.write_dictionary_learning(folder, config, tensors)
    run = {"run": {"token_subset": subset, "num_register_tokens": 4}}
    (folder / "config.json").write_text(json.dumps({"trainer": config, "buffer": {}, **run}))
    foreign, x = read_foreign(folder), rows()
    codes = keep(((x - T["b_dec"]) @ T["W_enc"] + T["b_enc"]).relu(), K)
    check(foreign, x, (codes, codes @ T["W_dec"] + T["b_dec"]))
    assert ("last patches" in " ".join(foreign.notes)) == (subset == "registers_only")
    assert read_foreign(folder / "ae.pt").format == "dictionary_learning"


def test_sparsify_is_read_from_the_folder_of_its_layer(tmp_path: Path) -> None:
    folder = tmp_path / "vision_model.encoder.layers.10"
    config = {
        "expansion_factor": 32, "normalize_decoder": True, "num_latents": F, "k": K, "multi_topk": False,
        "skip_connection": False, "transcode": False, "activation": "topk", "d_in": D,
    }  # fmt: skip
    names = {"encoder.weight": T["W_enc"].T, "encoder.bias": T["b_enc"], "W_dec": T["W_dec"], "b_dec": T["b_dec"]}
    foreign_files.write_sparsify(folder, config, names)
    codes = keep(((rows() - T["b_dec"]) @ T["W_enc"] + T["b_enc"]).relu(), K)
    check(read_foreign(folder), rows(), (codes, codes @ T["W_dec"] + T["b_dec"]))
    assert read_foreign(folder / "sae.safetensors").format == "sparsify"
