"""Small checkpoints of every foreign format, written as the packages write them, to be varied by the tests."""

import gzip
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D, F, K = 32, 40, 5
Tensors = dict[str, Tensor]
Config = dict[str, Any]
Write = Callable[[Path, Config, Tensors], Path]


def plain_tensors(seed: int = 0, *, unit: bool = False) -> Tensors:
    g = torch.Generator().manual_seed(seed)
    tensors = {
        "W_enc": torch.randn(D, F, generator=g) / 4, "b_enc": torch.randn(F, generator=g) / 4,
        "W_dec": torch.randn(F, D, generator=g), "b_dec": torch.randn(D, generator=g),
    }  # fmt: skip
    if unit:
        tensors["W_dec"] = torch.nn.functional.normalize(tensors["W_dec"])
    return tensors


def linear_tensors(**more: Tensor) -> Tensors:
    t = plain_tensors()
    return {
        "encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "decoder.weight": t["W_dec"].T, "b_dec": t["b_dec"],
        **more,
    }  # fmt: skip


def write_safetensors(path: Path, tensors: Tensors) -> None:
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path)


def write_saelens(path: Path, config: Config, tensors: Tensors) -> Path:
    path.mkdir(parents=True)
    write_safetensors(path / "sae_weights.safetensors", tensors)
    (path / "cfg.json").write_text(json.dumps(config))
    return path


def write_dictionary_learning(path: Path, config: Config, tensors: Tensors) -> Path:
    path.mkdir(parents=True)
    torch.save(tensors, path / "ae.pt")
    (path / "config.json").write_text(json.dumps({"trainer": config, "buffer": {"refresh_batch_size": 32}}))
    return path


def write_sparsify(path: Path, config: Config, tensors: Tensors) -> Path:
    path.mkdir(parents=True)
    write_safetensors(path / "sae.safetensors", tensors)
    (path / "cfg.json").write_text(json.dumps(config))
    return path


def write_saev(path: Path, config: Config, tensors: Tensors) -> Path:
    path.mkdir(parents=True)
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    header = {"schema": 5, "cfg": config, "commit": "abc", "lib": "0.3"}
    (path / "sae.pt").write_bytes(json.dumps(header).encode() + b"\n" + buffer.getvalue())
    return path


def write_prisma(path: Path, config: Config, tensors: Tensors) -> Path:
    path.mkdir(parents=True)
    torch.save(tensors, path / "weights.pt")
    (path / "config.json").write_text(json.dumps(config))
    return path


def write_patchsae(path: Path, config: Config, tensors: Tensors) -> Path:
    path.mkdir(parents=True)
    torch.save({"cfg": config, "state_dict": tensors}, path / "out.pt")
    return path


def write_overcomplete(path: Path, config: Config, tensors: Tensors) -> Path:
    path.mkdir(parents=True)
    torch.save(tensors, path / "sae.pt")
    (path / "config.json").write_text(json.dumps(config))
    return path


def write_lasgroup(path: Path, config: Config, tensors: Tensors) -> Path:
    path.mkdir(parents=True)
    write_safetensors(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps(config))
    return path


def overcomplete_tensors(*, norm: bool = False, **more: Tensor) -> Tensors:
    tensors = plain_tensors()
    block = "encoder.final_block."
    norms = {"weight": torch.linspace(0.5, 2, F), "bias": torch.linspace(-1, 1, F),
             "running_mean": torch.linspace(-2, 2, F), "running_var": torch.linspace(0.1, 3, F)}  # fmt: skip
    return {
        f"{block}0.weight": tensors["W_enc"].T, f"{block}0.bias": tensors["b_enc"],
        "dictionary._weights": tensors["W_dec"], "dictionary.multiplier": torch.tensor(0.4),
        **({f"{block}1.{name}": value for name, value in norms.items()} if norm else {}), **more,
    }  # fmt: skip


def write_file(name: str, entry: str = "", **more: Any) -> Write:
    """Writes one file of that name: the tensors and `more` under `entry`, and the settings beside that."""

    def write(path: Path, config: Config, tensors: Tensors) -> Path:
        path.mkdir(parents=True)
        content = {entry: {**tensors, **more}, **config} if entry else {**tensors, **more, **config}
        torch.save(content, path / name)
        return path

    return write


def write_discover_then_name(path: Path, config: Config, tensors: Tensors) -> Path:
    """Two more names have the bias again, and all have an axis of the one component."""
    bias = {name: tensors["tied_bias"] for name in COPIES if "tied_bias" in tensors}
    alone = {name: value[None] for name, value in {**tensors, **bias}.items()}
    return write_file("sparse_autoencoder_final.pt")(path, config, alone)


def write_pickle(path: Path, config: Config, tensors: Tensors) -> Path:
    path.mkdir(parents=True)
    with gzip.open(path / "final_sparse_autoencoder_gpt2-small_40.pkl.gz", "wb") as file:
        pickle.dump({"cfg": config, "state_dict": tensors}, file)
    return path


def write_yaml(path: Path, config: Config, tensors: Tensors) -> Path:
    """As ViSAEBench's training writes them: one setting a line."""
    path.mkdir(parents=True)
    torch.save(tensors, path / "sae.pt")
    lines = [f"{name}: {json.dumps(value).strip(chr(34))}" for name, value in sorted(config.items())]
    (path / "config.yaml").write_text("\n".join(lines) + "\n")
    return path


BLOCK = "encoder.final_block."
COPIES = ("pre_encoder_bias._bias_reference", "post_decoder_bias._bias_reference")
MSAE_STATE = {"latents_activation_frequency": torch.arange(F)}
MSAE_NAME = f"{F}_{D}_TopKReLU_{K}_RW_False_False_0.0_cc3m_ViT-L~14_train_image_2905936_{D}.pth"


def msae_config() -> Config:
    return {"mean_center": torch.linspace(-1, 1, D), "scaling_factor": 0.3, "target_norm": np.sqrt(D)}


def msae_tensors() -> Tensors:
    t = plain_tensors()
    return {"encoder": t["W_enc"], "decoder": t["W_dec"], "pre_bias": t["b_dec"], "latent_bias": t["b_enc"]}


def generic_tensors(**more: Tensor) -> Tensors:
    """ViSAEBench's own names: the decoder is [F, D]."""
    t = plain_tensors()
    return {
        "encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "decoder.weight": t["W_dec"],
        "decoder.bias": t["b_dec"], **more,
    }  # fmt: skip


def training_of_2024(**more: Any) -> Config:
    """Settings of SAELens in March 2024, which it pickled as an object."""
    return {
        "model_name": "gpt2-small", "hook_point": "blocks.1.hook_resid_pre", "hook_point_layer": 1,
        "hook_point_head_index": None, "dataset_path": "x/y", "is_dataset_tokenized": False, "context_size": 128,
        "use_cached_activations": False, "cached_activations_path": None, "d_in": D, "d_sae": F,
        "n_batches_in_buffer": 128, "total_training_tokens": 300_000_000, "store_batch_size": 32, "device": "cpu",
        "seed": 42, "dtype": torch.float32, "b_dec_init_method": "geometric_median", "expansion_factor": 1.25,
        "from_pretrained_path": None, "l1_coefficient": 8e-5, "lp_norm": 1, "lr": 4e-4,
        "lr_scheduler_name": "constantwithwarmup", "lr_warm_up_steps": 5000, "train_batch_size": 4096,
        "use_ghost_grads": True, "feature_sampling_window": 2500, "dead_feature_window": 5000,
        "dead_feature_threshold": 1e-8, "log_to_wandb": True, "wandb_project": "x", "wandb_entity": None,
        "wandb_log_frequency": 100, "n_checkpoints": 10, "checkpoint_path": "checkpoints/abc",
        "tokens_per_buffer": 67108864, "run_name": "40-L1", "start_pos_offset": None, "end_pos_offset": None, **more,
    }  # fmt: skip


def visaebench(architecture: str, **more: Any) -> Config:
    return {
        "backbone": "clip_vitb16", "architecture": architecture, "d_model": D, "expansion_factor": 16, "dict_size": F,
        "k": K, "lr": 0.001, "batch_size": 4096, "num_epochs": 3, "total_steps": 52734, "seed": 42,
        "activation_dir": "/mnt/x: y/layer_11", **more,
    }  # fmt: skip


def saelens_6(architecture: str, **more: Any) -> Config:
    metadata = {"sae_lens_version": "6.54.12", "hook_name": "blocks.0.hook_resid_post", "model_name": "x"}
    return {
        "architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32", "device": "cuda",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": metadata, **more,
    }  # fmt: skip


def saelens_5(**more: Any) -> Config:
    return {
        "architecture": "standard", "d_in": D, "d_sae": F, "dtype": "torch.float32", "device": "cuda",
        "model_name": "gpt2-small", "hook_name": "blocks.0.hook_resid_post", "hook_layer": 0, "hook_head_index": None,
        "activation_fn_str": "relu", "activation_fn_kwargs": {}, "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False, "sae_lens_training_version": "5.10.2", "prepend_bos": True,
        "dataset_path": "x/y", "dataset_trust_remote_code": True, "context_size": 128, "normalize_activations": "none",
        "neuronpedia_id": None, "model_from_pretrained_kwargs": {}, "seqpos_slice": [None], **more,
    }  # fmt: skip


GATED = {"b_mag": torch.full((F,), 0.3), "r_mag": torch.linspace(-1, 1, F)}


def gated_tensors() -> Tensors:
    tensors = plain_tensors()
    return {**{name: tensors[name] for name in ("W_enc", "W_dec", "b_dec")}, "b_gate": tensors["b_enc"], **GATED}


def trainer(kind: str, **more: Any) -> Config:
    return {
        "dict_class": kind, "trainer_class": "x", "activation_dim": D, "dict_size": F, "lr": 1e-4, "steps": 100,
        "layer": 0, "lm_name": "y", "submodule_name": "z", "seed": 0, "device": "cuda", **more,
    }  # fmt: skip


def saev_config(name: str, **params: Any) -> Config:
    return {"d_model": D, "d_sae": F, "seed": 0, "normalize_w_dec": True, "activation": {"cls": name, "params": params}}


K_TENSOR, THRESHOLD = torch.tensor(K, dtype=torch.int), torch.tensor(1.1)
CHECKPOINTS: dict[str, tuple[Write, Callable[[], Config], Callable[[], Tensors]]] = {
    "saelens 6 standard": (write_saelens, lambda: saelens_6("standard"), plain_tensors),
    "saelens 6 topk": (write_saelens, lambda: saelens_6("topk", k=K), plain_tensors),
    "saelens 6 topk rescaled": (
        write_saelens, lambda: saelens_6("topk", k=K, rescale_acts_by_decoder_norm=True), plain_tensors,
    ),
    "saelens 6 jumprelu": (
        write_saelens, lambda: saelens_6("jumprelu"), lambda: plain_tensors() | {"threshold": torch.linspace(0, 1, F)},
    ),
    "saelens 6 gated": (write_saelens, lambda: saelens_6("gated"), gated_tensors),
    "saelens 6 batchtopk in training": (
        write_saelens, lambda: saelens_6("batchtopk", k=float(K), rescale_acts_by_decoder_norm=True),
        lambda: plain_tensors() | {"topk_threshold": torch.tensor(2.0, dtype=torch.float64)},
    ),
    "saelens 6 layer_norm": (
        write_saelens, lambda: saelens_6("standard", normalize_activations="layer_norm"), plain_tensors,
    ),
    "saelens 6 constant_norm_rescale": (
        write_saelens, lambda: saelens_6("topk", k=K, normalize_activations="constant_norm_rescale"), plain_tensors,
    ),
    "saelens 5 relu": (write_saelens, saelens_5, plain_tensors),
    "saelens 5 topk": (
        write_saelens, lambda: saelens_5(activation_fn_str="topk", activation_fn_kwargs={"k": K}), plain_tensors,
    ),
    "saelens 5 finetuned": (
        write_saelens, lambda: saelens_5(finetuning_scaling_factor=True),
        lambda: plain_tensors() | {"scaling_factor": torch.linspace(0.5, 2, F)},
    ),
    "saelens 5 gated": (write_saelens, lambda: saelens_5(architecture="gated"), gated_tensors),
    "dictionary_learning AutoEncoder": (
        write_dictionary_learning, lambda: trainer("AutoEncoder"),
        lambda: {("bias" if name == "b_dec" else name): value for name, value in linear_tensors().items()},
    ),
    "dictionary_learning AutoEncoderNew": (
        write_dictionary_learning, lambda: trainer("AutoEncoderNew"),
        lambda: {("decoder.bias" if name == "b_dec" else name): value for name, value in linear_tensors().items()},
    ),
    "dictionary_learning TopK": (
        write_dictionary_learning, lambda: trainer("AutoEncoderTopK", k=K),
        lambda: linear_tensors(k=K_TENSOR, threshold=torch.tensor(-1.0)),
    ),
    "dictionary_learning TopK without k": (
        write_dictionary_learning, lambda: trainer("AutoEncoderTopK", k=K), linear_tensors,
    ),
    "dictionary_learning BatchTopK": (
        write_dictionary_learning, lambda: trainer("BatchTopKSAE", k=K),
        lambda: linear_tensors(k=K_TENSOR, threshold=THRESHOLD),
    ),
    "dictionary_learning Matryoshka": (
        write_dictionary_learning,
        lambda: trainer("MatryoshkaBatchTopKSAE", k=K, group_sizes=[10, 30], group_fractions=[0.25, 0.75]),
        lambda: plain_tensors() | {"k": K_TENSOR, "threshold": THRESHOLD, "group_sizes": torch.tensor([10, 30])},
    ),
    "dictionary_learning JumpRelu": (
        write_dictionary_learning, lambda: trainer("JumpReluAutoEncoder", bandwidth=0.001),
        lambda: plain_tensors() | {"threshold": torch.linspace(0, 1, F)},
    ),
    "dictionary_learning Gated": (
        write_dictionary_learning, lambda: trainer("GatedAutoEncoder", l1_penalty=0.1),
        lambda: {
            "encoder.weight": plain_tensors()["W_enc"].T, "decoder.weight": plain_tensors()["W_dec"].T,
            "decoder_bias": plain_tensors()["b_dec"], "gate_bias": plain_tensors()["b_enc"], "mag_bias": GATED["b_mag"],
            "r_mag": GATED["r_mag"],
        },
    ),
    "sparsify": (
        write_sparsify,
        lambda: {"activation": "topk", "expansion_factor": 1, "num_latents": F, "k": K, "d_in": D, "transcode": False},
        lambda: {
            "encoder.weight": plain_tensors()["W_enc"].T, "encoder.bias": plain_tensors()["b_enc"],
            "W_dec": plain_tensors()["W_dec"], "b_dec": plain_tensors()["b_dec"],
        },
    ),
    "saev relu": (write_saev, lambda: saev_config("Relu", key="relu"), plain_tensors),
    "saev topk": (write_saev, lambda: saev_config("TopK", top_k=K), plain_tensors),
    "saev batchtopk": (
        write_saev, lambda: saev_config("BatchTopK", top_k=K),
        lambda: plain_tensors() | {"activation.threshold": torch.tensor(1.3)},
    ),
    "prisma relu": (
        write_prisma, lambda: {"architecture": "standard", "normalize_activations": None, "d_in": D, "d_sae": F},
        plain_tensors,
    ),
    "prisma topk": (
        write_prisma,
        lambda: {
            "architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K},
            "normalize_activations": "none", "context_size": 50, "l1_coefficient": 1e-4,
        },
        plain_tensors,
    ),
    "prisma gated": (
        write_prisma, lambda: {"architecture": "gated", "normalize_activations": "none", "d_in": D}, gated_tensors,
    ),
    "prisma layer_norm, because nothing else is said": (
        write_prisma, lambda: {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}, plain_tensors,
    ),
    "prisma gated constant_norm_rescale": (
        write_prisma, lambda: {"architecture": "gated", "normalize_activations": "constant_norm_rescale"},
        gated_tensors,
    ),
    "lasgroup": (
        write_lasgroup,
        lambda: {"input_dim": D, "hidden_dim": F, "k": K, "normalize_decoder": True, "use_ghost_grads": True},
        plain_tensors,
    ),
    "lasgroup without a decoder's bias": (
        write_lasgroup, lambda: {"k": K, "decoder_bias": False, "normalize_decoder": False},
        lambda: {name: value for name, value in plain_tensors().items() if name != "b_dec"},
    ),
    "overcomplete topk": (
        write_overcomplete, lambda: {"architecture": "topk", "k": K, "d_model": D, "dict_size": F, "seed": 0},
        overcomplete_tensors,
    ),
    "overcomplete topk with BatchNorm": (
        write_overcomplete, lambda: {"sae_type": "topk", "k": K}, lambda: overcomplete_tensors(norm=True),
    ),
    "overcomplete batchtopk": (
        write_overcomplete, lambda: {"activation": "batchtopk", "k": K, "threshold": 1.1, "backbone": "clip_vitb16"},
        overcomplete_tensors,
    ),
    "overcomplete jumprelu": (
        write_overcomplete, lambda: {"architecture": "jumprelu"},
        lambda: overcomplete_tensors(thresholds=torch.linspace(-3, 0.5, F)),
    ),
    "overcomplete as ViSAEBench trains it": (
        write_overcomplete, lambda: visaebench("batchtopk"),
        lambda: overcomplete_tensors(_running_threshold=torch.tensor(1.1)),
    ),
    "overcomplete with another normalization": (
        write_overcomplete, lambda: {"architecture": "topk", "k": K, "normalization": "max_l2"}, overcomplete_tensors,
    ),
    "visaebench topk": (write_overcomplete, lambda: visaebench("topk"), generic_tensors),
    "visaebench batchtopk": (
        write_overcomplete, lambda: visaebench("batchtopk", threshold=1.1), generic_tensors,
    ),
    "visaebench jumprelu": (
        write_overcomplete, lambda: {"backbone": "mae_vitb16", "sae_type": "jumprelu", "input_dim": D},
        lambda: generic_tensors(jump_thresholds=torch.linspace(0.1, 1.5, F)),
    ),
    "clipscope": (
        write_file("1200013184.pt", "model_state_dict"), lambda: {"n_features": F, "d_in": D, "k": K, "epoch": 3},
        lambda: {
            "pre_b": plain_tensors()["b_dec"], "enc": plain_tensors()["W_enc"], "dec": plain_tensors()["W_dec"],
        },
    ),
    "universal_sae": (
        write_file("checkpoint_29.pth", "model_state_dict", **{f"{BLOCK}1.num_batches_tracked": torch.tensor(7)}),
        lambda: {
            "epoch": 29, "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 3e-4}]}, "learning_rate": 3e-4,
        },
        lambda: {
            name: value for name, value in overcomplete_tensors(norm=True).items() if "multiplier" not in name
        },
    ),
    "msae": (write_file(MSAE_NAME, "model", **MSAE_STATE), msae_config, msae_tensors),
    "discover_then_name": (
        write_discover_then_name, dict,
        lambda: {
            "tied_bias": plain_tensors()["b_dec"], "encoder._weight": plain_tensors()["W_enc"].T,
            "encoder._bias": plain_tensors()["b_enc"], "decoder._weight": plain_tensors()["W_dec"].T,
        },
    ),
    "saelens_pickle": (write_pickle, training_of_2024, plain_tensors),
    "dictionary_learning as a fork spells it": (
        write_dictionary_learning,
        lambda: trainer("MatroyshkaBatchTopKSAE", k=K, group_sizes=[10, 30], group_fractions=[0.25, 0.75]),
        lambda: plain_tensors() | {"k": K_TENSOR, "threshold": THRESHOLD, "group_sizes": torch.tensor([10, 30])},
    ),
    "patchsae": (
        write_patchsae, lambda: {"d_in": D, "d_sae": F, "gated_sae": False, "dtype": torch.float32, "block_layer": 10},
        plain_tensors,
    ),
}  # fmt: skip
"""Name -> how it is written, its settings, its tensors."""


def write(name: str, path: Path, config: Config | None = None, tensors: Tensors | None = None) -> Path:
    make, settings, weights = CHECKPOINTS[name]
    return make(path, settings() if config is None else config, weights() if tensors is None else tensors)
