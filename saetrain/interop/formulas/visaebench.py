"""ViSAEBench's GenericSAE: relu(x encoder^T + bias), its selection, times the decoder as it is stored."""

from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from saetrain.interop.files import find_settings, load_tensors, read_settings
from saetrain.interop.formulas.forward import Forward, as_floats
from saetrain.interop.formulas.overcomplete import choose


def load(path: Path) -> Forward:
    cfg: dict[str, object] = read_settings(find_settings(path))
    is_safe = path.suffix == ".safetensors"
    p = as_floats(load_safetensors(path.read_bytes()) if is_safe else load_tensors(path, mapped=True))
    kind = str(cfg.get("activation") or cfg.get("sae_type") or cfg.get("architecture")).lower()

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = choose(p, (x @ p["encoder.weight"].T + p["encoder.bias"]).relu(), kind, cfg)
        if kind == "jumprelu":
            codes = codes * (codes > p["jump_thresholds" if "jump_thresholds" in p else "thresholds"])
        return codes, codes @ p["decoder.weight"] + p.get("decoder.bias", torch.zeros(()))

    return forward
