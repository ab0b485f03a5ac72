"""sparsify: the k largest of relu(encoder(x - b_dec)), times W_dec."""

import json
from pathlib import Path

from safetensors.torch import load as load_tensors
from torch import Tensor
from torch.nn.functional import linear

from saetrain.interop.formulas.forward import Forward, as_floats


def load(path: Path) -> Forward:
    k = int(json.loads((path / "cfg.json").read_bytes())["k"])
    p = as_floats(load_tensors((path / "sae.safetensors").read_bytes()))

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = linear(x - p["b_dec"], p["encoder.weight"], p["encoder.bias"]).relu()
        values, latents = hidden.topk(k, sorted=False)
        codes = hidden.new_zeros(hidden.shape).scatter_(1, latents, values)
        return codes, codes @ p["W_dec"] + p["b_dec"]

    return forward
