"""dictionary_learning: a folder with config.json and ae.pt, a plain state dict (read without running its pickle).

AutoEncoder: bias, encoder.{weight [F, D], bias}, decoder.weight [D, F]. AutoEncoderTopK and BatchTopKSAE add b_dec, k,
threshold. MatryoshkaBatchTopKSAE: W_enc [D, F], b_enc, W_dec [F, D], b_dec, k, threshold. JumpReluAutoEncoder:
W_enc, b_enc, W_dec, b_dec, threshold [F], without b_dec before the encoder. GatedAutoEncoder: decoder_bias,
encoder.weight, r_mag, gate_bias, mag_bias, decoder.weight.
"""

import io
import json
from pathlib import Path

import torch
from torch import Tensor

from actcache import HookPoint, SettingsError
from saetrain.interop.files import load_tensors, read_config, read_k, take
from saetrain.interop.foreign import Foreign, build_sae, fold, keep_largest
from saetrain.model import SAE

CONFIG, WEIGHTS = "config.json", "ae.pt"
CLASSES = {
    "relu": "AutoEncoder", "topk": "AutoEncoderTopK", "batchtopk": "BatchTopKSAE", "jumprelu": "JumpReluAutoEncoder",
    "gated": "GatedAutoEncoder",
}  # fmt: skip
READABLE = (*CLASSES.values(), "MatryoshkaBatchTopKSAE")


def read(path: Path) -> Foreign:
    """Read a folder. Raises CorruptError, and SettingsError for an unknown class."""
    file = path / WEIGHTS
    trainer = read_config(path / CONFIG).get("trainer")
    kind = trainer.get("dict_class") if isinstance(trainer, dict) else None
    if kind not in READABLE:
        raise SettingsError(f"{path} has dict_class {kind!r}. Give an SAE of one of {', '.join(READABLE)}.")
    tensors, weights = load_tensors(file), {}
    if kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        got = take(tensors, file, W_enc=(None, None))
        d_model, n_latents = got["W_enc"].shape
        got |= take(tensors, file, W_dec=(n_latents, d_model), b_dec=(d_model,), b_enc=(n_latents,))
        weights = {"encoder": got["W_enc"].T, "decoder": got["W_dec"], "b_dec": got["b_dec"], "b_enc": got["b_enc"]}
    else:
        got = take(tensors, file, encoder__weight=(None, None))
        n_latents, d_model = got["encoder__weight"].shape
        offset = {"AutoEncoder": "bias", "GatedAutoEncoder": "decoder_bias"}.get(kind, "b_dec")
        got |= take(tensors, file, decoder__weight=(d_model, n_latents), **{offset: (d_model,)})
        names = ("gate_bias", "mag_bias", "r_mag") if kind == "GatedAutoEncoder" else ("encoder__bias",)
        got |= take(tensors, file, **dict.fromkeys(names, (n_latents,)))
        b_enc = got["gate_bias" if kind == "GatedAutoEncoder" else "encoder__bias"]
        weights = {
            "encoder": got["encoder__weight"], "decoder": got["decoder__weight"].T, "b_dec": got[offset],
            "b_enc": b_enc,
        }  # fmt: skip
    k, threshold = None, None
    if kind in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        k = read_k(float(take(tensors, file, k=())["k"]), n_latents, file)
    if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        shape = (n_latents,) if kind == "JumpReluAutoEncoder" else ()
        threshold = take(tensors, file, threshold=shape)["threshold"]
        if threshold.dim() == 0 and threshold < 0:
            raise SettingsError(
                f"{path} has a threshold below 0: it was saved before its threshold was set. Give a later checkpoint."
            )
    centered = kind != "JumpReluAutoEncoder"

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x - weights["b_dec"] if centered else x
        product = x @ weights["encoder"].T
        if kind == "GatedAutoEncoder":
            codes = (product + got["gate_bias"] > 0) * (got["r_mag"].exp() * product + got["mag_bias"]).relu()
        else:
            z = product + weights["b_enc"]
            codes = keep_largest(z.relu(), k) if k and kind == "AutoEncoderTopK" else z.relu()
            if threshold is not None:
                codes = codes * (z > threshold)
        return codes, codes @ weights["decoder"] + weights["b_dec"]

    variant = next((name for name, of in CLASSES.items() if of == kind), "batchtopk")
    parts: dict[str, Tensor] = {"b_enc": weights["b_enc"]}
    if threshold is not None:
        parts["threshold"] = threshold.clamp_min(0)  # a threshold below 0 has the effect of ReLU
    if variant == "gated":
        parts |= {"log_scale": got["r_mag"], "b_mag": got["mag_bias"]}
    sae = build_sae(variant, weights["encoder"], weights["decoder"], weights["b_dec"], parts, centered=centered, k=k)
    return Foreign("dictionary_learning", sae, forward)


def write(sae: SAE, hook_point: HookPoint) -> dict[str, bytes]:
    """File name -> bytes."""
    folded, variant = fold(sae), sae.config.variant
    encoder, decoder, b_dec, b_enc = (folded[name] for name in ("encoder", "decoder", "b_dec", "b_enc"))
    if variant == "jumprelu":  # this class does not subtract b_dec
        tensors = {
            "W_enc": encoder.T, "W_dec": decoder, "b_dec": b_dec, "b_enc": b_enc - encoder @ b_dec,
            "threshold": folded["threshold"],
        }  # fmt: skip
    else:
        offset = {"relu": "bias", "gated": "decoder_bias"}.get(variant, "b_dec")
        tensors = {"encoder.weight": encoder, "decoder.weight": decoder.T, offset: b_dec}
        if variant == "gated":
            tensors |= {"gate_bias": b_enc, "mag_bias": folded["b_mag"], "r_mag": folded["log_scale"]}
        else:
            tensors["encoder.bias"] = b_enc
    if variant in ("topk", "batchtopk"):
        unset = torch.tensor(-1.0)
        tensors |= {"k": torch.tensor(sae.config.k, dtype=torch.int), "threshold": folded.get("threshold", unset)}
    trainer: dict[str, object] = {
        "dict_class": CLASSES[variant], "activation_dim": sae.d_model, "dict_size": sae.config.n_latents,
        "layer": hook_point.layer, "submodule_name": str(hook_point), "lm_name": "", "k": sae.config.k,
    }  # fmt: skip
    buffer = io.BytesIO()
    torch.save({name: value.contiguous() for name, value in tensors.items()}, buffer)
    return {CONFIG: json.dumps({"trainer": trainer, "buffer": {}}, indent=2).encode(), WEIGHTS: buffer.getvalue()}
