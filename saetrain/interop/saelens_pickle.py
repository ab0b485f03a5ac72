"""SAELens before its folders (until May 2024): one .pt or .pkl.gz of {"cfg": the pickled settings of the training,
"state_dict": W_enc [D, F], b_enc, W_dec [F, D], b_dec}.

The codes are relu((x - b_dec) W_enc + b_enc). The pickled object is read without running any code in the file.
"""

from pathlib import Path

import torch

from actcache import CorruptError, SettingsError
from saetrain.interop.fields import Fields, check_fields, check_sizes, check_tensors, names
from saetrain.interop.files import read_flag, take
from saetrain.interop.foreign import PLAIN, build_sae, take_weights
from saetrain.interop.pickles import load_checkpoint
from saetrain.interop.prisma import config_of
from saetrain.interop.saelens import BEFORE_6
from saetrain.model import SAE

FACTOR = "scaling_factor"
FIELDS = Fields(
    "SAELens before May 2024",
    used=names("d_in d_sae apply_b_dec_to_input hook_point"),
    neutral=BEFORE_6.neutral
    | names(
        "total_training_tokens feature_sampling_method feature_reinit_scale start_pos_offset end_pos_offset "
        "resample_batches wandb_group"
    ),
    only={
        "hook_point_head_index": (None,), "activation_fn": ("relu",), "normalize_activations": (False, None, "none"),
        "finetuning_method": (None,),
    },
)  # fmt: skip


def read(path: Path) -> SAE:
    """Read a file. Raises CorruptError, SettingsError."""
    content = load_checkpoint(path)
    check_tensors(content, ("cfg", "state_dict"), path)
    tensors, config = content.get("state_dict"), config_of(content)
    if not isinstance(tensors, dict) or not config:
        raise CorruptError(f'{path} has no "cfg" or no "state_dict". Give a checkpoint of SAELens.')
    check_fields(config, FIELDS, path)
    if "hook_z" in str(config.get("hook_point")):
        raise SettingsError(f"{path} reads the outputs of attention heads (hook_z). Give an SAE of a residual stream.")
    check_tensors(tensors, {*PLAIN.values(), FACTOR}, path)
    weights = take_weights(tensors, path, PLAIN)
    n_latents, d_model = weights["encoder"].shape
    check_sizes(config, {"d_in": d_model, "d_sae": n_latents}, path)
    if FACTOR in tensors:
        factor = take(tensors, path, {FACTOR: (n_latents,)})[FACTOR]
        if not torch.equal(factor, torch.ones_like(factor)):
            raise SettingsError(f"{path} has {FACTOR}, and it is unclear whether it applies. Give another SAE.")
    return build_sae("relu", weights, centered=read_flag(dict(config), "apply_b_dec_to_input", True, path))
