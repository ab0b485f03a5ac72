"""dictionary_learning: the `encode` and `decode` of the class that the trainer's settings name."""

import json
from pathlib import Path

from torch import Tensor
from torch.nn.functional import linear

from saetrain.interop.files import load_tensors
from saetrain.interop.formulas.forward import Forward, as_floats, keep_largest


def load(path: Path) -> Forward:
    trainer = json.loads((path / "config.json").read_bytes())["trainer"]
    p = as_floats(load_tensors(path / "ae.pt"))
    name = trainer["dict_class"]

    def encode(x: Tensor) -> Tensor:
        if name == "AutoEncoder":
            return linear(x - p["bias"], p["encoder.weight"], p["encoder.bias"]).relu()
        if name == "AutoEncoderNew":
            return linear(x, p["encoder.weight"], p["encoder.bias"]).relu()
        if name == "AutoEncoderTopK":
            k = int(p["k"]) if "k" in p else int(trainer["k"])
            return keep_largest(linear(x - p["b_dec"], p["encoder.weight"], p["encoder.bias"]).relu(), k)
        if name == "BatchTopKSAE":
            codes = linear(x - p["b_dec"], p["encoder.weight"], p["encoder.bias"]).relu()
            return codes * (codes > p["threshold"])
        if name == "JumpReluAutoEncoder":
            jump = x @ p["W_enc"] + p["b_enc"]
            return (jump * (jump > p["threshold"])).relu()
        if name == "GatedAutoEncoder":
            shared = linear(x - p["decoder_bias"], p["encoder.weight"])
            return (shared + p["gate_bias"] > 0) * (p["r_mag"].exp() * shared + p["mag_bias"]).relu()
        codes = ((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]).relu()  # MatryoshkaBatchTopKSAE with all its groups
        return codes * (codes > p["threshold"])

    def decode(codes: Tensor) -> Tensor:
        if "W_dec" in p:
            return codes @ p["W_dec"] + p["b_dec"]
        bias = next(p[name] for name in ("b_dec", "bias", "decoder_bias", "decoder.bias") if name in p)
        return linear(codes, p["decoder.weight"]) + bias

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = encode(x)
        return codes, decode(codes)

    return forward
