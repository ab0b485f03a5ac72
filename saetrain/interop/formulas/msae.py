"""MSAE: `SAE.encode` and `SAE.decode` of its sae.py, with the activation that the name of the file says."""

from pathlib import Path
from typing import Any

from torch import Tensor

from saetrain.interop.files import load_tensors
from saetrain.interop.formulas.forward import Forward, as_floats, keep_largest


def load(path: Path) -> Forward:
    content: dict[str, Any] = load_tensors(path, mapped=True)
    p, s = as_floats(content["model"]), float(content["scaling_factor"])
    mean, fields = content["mean_center"].float(), path.name.split("_")
    kind = fields[2]

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = ((x - mean) * s - p["pre_bias"]) @ p["encoder"] + p["latent_bias"]
        if kind in ("TopK", "TopKReLU"):
            codes = keep_largest(codes, int(fields[3]))
        if kind != "TopK":
            codes = codes.relu()
        decoder = p["decoder"] if "decoder" in p else p["encoder"].T
        return codes, (codes @ decoder + p["pre_bias"]) / s + mean

    return forward
