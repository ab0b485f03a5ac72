"""overcomplete in evaluation: relu(norm(encoder(x))), its selection, times the normalized dictionary."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import batch_norm, linear

from saetrain.interop.files import find_settings, load_tensors, read_settings
from saetrain.interop.formulas.forward import Forward, as_floats, keep_largest


def load(path: Path) -> Forward:
    cfg: dict[str, Any] = read_settings(find_settings(path))
    p = as_floats(load_tensors(path, mapped=True))
    kind = str(cfg.get("architecture") or cfg.get("activation") or cfg.get("sae_type")).lower()

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = choose(p, encode(p, x), kind, cfg)
        if kind == "jumprelu":
            codes = torch.where(codes < p["thresholds"].exp(), 0, codes)
        return codes, decode(p, codes, cfg.get("normalization", "l2"))

    return forward


def encode(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """The codes before their selection."""
    block = "encoder.final_block."
    pre = linear(x, p[block + "0.weight"], p[block + "0.bias"])
    if block + "1.running_mean" in p:
        mean, variance = p[block + "1.running_mean"], p[block + "1.running_var"]
        pre = batch_norm(pre, mean, variance, p[block + "1.weight"], p[block + "1.bias"], training=False)
    return pre.relu()


def choose(p: dict[str, Tensor], codes: Tensor, kind: str, cfg: dict[str, Any]) -> Tensor:
    """The codes that topk and batchtopk keep, all of them for another kind."""
    if kind == "topk":
        return keep_largest(codes, int(cfg["k"]))
    if kind == "batchtopk":
        running = p.get("_running_threshold", torch.zeros(()))
        return codes * (codes >= (running if cfg.get("threshold") is None else cfg["threshold"]))
    return codes


def decode(p: dict[str, Tensor], codes: Tensor, normalization: str) -> Tensor:
    rows = p["dictionary._weights"]
    if normalization == "l2":
        rows = rows / rows.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12)
    elif normalization == "l1":
        rows = rows / rows.abs().sum(1, keepdim=True).clamp_min(1e-12)
    elif normalization == "max_l2":
        rows = rows / rows.square().sum(1).sqrt().max()
    elif normalization == "max_l1":
        rows = rows / rows.abs().sum(1).max()
    return codes @ (rows * p.get("dictionary.multiplier", torch.zeros(())).exp())
