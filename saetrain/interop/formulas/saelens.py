"""SAELens: `process_sae_in`, then the activation of the architecture, then W_dec, as in its sae_lens/saes."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from torch import Tensor

from saetrain.interop.formulas.forward import Forward, as_floats, keep_largest, normalize_tokens


def load(path: Path) -> Forward:
    cfg: dict[str, Any] = json.loads((path / "cfg.json").read_bytes())
    p = as_floats(load_tensors((path / "sae_weights.safetensors").read_bytes()))
    activation = cfg.get("activation_fn_str", cfg.get("activation_fn", "relu"))
    kind = "topk" if activation == "topk" else cfg.get("architecture", "standard")
    k = int((cfg.get("activation_fn_kwargs") or cfg).get("k", cfg.get("k", 0))) if kind == "topk" else 0
    normalization = cfg.get("normalize_activations")
    c, whitening = 1.0, None
    if normalization in (True, "expected_average_only_in"):
        c = json.loads((path / "activation_scaler.json").read_bytes())["scaling_factor"]
    if normalization == "covariance_whitening":
        whitening = as_floats(load_tensors((path / "activation_whitening.safetensors").read_bytes()))
    finetuned = p.get("scaling_factor", p.get("finetuning_scaling_factor"))

    def encode(x: Tensor) -> Tensor:
        if whitening is not None:
            x = (x - whitening["mean"]) @ whitening["matrix"]
        x = x * c - p["b_dec"] * float(cfg.get("apply_b_dec_to_input", True))
        if kind == "gated":
            gate = (x @ p["W_enc"] + p["b_gate"]) > 0
            return gate * (x @ (p["W_enc"] * p["r_mag"].exp()) + p["b_mag"]).relu()
        hidden = x @ p["W_enc"] + p["b_enc"]
        if cfg.get("rescale_acts_by_decoder_norm", False) and kind != "standard":
            hidden = hidden * p["W_dec"].norm(dim=-1)
        if kind == "topk":
            return keep_largest(hidden, k).relu()
        if kind == "jumprelu":
            threshold = p["threshold"] if "threshold" in p else p["log_threshold"].exp()
            return hidden.relu() * (hidden > threshold)
        if kind in ("batchtopk", "matryoshka_batchtopk"):
            return hidden.relu() * (hidden > p["topk_threshold"])
        return hidden.relu()

    def decode(codes: Tensor) -> Tensor:
        if finetuned is not None and cfg.get("finetuning_scaling_factor", False):
            codes = codes * finetuned
        if cfg.get("rescale_acts_by_decoder_norm", False) and kind != "standard":
            codes = codes / p["W_dec"].norm(dim=-1)
        decoded = (codes @ p["W_dec"] + p["b_dec"]) / c
        return decoded if whitening is None else decoded @ whitening["inverse_matrix"] + whitening["mean"]

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        x, restore = normalize_tokens(x, normalization)
        codes = encode(x)
        return codes, restore(decode(codes))

    return forward
