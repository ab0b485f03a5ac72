"""SAELens: every architecture that has positive codes, as its training and its inference files, and the older layouts.

The package still reads the layouts of May 2024 to 2025, so what it computes of those is its own reading too. They are
written here by hand, as the versions of then wrote them. What 6.54 itself no longer loads, the single files before May
2024 and the factor of a finetuned SAE, is compared with formulas in test_fields.py.
"""

import json
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, saes
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import save_file
from shared import D, F, K, keep, read_arguments, shake
from torch import Tensor

SHAPE = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu"}
SCALE = 1.7


def make_all() -> dict[str, Any]:
    """Name -> an SAE in training."""
    return {
        "standard": saes.StandardTrainingSAE(saes.StandardTrainingSAEConfig(**SHAPE)),
        "standard-uncentered": saes.StandardTrainingSAE(
            saes.StandardTrainingSAEConfig(apply_b_dec_to_input=False, **SHAPE)
        ),
        "gated": saes.GatedTrainingSAE(saes.GatedTrainingSAEConfig(**SHAPE)),
        "topk": saes.TopKTrainingSAE(saes.TopKTrainingSAEConfig(k=K, **SHAPE)),
        "topk-unscaled": saes.TopKTrainingSAE(
            saes.TopKTrainingSAEConfig(k=K, rescale_acts_by_decoder_norm=False, **SHAPE)
        ),
        "jumprelu": saes.JumpReLUTrainingSAE(saes.JumpReLUTrainingSAEConfig(**SHAPE)),
        "batchtopk": saes.BatchTopKTrainingSAE(saes.BatchTopKTrainingSAEConfig(k=K, **SHAPE)),
        "matryoshka": MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(k=K, matryoshka_widths=[F // 4, F], **SHAPE)
        ),
        **{
            name: saes.StandardTrainingSAE(saes.StandardTrainingSAEConfig(normalize_activations=name, **SHAPE))
            for name in ("layer_norm", "constant_norm_rescale")
        },
    }


def compute(sae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    codes = sae.encode(x)
    return codes, sae.decode(codes)


def write_older(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    path.mkdir()
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, path / "sae_weights.safetensors")
    (path / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": F, **config}))


def older() -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """Name -> the settings and tensors of versions before 6."""
    made = {name: dict(sae.state_dict()) for name, sae in make_all().items()}
    shared = {"model_name": "gpt2-small", "prepend_bos": True, "context_size": 128, "dataset_path": "x/y"}
    of_2024_05 = {
        **shared, "hook_point": "blocks.1.hook_resid_pre", "hook_point_layer": 1, "hook_point_head_index": None,
        "activation_fn_str": "relu", "apply_b_dec_to_input": True, "finetuning_scaling_factor": False,
        "dtype": "torch.float32", "device": "cpu", "normalize_activations": False,
    }  # fmt: skip
    of_3 = {
        **shared, "hook_name": "blocks.1.hook_resid_pre", "hook_layer": 1, "hook_head_index": None,
        "activation_fn_str": "relu", "apply_b_dec_to_input": True, "finetuning_scaling_factor": False,
        "dtype": "float32", "device": "cpu", "normalize_activations": "none", "sae_lens_training_version": "3.13.0",
        "dataset_trust_remote_code": True,
    }  # fmt: skip
    of_5 = {**of_3, "activation_fn_kwargs": {}, "sae_lens_training_version": "5.10.2", "neuronpedia_id": None}
    generator = torch.Generator().manual_seed(3)
    shaken = {
        name: {key: value + 0.2 * torch.randn(value.shape, generator=generator) for key, value in tensors.items()}
        for name, tensors in made.items()
    }
    plain = shaken["standard"]
    gated = shaken["gated"]
    jumping = {**plain, "threshold": torch.linspace(0, 1, F)}
    return {
        "2024-05": (of_2024_05, {**plain, "scaling_factor": torch.ones(F)}),
        "3-standard": (of_3, plain),
        "3-uncentered": (of_3 | {"apply_b_dec_to_input": False}, plain),
        "3-gated": (of_3 | {"architecture": "gated"}, gated),
        "3-jumprelu": (of_3 | {"architecture": "jumprelu"}, jumping),
        "5-topk": (of_5 | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}, plain),
        "5-topk-named": (
            of_5 | {"architecture": "topk", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}, plain,
        ),
    }  # fmt: skip


def main() -> None:
    x, out = read_arguments()
    for name, sae in make_all().items():
        shake(sae)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(0.8)
        sae.save_model(out / f"{name}-training")
        sae.save_inference_model(out / name)
        codes, decoded = compute(SAE.load_from_disk(out / name, device="cpu"), x)
        keep(out, name, codes, decoded)
        keep(
            out, f"{name}-training", codes, decoded
        )  # which the package evaluates only after turning it into the other
    scaled = make_all()["standard"]
    shake(scaled)
    scaled.cfg.normalize_activations = "expected_average_only_in"
    scaled.save_model(out / "standard-scaled")
    ActivationScaler(SCALE).save(str(out / "standard-scaled" / "activation_scaler.json"))
    scaled.fold_activation_norm_scaling_factor(SCALE)
    keep(out, "standard-scaled", *compute(scaled, x))
    for name, (config, tensors) in older().items():
        write_older(out / name, config, tensors)
        keep(out, name, *compute(SAE.load_from_disk(out / name, device="cpu"), x))


if __name__ == "__main__":
    with torch.no_grad():
        main()
