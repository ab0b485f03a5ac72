"""overcomplete in evaluation: relu(norm(encoder(x))), its selection, times the normalized dictionary."""

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import batch_norm, linear

from saetrain.interop.files import load_tensors
from saetrain.interop.formulas.forward import Forward, as_floats, keep_largest


def load(path: Path) -> Forward:
    cfg, p = json.loads((path / "config.json").read_bytes()), as_floats(load_tensors(path / "sae.pt"))
    kind = cfg.get("architecture") or cfg.get("activation") or cfg.get("sae_type")
    block = "encoder.final_block."

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        pre = linear(x, p[block + "0.weight"], p[block + "0.bias"])
        if block + "1.running_mean" in p:
            mean, variance = p[block + "1.running_mean"], p[block + "1.running_var"]
            pre = batch_norm(pre, mean, variance, p[block + "1.weight"], p[block + "1.bias"], training=False)
        codes = pre.relu()
        if kind == "topk":
            codes = keep_largest(codes, int(cfg["k"]))
        elif kind == "batchtopk":
            codes = codes * (codes >= cfg["threshold"])
        elif kind == "jumprelu":
            codes = torch.where(codes < p["thresholds"].exp(), 0, codes)
        rows = p["dictionary._weights"] / p["dictionary._weights"].norm(dim=1, keepdim=True).clamp_min(1e-12)
        return codes, codes @ (rows * p.get("dictionary.multiplier", torch.zeros(())).exp())

    return forward
