"""SAELens in early 2024: relu((x - b_dec) W_enc + b_enc) W_dec + b_dec (its sae_training/sparse_autoencoder.py)."""

from pathlib import Path
from typing import Any

from torch import Tensor

from saetrain.interop.formulas.forward import Forward, as_floats
from saetrain.interop.pickles import load_checkpoint


def load(path: Path) -> Forward:
    content: dict[str, Any] = load_checkpoint(path)
    p, cfg = as_floats(content["state_dict"]), content["cfg"]
    cfg = cfg if isinstance(cfg, dict) else vars(cfg)
    shift = p["b_dec"] if cfg.get("apply_b_dec_to_input", True) else 0

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = ((x - shift) @ p["W_enc"] + p["b_enc"]).relu()
        return codes, codes @ p["W_dec"] + p["b_dec"]

    return forward
