"""CLIP-Scope: one .pt of {"model_state_dict": pre_b [D], enc [D, F], dec [F, D]; n_features, d_in, k}.

The codes are the k largest of (x - pre_b) enc, without a ReLU, and the reconstruction is codes dec + pre_b. The
package (clipscope 0.1.8) gives raw activations to it, and so does this reader; its training normalized each channel by
the batch's mean and deviation (sache, `train.py`), which are in no file. With these constants the codes of the training
come out.
"""

from pathlib import Path

import torch

from saetrain.interop.fields import Fields, check_fields, check_sizes, check_tensors, names
from saetrain.interop.files import load_tensors, read_k, take_state
from saetrain.interop.foreign import build_sae, take_weights
from saetrain.model import SAE

STATE = "model_state_dict"
NAMES = {"encoder": "enc", "decoder": "dec", "b_dec": "pre_b"}
FIELDS = Fields(
    "CLIP-Scope",
    used=names(f"{STATE} n_features d_in k"),
    neutral=names("epoch optimizer_state_dict token_count dead_latents n_iter log_id"),
)


def read(path: Path) -> SAE:
    """Read a file, on raw activations. Raises CorruptError, SettingsError."""
    content = load_tensors(path)
    check_fields(content, FIELDS, path)
    tensors = take_state(content, STATE, path)
    check_tensors(tensors, NAMES.values(), path)
    weights = take_weights(tensors, path, NAMES)
    n_latents, d_model = weights["encoder"].shape
    check_sizes(content, {"d_in": d_model, "n_features": n_latents}, path)
    weights["b_enc"] = torch.zeros(n_latents)
    return build_sae("topk", weights, k=read_k(content.get("k"), n_latents, path))


def remark(path: Path) -> tuple[str, ...]:
    return (
        "It reads raw activations, as its package gives them to it, unless --input-mean and --input-scale are given. "
        "In its training each channel was normalized by its mean and deviation, which are in no file.",
    )
