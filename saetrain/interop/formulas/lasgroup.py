"""lasgroup: the k largest of u W_enc + b_enc of a unit vector u, times the normalized W_dec, in the length of x."""

import json
from pathlib import Path

from safetensors.torch import load as load_tensors
from torch import Tensor
from torch.nn.functional import normalize

from saetrain.interop.formulas.forward import Forward, as_floats, keep_largest


def load(path: Path) -> Forward:
    cfg = json.loads((path / "config.json").read_bytes())
    p = as_floats(load_tensors((path / "model.safetensors").read_bytes()))

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        length = x.norm(dim=1, keepdim=True)
        codes = keep_largest(x / length @ p["W_enc"] + p["b_enc"], int(cfg["k"]))
        decoded = codes @ (normalize(p["W_dec"], dim=1) if cfg.get("normalize_decoder", True) else p["W_dec"])
        return codes, (decoded + p["b_dec"] if "b_dec" in p else decoded) * length

    return forward
