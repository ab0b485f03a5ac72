"""PatchSAE: relu((x - b_dec) W_enc + b_enc) W_dec + b_dec (arXiv 2412.05276)."""

from pathlib import Path
from typing import Any

from torch import Tensor

from saetrain.interop.files import load_tensors
from saetrain.interop.formulas.forward import Forward, as_floats


def load(path: Path) -> Forward:
    content: dict[str, Any] = load_tensors(path)
    p = as_floats(content["state_dict"])

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = ((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]).relu()
        return codes, codes @ p["W_dec"] + p["b_dec"]

    return forward
