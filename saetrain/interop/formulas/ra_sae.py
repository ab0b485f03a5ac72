"""RA-SAE: relu(layer_norm(linear(x))) where it is at least the threshold, times the relaxed archetypal dictionary."""

import json
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from saetrain.interop.formulas.forward import Forward
from saetrain.interop.module_file import Shell, load_module
from saetrain.interop.ra_sae import CLASSES


def load(path: Path) -> Forward:
    read = cache(_read)  # when it is first needed, since it takes a while

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        threshold, weight, bias, gain, shift, rows = read(path)
        codes = layer_norm(linear(x, weight, bias), bias.shape, gain, shift).relu()
        codes = codes * (codes >= threshold)
        return codes, codes @ rows

    return forward


def _read(path: Path) -> tuple[float, Tensor, Tensor, Tensor, Tensor, Tensor]:
    threshold = json.loads((path.parent / "config.json").read_bytes())["running_threshold"]
    model = load_module(path, CLASSES)
    model = model.get("module", model)
    block = model.get("encoder").get("final_block")
    weight, bias = (block.get("0").get(name).read() for name in ("weight", "bias"))
    gain, shift = (block.get("1").get(name).read() for name in ("weight", "bias"))
    return threshold, weight, bias, gain, shift, _get_dictionary(model.get("dictionary"))


def _get_dictionary(d: Shell) -> Tensor:
    """RelaxedArchetypalDictionary.get_dictionary [F, D]: what it fused, or else computes."""
    if not d.get("training", True) and d.get("_fused_dictionary") is not None:
        fused: Tensor = d.get("_fused_dictionary").read()
        return fused
    points: Tensor = d.get("C").read()
    relax: Tensor = d.get("Relax").read()
    convex, first = torch.empty_like(relax), 0
    for w in d.get("W").rows():
        w.relu_()
        w /= w.sum(dim=-1, keepdim=True) + 1e-8
        convex[first : first + len(w)] = w @ points
        first += len(w)
    relax *= torch.clamp(d.get("delta") / relax.norm(dim=-1, keepdim=True), max=1)
    rows: Tensor = (convex + relax) * d.get("multiplier").read().exp()
    return rows
