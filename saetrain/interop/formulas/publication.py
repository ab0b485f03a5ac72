"""Published SAEs: the formulas of docs/reference/format.md, dense, from the tensors and settings in the files."""

import json
from pathlib import Path

from safetensors.torch import load as load_tensors
from torch import Tensor

from saetrain.interop.formulas.forward import Forward, as_floats, keep_largest


def load(path: Path) -> Forward:
    sae = json.loads((path / "config.json").read_bytes())["sae"]
    p = as_floats(load_tensors((path / "patchsae.safetensors").read_bytes()))

    def size(x: Tensor) -> tuple[Tensor | float, Tensor | float, float]:
        """(shift, factor, what is added to the factor on the way in) of each token, as ViT-Prisma has it."""
        if sae["normalize"] == "layer_norm":
            return x.mean(1, keepdim=True), x.std(1, keepdim=True), 1e-5
        if sae["normalize"] == "constant_norm_rescale":
            return 0.0, x.norm(dim=1, keepdim=True) / x.shape[1] ** 0.5, 0.0
        return 0.0, 1.0, 0.0

    def encode(x: Tensor) -> Tensor:
        """Codes before the factors `norms`."""
        centered = (x - p["mean"]) * p["scale"] - p["b_dec"]
        z = centered @ p["encoder"].T + p["b_enc"]
        if sae["variant"] == "topk":
            return keep_largest(z, sae["k"]).relu()
        if sae["variant"] in ("batchtopk", "jumprelu"):
            return z.relu() * (z > p["threshold"])
        if sae["variant"] == "gated":
            return (z > 0) * (centered @ (p["encoder"] * p["log_scale"].exp()[:, None]).T + p["b_mag"]).relu()
        return z.relu()

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        shift, factor, more = size(x)
        codes = encode((x - shift) / (factor + more))
        lengths = codes * p["norms"] if "norms" in p else codes
        return codes, ((lengths @ p["decoder"] + p["b_dec"]) / p["scale"] + p["mean"]) * factor + shift

    return forward
