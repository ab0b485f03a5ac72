"""ViT-Prisma: weights.pt, a plain state dict, with config.json beside it; or one .pt of {"cfg": a pickled config,
"state_dict"}. W_enc [D, F], W_dec [F, D], b_dec [D]; standard: b_enc; gated: b_gate, r_mag, b_mag.

The activation is ReLU; a standard SAE may also keep the k largest and then apply ReLU. A token may be normalized by its
own mean and deviation, or its norm, before; where the settings do not say it, it is by the former, as in ViT-Prisma.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from actcache import CorruptError, HookPoint, SettingsError
from saetrain.config import TOKEN_NORMALIZATIONS
from saetrain.interop.fields import Fields, check_fields, check_sizes, check_tensors, names, shorten
from saetrain.interop.files import load_tensors, read_config, read_k, torch_bytes
from saetrain.interop.foreign import GATED, PLAIN, Names, build_sae, fold, give_weights, refuse, take_weights
from saetrain.interop.refusals import refuse_kind
from saetrain.model import SAE

CONFIG, WEIGHTS = "config.json", "weights.pt"
KINDS: dict[str, tuple[str, str, Names]] = {
    "relu": ("standard", "relu", PLAIN), "topk": ("standard", "topk", PLAIN), "gated": ("gated", "relu", GATED),
}  # fmt: skip
"""Variant -> architecture, activation, and the names of its tensors."""
FIELDS = Fields(
    "ViT-Prisma",
    used=names("architecture activation_fn_str activation_fn_kwargs normalize_activations is_transcoder d_in d_sae"),
    neutral=names(
        "model_class_name model_name vit_model_cfg model_path hook_point hook_point_layer layer_subtype context_size "
        "use_cached_activations use_patches_only cached_activations_path cls_token_only min_l0 min_explained_variance "
        "max_grad_norm initialization_method n_batches_in_buffer store_batch_size num_workers num_epochs "
        "total_training_images total_training_tokens total_training_steps image_size device seed dtype _device _dtype "
        "verbose b_dec_init_method expansion_factor from_pretrained_path l1_coefficient lp_norm lr lr_scheduler_name "
        "lr_warm_up_steps train_batch_size transcoder_with_skip_connection out_hook_point_layer layer_out_subtype "
        "d_out dataset_name dataset_path dataset_train_path dataset_val_path use_ghost_grads feature_sampling_window "
        "dead_feature_window dead_feature_threshold log_to_wandb wandb_project wandb_entity wandb_log_frequency "
        "n_validation_runs n_checkpoints checkpoint_path tokens_per_buffer resume run_name noise_scale"
    ),
    only={"hook_point_head_index": (None,)},
)
"""The settings of the whole training; those of a transcoder's output matter to transcoders only, which are refused."""


def read(path: Path) -> SAE:
    """Read the weights, given the file or its folder. Raises CorruptError, SettingsError."""
    file = path / WEIGHTS if path.is_dir() else path
    settings, content = file.parent / CONFIG, load_tensors(file)
    tensors = content.get("state_dict")
    if not isinstance(tensors, dict):
        return _read_parts(content, read_config(settings), file, settings)
    check_tensors(content, ("cfg", "config", "state_dict"), file)
    own = config_of(content)
    if settings.is_file() and own:
        beside = read_config(settings)
        differing = [name for name in sorted(FIELDS.used) if own.get(name) != beside.get(name)]
        if differing:
            raise CorruptError(
                f"{file} and {settings.name} beside it differ in {', '.join(differing)}. Move the wrong one away."
            )
    return _read_parts(tensors, own, file, file) if own else _read_parts(tensors, read_config(settings), file, settings)


def config_of(content: Mapping[str, object]) -> Mapping[str, object]:
    """The fields of the settings inside a checkpoint, whether they are a dict or an object; empty if there are none."""
    config = content.get("cfg", content.get("config"))
    fields: Mapping[str, object] = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    return fields


def _read_parts(tensors: Mapping[str, Any], config: Mapping[str, Any], file: Path, settings: Path) -> SAE:
    check_fields(config, FIELDS, settings)
    refuse_kind("transcoder" if config.get("is_transcoder") else None, settings)
    architecture, activation = config.get("architecture", "standard"), config.get("activation_fn_str", "relu")
    variant = next((name for name, kind in KINDS.items() if kind[:2] == (architecture, activation)), None)
    if variant is None:
        raise SettingsError(
            f"{settings} names a {shorten(architecture)} SAE with {shorten(activation)}, which is not supported. Give "
            "a standard SAE with relu or topk, or a gated one with relu."
        )
    normalize = config.get("normalize_activations", "layer_norm")
    normalize = "none" if normalize is None else normalize
    if not isinstance(normalize, str) or normalize not in ("none", *TOKEN_NORMALIZATIONS):
        raise SettingsError(
            f"{settings} normalizes its input by {shorten(normalize)}, which is not known. Give an SAE with one of "
            f"none, {', '.join(TOKEN_NORMALIZATIONS)}."
        )
    spelling = KINDS[variant][2]
    check_tensors(tensors, {*spelling.values(), "b_enc"}, file)  # its gated SAE has b_enc too, but does not use it
    weights, k = take_weights(tensors, file, spelling), None
    n_latents, d_model = weights["encoder"].shape
    check_sizes(config, {"d_in": d_model, "d_sae": n_latents}, settings)
    arguments = config.get("activation_fn_kwargs") or {}
    if activation == "topk":
        k = read_k(arguments.get("k") if isinstance(arguments, dict) else None, n_latents, settings)
    if not isinstance(arguments, dict):
        raise CorruptError(f"{settings}: activation_fn_kwargs must be an object, got {shorten(arguments)}.")
    check_fields(arguments, Fields("an activation of ViT-Prisma", names("k" if activation == "topk" else "")), settings)
    return build_sae(variant, weights, k=k, normalize=normalize)


def write(sae: SAE, hook_point: HookPoint) -> dict[str, bytes]:
    """File name -> bytes. The loader of ViT-Prisma accepts a plain config.json beside plain weights."""
    refuse(sae, "prisma", tuple(KINDS))
    architecture, activation, spelling = KINDS[sae.config.variant]
    tensors = give_weights(fold(sae, holds=TOKEN_NORMALIZATIONS), spelling)
    tensors.setdefault("b_enc", torch.zeros(sae.config.n_latents))  # its gated SAE has one too, but does not use it
    factor, rest = divmod(sae.config.n_latents, sae.d_model)
    config = {
        "architecture": architecture, "d_in": sae.d_model, "d_sae": sae.config.n_latents,
        "expansion_factor": [sae.config.n_latents / sae.d_model] if rest else factor,  # a single number gives d_sae
        "activation_fn_str": activation,
        "activation_fn_kwargs": {"k": sae.config.k} if sae.variant.exact_k else {},
        "normalize_activations": sae.config.normalize if sae.config.per_token else "none",
        "hook_point_layer": hook_point.layer, "layer_subtype": f"hook_{hook_point.site}",
        "l1_coefficient": sae.config.l1, "use_ghost_grads": False, "log_to_wandb": False,
        "dtype": {"__type__": "torch.dtype", "value": "torch.float32"},
        "device": {"__type__": "torch.device", "value": "cpu"},
    }  # fmt: skip
    return {CONFIG: json.dumps(config, indent=2).encode(), WEIGHTS: torch_bytes(tensors)}
