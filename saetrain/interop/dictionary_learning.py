"""dictionary_learning: a folder with config.json and ae.pt, a plain state dict (read without running its pickle).

AutoEncoder: bias, encoder.{weight [F, D], bias}, decoder.weight [D, F]. AutoEncoderTopK and BatchTopKSAE add b_dec, k,
threshold. MatryoshkaBatchTopKSAE: W_enc [D, F], b_enc, W_dec [F, D], b_dec, k, threshold. JumpReluAutoEncoder:
W_enc, b_enc, W_dec, b_dec, threshold [F], without b_dec before the encoder. GatedAutoEncoder: decoder_bias,
encoder.weight, r_mag, gate_bias, mag_bias, decoder.weight.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from actcache import HookPoint, SettingsError
from saetrain.config import VARIANTS
from saetrain.interop.files import load_tensors, read_config, read_k, take, torch_bytes
from saetrain.interop.foreign import PLAIN, Foreign, Names, build_sae, fold, give_weights, keep_largest, take_weights
from saetrain.model import SAE

CONFIG, WEIGHTS = "config.json", "ae.pt"
_LINEAR = {"encoder": "encoder.weight", "decoder": "decoder.weight"}
_TOP_K = {**_LINEAR, "b_dec": "b_dec", "b_enc": "encoder.bias"}
CLASSES: dict[str, tuple[str, Names]] = {
    "AutoEncoder": ("relu", {**_LINEAR, "b_dec": "bias", "b_enc": "encoder.bias"}),
    "AutoEncoderTopK": ("topk", _TOP_K),
    "BatchTopKSAE": ("batchtopk", _TOP_K),
    "JumpReluAutoEncoder": ("jumprelu", PLAIN),
    "GatedAutoEncoder": (
        "gated", {**_LINEAR, "b_dec": "decoder_bias", "b_enc": "gate_bias", "b_mag": "mag_bias", "log_scale": "r_mag"},
    ),
    "MatryoshkaBatchTopKSAE": ("batchtopk", PLAIN),
}  # fmt: skip
"""dict_class -> the variant and the names of its tensors. A variant is written as its first class."""
UNCENTERED = ("JumpReluAutoEncoder",)
"""These do not subtract b_dec before the encoder."""


def read(path: Path) -> Foreign:
    """Read a folder. Raises CorruptError, and SettingsError for an unknown class."""
    file = path / WEIGHTS
    trainer = read_config(path / CONFIG).get("trainer")
    kind = trainer.get("dict_class") if isinstance(trainer, dict) else None
    if not isinstance(kind, str) or kind not in CLASSES:
        raise SettingsError(f"{path} has dict_class {kind!r}. Give an SAE of one of {', '.join(CLASSES)}.")
    variant, names = CLASSES[kind]
    tensors = load_tensors(file)
    weights = take_weights(tensors, file, names)
    n_latents, k, threshold = len(weights["encoder"]), None, None
    if VARIANTS[variant].top_k:
        k = read_k(float(take(tensors, file, {"k": ()})["k"]), n_latents, file)
    shapes: dict[str, tuple[int, ...]] = {"batchtopk": (), "jumprelu": (n_latents,)}
    if variant in shapes:
        threshold = take(tensors, file, {"threshold": shapes[variant]})["threshold"]
        if threshold.dim() == 0 and threshold < 0:
            raise SettingsError(
                f"{path} has a threshold below 0: it was saved before its threshold was set. Give a later checkpoint."
            )
    centered = kind not in UNCENTERED

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x - weights["b_dec"] if centered else x
        product = x @ weights["encoder"].T
        if kind == "GatedAutoEncoder":
            scale = weights["log_scale"].exp()
            codes = (product + weights["b_enc"] > 0) * (scale * product + weights["b_mag"]).relu()
        else:
            z = product + weights["b_enc"]
            codes = keep_largest(z.relu(), k) if k and kind == "AutoEncoderTopK" else z.relu()
            if threshold is not None:
                codes = codes * (z > threshold)
        return codes, codes @ weights["decoder"] + weights["b_dec"]

    if threshold is not None:
        weights["threshold"] = threshold.clamp_min(0)  # a threshold below 0 has the effect of ReLU
    return Foreign("dictionary_learning", build_sae(variant, weights, centered=centered, k=k), forward)


def write(sae: SAE, hook_point: HookPoint) -> dict[str, bytes]:
    """File name -> bytes."""
    kind = next(kind for kind, (variant, _) in CLASSES.items() if variant == sae.config.variant)
    folded = fold(sae, centered=kind not in UNCENTERED)
    tensors = give_weights(folded, CLASSES[kind][1])
    if sae.config.top_k:
        tensors |= {"k": torch.tensor(sae.config.k, dtype=torch.int), "threshold": torch.tensor(-1.0)}  # -1: not set
    if "threshold" in folded:
        tensors["threshold"] = folded["threshold"]
    trainer: dict[str, object] = {
        "dict_class": kind, "activation_dim": sae.d_model, "dict_size": sae.config.n_latents,
        "layer": hook_point.layer, "submodule_name": str(hook_point), "lm_name": "", "k": sae.config.k,
    }  # fmt: skip
    config = json.dumps({"trainer": trainer, "buffer": {}}, indent=2).encode()
    return {CONFIG: config, WEIGHTS: torch_bytes(tensors)}
