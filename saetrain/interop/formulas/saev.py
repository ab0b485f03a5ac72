"""saev: x W_enc + b_enc, its activation without a ReLU of its own for top-k, times W_dec; 0.1 subtracts b_dec first."""

import json
from pathlib import Path

import torch
from torch import Tensor

from saetrain.interop.files import load_tensors
from saetrain.interop.formulas.forward import Forward, as_floats, keep_largest


def load(path: Path) -> Forward:
    file = path / "sae.pt" if path.is_dir() else path
    with open(file, "rb") as stream:
        line = stream.readline()
    header, p = json.loads(line), as_floats(load_tensors(file, skip=len(line)))
    name, k = "Relu", 32
    if "schema" in header:
        cfg = header["cfg"]
        if header.get("cls") in ("Relu", "TopK", "BatchTopK"):
            name, k = header["cls"], cfg.get("top_k", 32)
        elif "activation" in cfg:
            name, k = cfg["activation"]["cls"], cfg["activation"]["params"].get("top_k", 32)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        h = (x if "schema" in header else x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
        threshold = p.get("activation.threshold")
        if name == "Relu":
            codes = h.relu()
        elif name == "TopK" or threshold is None:
            codes = keep_largest(h, int(k))
        else:
            codes = torch.where(h > threshold.clamp_min(0), h, 0)
        return codes, codes @ p["W_dec"] + p["b_dec"]

    return forward
