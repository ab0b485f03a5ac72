"""CLIP-Scope, as its package evaluates it: the k largest of (x - pre_b) enc, times dec, plus pre_b."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saetrain.interop.files import load_tensors
from saetrain.interop.formulas.forward import Forward, as_floats


def load(path: Path) -> Forward:
    content: dict[str, Any] = load_tensors(path, mapped=True)
    p, k = as_floats(content["model_state_dict"]), int(content["k"])

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        top = ((x - p["pre_b"]) @ p["enc"]).topk(k, dim=-1)
        codes = torch.zeros(len(x), len(p["dec"])).scatter_(-1, top.indices, top.values)
        return codes, codes @ p["dec"] + p["pre_b"]

    return forward
