"""sparsify (EleutherAI): a folder with cfg.json and sae.safetensors. encoder.weight [F, D], encoder.bias, W_dec [F, D],
b_dec. The codes are the k largest of relu(encoder (x - b_dec) + bias).
"""

import json
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from actcache import HookPoint, SettingsError
from saetrain.interop.files import read_config, read_k, read_safetensors
from saetrain.interop.foreign import Foreign, build_sae, fold, give_weights, keep_largest, refuse, take_weights
from saetrain.model import SAE

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
NAMES = {"encoder": "encoder.weight", "b_enc": "encoder.bias", "decoder": "W_dec", "b_dec": "b_dec"}


def read(path: Path) -> Foreign:
    """Read a folder. Raises CorruptError, and SettingsError for a transcoder or another activation."""
    file, config = path / WEIGHTS, read_config(path / CONFIG)
    activation = config.get("activation", "topk")
    if activation != "topk" or config.get("transcode") or config.get("skip_connection"):
        raise SettingsError(f"{path} is a transcoder or has activation {activation}. Give a TopK SAE.")
    weights = take_weights(read_safetensors(file), file, NAMES)
    k = read_k(config.get("k"), len(weights["encoder"]), path / CONFIG)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        z = ((x - weights["b_dec"]) @ weights["encoder"].T + weights["b_enc"]).relu()
        codes = keep_largest(z, k)
        return codes, codes @ weights["decoder"] + weights["b_dec"]

    return Foreign("sparsify", build_sae("topk", weights, k=k), forward)


def write(sae: SAE, hook_point: HookPoint) -> dict[str, bytes]:
    """File name -> bytes."""
    refuse(sae, "sparsify", ("topk",))
    config = {
        "activation": "topk", "expansion_factor": sae.config.n_latents // sae.d_model, "normalize_decoder": False,
        "num_latents": sae.config.n_latents, "k": sae.config.k, "multi_topk": False, "skip_connection": False,
        "transcode": False, "d_in": sae.d_model,
    }  # fmt: skip
    return {CONFIG: json.dumps(config, indent=2).encode(), WEIGHTS: save(give_weights(fold(sae), NAMES))}
