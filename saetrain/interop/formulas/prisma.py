"""ViT-Prisma: StandardSparseAutoencoder and GatedSparseAutoencoder, with its normalization of tokens."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from saetrain.interop.files import load_tensors
from saetrain.interop.formulas.forward import Forward, as_floats, keep_largest, normalize_tokens


def load(path: Path) -> Forward:
    file = path / "weights.pt" if path.is_dir() else path
    content: dict[str, Any] = load_tensors(file)
    cfg = content.get("cfg", content.get("config")) if "state_dict" in content else None
    if cfg is None:
        cfg = json.loads((file.parent / "config.json").read_bytes())
    cfg = cfg if isinstance(cfg, dict) else vars(cfg)
    p = as_floats(content.get("state_dict", content))

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        x, restore = normalize_tokens(x, cfg.get("normalize_activations", "layer_norm"))
        x = x - p["b_dec"]
        if cfg.get("architecture") == "gated":
            codes = (x @ p["W_enc"] + p["b_gate"] > 0) * (x @ (p["W_enc"] * p["r_mag"].exp()) + p["b_mag"]).relu()
        else:
            hidden = x @ p["W_enc"] + p["b_enc"]
            if cfg.get("activation_fn_str") == "topk":
                hidden = keep_largest(hidden, int(cfg["activation_fn_kwargs"]["k"]))
            codes = hidden.relu()
        return codes, restore(codes @ p["W_dec"] + p["b_dec"])

    return forward
