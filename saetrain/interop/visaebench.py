"""ViSAEBench's own layout: encoder.weight [F, D], encoder.bias [F], decoder.weight [F, D] and perhaps decoder.bias [D],
in sae.pt or model.safetensors with config.json or config.yaml beside it.

The decoder is [F, D] as in no other package that uses this name. The codes are chosen from relu(encoder x + bias): the
k largest; those of at least the threshold, which is the settings' or else _running_threshold or else 0; or those above
jump_thresholds [F], which are no logarithms here. Source: visaebench 0.1.0, `hub/sae_wrapper.py`.
"""

from pathlib import Path

import torch

from saetrain.config import VARIANTS
from saetrain.interop.constants import Statistics
from saetrain.interop.fields import check_fields, check_sizes, check_tensors, names
from saetrain.interop.files import find_settings, load_tensors, read_k, read_safetensors, read_settings, take
from saetrain.interop.foreign import build_sae
from saetrain.interop.overcomplete import COUNTS, FIELDS, RUNNING, WIDTHS, lower, read_threshold, read_variant
from saetrain.model import SAE

KNOWN = names("encoder.weight encoder.bias decoder.weight decoder.bias")
THRESHOLDS = ("jump_thresholds", "thresholds")
"""Two names of one tensor."""


def read(path: Path) -> SAE:
    """Read a checkpoint. Raises CorruptError, SettingsError."""
    settings = find_settings(path)
    tensors = read_safetensors(path) if path.suffix == ".safetensors" else load_tensors(path)
    config = read_settings(settings)
    check_fields(config, FIELDS, settings)
    variant = read_variant(config, settings)
    own = {"jumprelu": frozenset(THRESHOLDS), "batchtopk": names(RUNNING)}.get(variant, frozenset())
    check_tensors(tensors, KNOWN | own, path)
    encoder = take(tensors, path, {"encoder.weight": (None, None)})["encoder.weight"]
    n_latents, d_model = encoder.shape
    check_sizes(config, {**dict.fromkeys(WIDTHS, d_model), **dict.fromkeys(COUNTS, n_latents)}, settings)
    taken = take(tensors, path, {"encoder.bias": (n_latents,), "decoder.weight": (n_latents, d_model)})
    weights = {"encoder": encoder, "b_enc": taken["encoder.bias"], "decoder": taken["decoder.weight"]}
    weights["b_dec"] = torch.zeros(d_model)
    if "decoder.bias" in tensors:
        weights["b_dec"] = take(tensors, path, {"decoder.bias": (d_model,)})["decoder.bias"]
    if variant == "jumprelu":
        name = next((name for name in THRESHOLDS if name in tensors), THRESHOLDS[0])
        weights["threshold"] = take(tensors, path, {name: (n_latents,)})[name].clamp_min(0)
    if variant == "batchtopk":
        weights["threshold"] = lower(read_threshold({"backbone": None, **config}, tensors, path, settings))
    k = read_k(config.get("k"), n_latents, settings) if VARIANTS[variant].top_k else None
    return build_sae(variant, weights, centered=False, k=k)


def lacking(path: Path) -> Statistics:
    """The mean and one deviation of the patches of its training, which it keeps with the patches, not with the SAE."""
    return Statistics("variance", "patch")
