"""PatchSAE: one .pt file, {"cfg": a pickled config object (older: "config"), "state_dict": W_enc [D, F], b_enc, W_dec
[F, D], b_dec}. A config that names an architecture is ViT-Prisma's.

The pickled object is read without running any code in the file.
"""

from pathlib import Path

import torch
from torch import Tensor

from actcache import CorruptError, HookPoint, SettingsError
from saetrain.interop import prisma
from saetrain.interop.files import load_tensors, torch_bytes
from saetrain.interop.foreign import PLAIN, Foreign, build_sae, fold, give_weights, refuse, take_weights
from saetrain.model import SAE

WEIGHTS = "out.pt"


def read(path: Path) -> Foreign:
    """Read a checkpoint of PatchSAE or ViT-Prisma. Raises CorruptError, SettingsError (gated, normalizing)."""
    content = load_tensors(path)
    tensors, config = content.get("state_dict"), content.get("cfg", content.get("config"))
    if config is None and (path.parent / prisma.CONFIG).is_file():
        return prisma.read(path)
    if not isinstance(tensors, dict):
        raise CorruptError(f'{path} has no "state_dict". Give a checkpoint of PatchSAE or ViT-Prisma.')
    fields = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    if "architecture" in fields:
        return prisma.read_parts(tensors, fields, path)
    if fields.get("gated_sae"):
        raise SettingsError(f"{path} is a gated SAE, which cannot be read in this format. Give a plain ReLU SAE.")
    if fields.get("normalize_activations", "none") not in ("none", None):
        raise SettingsError(
            f"{path} normalizes each token (normalize_activations), which is not supported. Give an SAE without it."
        )
    weights = take_weights(tensors, path, PLAIN)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = ((x - weights["b_dec"]) @ weights["encoder"].T + weights["b_enc"]).relu()
        return codes, codes @ weights["decoder"] + weights["b_dec"]

    return Foreign("patchsae", build_sae("relu", weights), forward)


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
