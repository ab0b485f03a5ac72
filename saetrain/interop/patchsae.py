"""PatchSAE: one .pt file, {"cfg": a pickled config object (older: "config"), "state_dict": W_enc [D, F], b_enc, W_dec
[F, D], b_dec}. A config that names an architecture is ViT-Prisma's.

The pickled object is read without running any code in the file.
"""

from pathlib import Path

import torch

from actcache import CorruptError, HookPoint
from saetrain.interop.fields import Fields, check_fields, check_sizes, check_tensors, names
from saetrain.interop.files import load_tensors, torch_bytes
from saetrain.interop.foreign import PLAIN, build_sae, fold, give_weights, refuse, take_weights
from saetrain.interop.prisma import config_of
from saetrain.model import SAE

WEIGHTS = "out.pt"
FIELDS = Fields(
    "PatchSAE",
    used=names("d_in d_sae"),
    neutral=names(
        "custom_clip_ckpt_path class_token image_width image_height model_name module_name block_layer dataset_path "
        "image_key label_key use_cached_activations cached_activations_path total_training_tokens training_examples "
        "activation_vectors_per_example n_batches_in_store store_size max_batch_size_for_vit_forward_pass "
        "create_dataloader device seed dtype b_dec_init_method expansion_factor from_pretrained_path topk_k topk_aux_k "
        "topk_aux_coefficient jumprelu_bandwidth jumprelu_init_threshold jumprelu_l0_coefficient matryoshka_sae "
        "matryoshka_levels matryoshka_min_group_fraction l1_coefficient lr lr_scheduler_name lr_warm_up_steps "
        "batch_size mse_cls_coefficient use_ghost_grads feature_sampling_window feature_sampling_method "
        "resample_batches "
        "feature_reinit_scale dead_feature_window dead_feature_estimation_method dead_feature_threshold log_to_wandb "
        "wandb_project wandb_entity wandb_log_frequency n_checkpoints checkpoint_path run_name experiment_metadata"
    ),
    only={
        **dict.fromkeys(("gated_sae", "topk_sae", "jumprelu_sae"), (False, None)),
        "normalize_activations": ("none", None), "sae_type": ("standard",),
    },
)  # fmt: skip
"""The settings of the whole training. `*_sae` choose another activation than ReLU."""


def read(path: Path) -> SAE:
    """Read a checkpoint of PatchSAE. Raises CorruptError, SettingsError (gated, normalizing)."""
    content = load_tensors(path)
    tensors = content.get("state_dict")
    if not isinstance(tensors, dict):
        raise CorruptError(f'{path} has no "state_dict". Give a checkpoint of PatchSAE or ViT-Prisma.')
    check_tensors(content, ("cfg", "config", "state_dict"), path)
    fields = config_of(content)
    check_fields(fields, FIELDS, path)
    check_tensors(tensors, PLAIN.values(), path)
    weights = take_weights(tensors, path, PLAIN)
    n_latents, d_model = weights["encoder"].shape
    check_sizes(fields, {"d_in": d_model, "d_sae": n_latents}, path)
    return build_sae("relu", weights)


def write(sae: SAE, hook_point: HookPoint) -> dict[str, bytes]:
    """File name -> bytes. The settings are a plain dict, which PatchSAE's loader accepts too."""
    refuse(sae, "patchsae", ("relu",))
    config = {
        "d_in": sae.d_model, "d_sae": sae.config.n_latents, "expansion_factor": sae.config.n_latents / sae.d_model,
        "l1_coefficient": sae.config.l1, "dtype": torch.float32, "device": "cpu", "gated_sae": False,
        "use_ghost_grads": True, "mse_cls_coefficient": 1.0, "class_token": False, "block_layer": hook_point.layer,
        "module_name": "resid", "model_name": "", "image_width": 224, "image_height": 224,
    }  # fmt: skip
    return {WEIGHTS: torch_bytes({"cfg": config, "state_dict": give_weights(fold(sae), PLAIN)})}
