"""lasgroup's TopKSAE of CLIP embeddings: config.json and model.safetensors, as PyTorchModelHubMixin writes them.

W_enc [D, F], b_enc, W_dec [F, D] whose rows are divided by their norms before they decode, b_dec [D] or none; also
counters of the training. The k largest pre-activations are kept without a ReLU, so a code can be negative, and the
parity report shows whether the checkpoint has any. It reads embeddings of unit length, so each token is divided by its
norm first. Source: patrikwolf/ttt_theory, `sae/sae_topk.py`.
"""

from pathlib import Path

import torch

from saetrain.interop.fields import Fields, check_fields, check_sizes, check_tensors, names
from saetrain.interop.files import read_config, read_flag, read_k, read_safetensors
from saetrain.interop.foreign import PLAIN, build_sae, take_weights
from saetrain.model import SAE

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FIELDS = Fields(
    "lasgroup's TopKSAE",
    used=names("input_dim hidden_dim k normalize_decoder decoder_bias"),
    neutral=names("use_ghost_grads ghost_threshold ghost_weight"),
)
COUNTERS = names("feature_counts total_samples")


def read(path: Path) -> SAE:
    """Read a folder. Raises CorruptError, SettingsError."""
    file, settings = path / WEIGHTS, path / CONFIG
    config, tensors = read_config(settings), dict(read_safetensors(file))
    check_fields(config, FIELDS, settings)
    check_tensors(tensors, {*PLAIN.values(), *COUNTERS}, file)
    if not read_flag(config, "decoder_bias", True, settings) and "W_dec" in tensors:
        tensors.setdefault("b_dec", torch.zeros(tensors["W_dec"].shape[-1]))
    weights = take_weights(tensors, file, PLAIN)
    n_latents, d_model = weights["encoder"].shape
    check_sizes(config, {"input_dim": d_model, "hidden_dim": n_latents}, settings)
    if read_flag(config, "normalize_decoder", True, settings):
        weights["decoder"] = torch.nn.functional.normalize(weights["decoder"])
    root = d_model**0.5  # x / ||x|| is what constant_norm_rescale gives, over sqrt(D)
    scaled = {
        "encoder": weights["encoder"] / root, "decoder": weights["decoder"] * root, "b_dec": weights["b_dec"] * root,
    }  # fmt: skip
    k = read_k(config.get("k"), n_latents, settings)
    return build_sae("topk", {**weights, **scaled}, centered=False, k=k, normalize="constant_norm_rescale")
