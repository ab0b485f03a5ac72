"""sparsify (EleutherAI): a folder with cfg.json and sae.safetensors. encoder.weight [F, D], encoder.bias, W_dec [F, D],
b_dec. The codes are the k largest of relu(encoder (x - b_dec) + bias).
"""

import json
from pathlib import Path

from safetensors.torch import save

from actcache import HookPoint
from saetrain.interop.fields import Fields, check_fields, check_sizes, check_tensors, names
from saetrain.interop.files import read_config, read_k, read_safetensors
from saetrain.interop.foreign import build_sae, fold, give_weights, refuse, take_weights
from saetrain.interop.refusals import refuse_kind
from saetrain.model import SAE

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
NAMES = {"encoder": "encoder.weight", "b_enc": "encoder.bias", "decoder": "W_dec", "b_dec": "b_dec"}
FIELDS = Fields(
    "sparsify",
    used=names("k d_in num_latents expansion_factor"),
    neutral=names("normalize_decoder multi_topk lookup_max_order gram_table_hash"),
    only={"activation": ("topk",), **dict.fromkeys(
        ("skip_connection", "transcode", "embed_skip", "gram_lookup", "signed"), (False,)
    )},
)  # fmt: skip


def read(path: Path) -> SAE:
    """Read a folder. Raises CorruptError, and SettingsError for a transcoder or another activation."""
    file, settings = path / WEIGHTS, path / CONFIG
    config, tensors = read_config(settings), read_safetensors(file)
    refuse_kind("transcoder" if config.get("transcode") is True else None, settings)
    check_fields(config, FIELDS, settings)
    check_tensors(tensors, NAMES.values(), file)
    weights = take_weights(tensors, file, NAMES)
    n_latents, d_model = weights["encoder"].shape
    check_sizes(config, {"d_in": d_model}, settings)
    if config.get("num_latents"):  # otherwise the expansion factor tells their number
        check_sizes(config, {"num_latents": n_latents}, settings)
    elif "expansion_factor" in config:
        check_sizes(config, {"expansion_factor": n_latents // d_model}, settings)
    return build_sae("topk", weights, k=read_k(config.get("k"), n_latents, settings))


def write(sae: SAE, hook_point: HookPoint) -> dict[str, bytes]:
    """File name -> bytes."""
    refuse(sae, "sparsify", ("topk",))
    config = {
        "activation": "topk", "expansion_factor": sae.config.n_latents // sae.d_model, "normalize_decoder": False,
        "num_latents": sae.config.n_latents, "k": sae.config.k, "multi_topk": False, "skip_connection": False,
        "transcode": False, "d_in": sae.d_model,
    }  # fmt: skip
    return {CONFIG: json.dumps(config, indent=2).encode(), WEIGHTS: save(give_weights(fold(sae), NAMES))}
