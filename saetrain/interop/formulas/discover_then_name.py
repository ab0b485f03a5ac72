"""Discover-then-Name: relu(encoder (x - tied_bias) + bias), through the decoder, plus tied_bias."""

from pathlib import Path

from torch import Tensor
from torch.nn.functional import linear

from saetrain.interop.files import load_tensors
from saetrain.interop.formulas.forward import Forward, as_floats


def load(path: Path) -> Forward:
    p = as_floats(load_tensors(path, mapped=True))
    bias = p["tied_bias"].flatten()
    dot = "._" if "encoder._weight" in p else "."
    encoder, decoder = p[f"encoder{dot}weight"].reshape(-1, len(bias)), p[f"decoder{dot}weight"].reshape(len(bias), -1)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = linear(x - bias, encoder, p[f"encoder{dot}bias"].flatten()).relu()
        return codes, linear(codes, decoder) + bias

    return forward
