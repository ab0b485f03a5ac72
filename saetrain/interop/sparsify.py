"""sparsify (EleutherAI): a folder with cfg.json and sae.safetensors. encoder.weight [F, D], encoder.bias, W_dec [F, D],
b_dec. The codes are the k largest of relu(encoder (x - b_dec) + bias).
"""

import json
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from actcache import HookPoint, SettingsError
from saetrain.interop.files import read_config, read_k, read_safetensors, take
from saetrain.interop.foreign import Foreign, build_sae, fold, keep_largest, refuse
from saetrain.model import SAE

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def read(path: Path) -> Foreign:
    """Read a folder. Raises CorruptError, and SettingsError for a transcoder or another activation."""
    file, config = path / WEIGHTS, read_config(path / CONFIG)
    activation = config.get("activation", "topk")
    if activation != "topk" or config.get("transcode") or config.get("skip_connection"):
        raise SettingsError(f"{path} is a transcoder or has activation {activation}. Give a TopK SAE.")
    tensors = read_safetensors(file)
    got = take(tensors, file, encoder__weight=(None, None))
    n_latents, d_model = got["encoder__weight"].shape
    got |= take(tensors, file, encoder__bias=(n_latents,), W_dec=(n_latents, d_model), b_dec=(d_model,))
    k = read_k(config.get("k"), n_latents, path / CONFIG)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        z = ((x - got["b_dec"]) @ got["encoder__weight"].T + got["encoder__bias"]).relu()
        codes = keep_largest(z, k)
        return codes, codes @ got["W_dec"] + got["b_dec"]

    sae = build_sae("topk", got["encoder__weight"], got["W_dec"], got["b_dec"], {"b_enc": got["encoder__bias"]}, k=k)
    return Foreign("sparsify", sae, forward)


def write(sae: SAE, hook_point: HookPoint) -> dict[str, bytes]:
    """File name -> bytes."""
    refuse(sae, "sparsify", ("topk",))
    folded = fold(sae)
    config = {
        "activation": "topk", "expansion_factor": sae.config.n_latents // sae.d_model, "normalize_decoder": False,
        "num_latents": sae.config.n_latents, "k": sae.config.k, "multi_topk": False, "skip_connection": False,
        "transcode": False, "d_in": sae.d_model,
    }  # fmt: skip
    tensors = {
        "encoder.weight": folded["encoder"], "encoder.bias": folded["b_enc"], "W_dec": folded["decoder"],
        "b_dec": folded["b_dec"],
    }  # fmt: skip
    weights = save({name: value.contiguous() for name, value in tensors.items()})
    return {CONFIG: json.dumps(config, indent=2).encode(), WEIGHTS: weights}
