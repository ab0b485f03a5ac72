"""Universal SAE: overcomplete's TopKSAE on standardized activations, and back (YorkUCVIL/UniversalSAE, `train.py`)."""

from pathlib import Path
from typing import Any

from torch import Tensor

from saetrain.interop.files import load_tensors
from saetrain.interop.formulas.forward import Forward, as_floats, keep_largest
from saetrain.interop.formulas.overcomplete import decode, encode
from saetrain.interop.universal_towers import UNIVERSAL_EPS, UNIVERSAL_K, find_universal_tower


def load(path: Path) -> Forward:
    content: dict[str, Any] = load_tensors(path, mapped=True)
    p, found = as_floats(content["model_state_dict"]), find_universal_tower(path)
    mean, deviation = (found[1].mean, found[1].deviation + UNIVERSAL_EPS) if found else (0.0, 1.0)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = keep_largest(encode(p, (x - mean) / deviation), UNIVERSAL_K)
        return codes, decode(p, codes, "l2") * deviation + mean

    return forward
