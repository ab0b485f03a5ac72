"""saev: one sae.pt, which is a JSON line followed by a plain state dict: W_enc [D, F], b_enc, W_dec [F, D], b_dec, and
for BatchTopK also activation.threshold [].

Schemas 1 to 5 do not subtract b_dec before the encoder; a file without a schema (saev 0.1, ReLU) does. TopK, and
BatchTopK without a threshold, keep the k largest without a ReLU, so a code can be negative. An SAE here cannot have
such codes, and the parity report shows whether the checkpoint has any.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from actcache import HookPoint, SettingsError
from saetrain.interop.files import load_tensors, read_header, read_k, take, torch_bytes
from saetrain.interop.foreign import PLAIN, Foreign, build_sae, fold, give_weights, keep_largest, refuse, take_weights
from saetrain.model import SAE

WEIGHTS = "sae.pt"
SCHEMA = 5
ACTIVATIONS = {"relu": "Relu", "topk": "TopK", "batchtopk": "BatchTopK"}
KEYS = {"relu": "relu", "topk": "top-k", "batchtopk": "batch-top-k"}


def read(path: Path) -> Foreign:
    """Read sae.pt, given the file or its folder. Raises CorruptError, SettingsError (activation, schema)."""
    file = path / WEIGHTS if path.is_dir() else path
    header, skip = read_header(file)
    schema = header.get("schema")
    if schema is not None and schema not in range(1, SCHEMA + 1):
        raise SettingsError(
            f"{file} has schema {schema!r}, but only schemas up to {SCHEMA} are known. Save it "
            "with an older version of saev."
        )
    name, params = _activation(header)
    if name not in ACTIVATIONS.values():
        raise SettingsError(
            f"{file} has activation {name!r}. Give an SAE with one of {', '.join(ACTIVATIONS.values())}."
        )
    tensors = load_tensors(file, skip=skip)
    weights = take_weights(tensors, file, PLAIN)
    threshold = None
    if name == "BatchTopK" and "activation.threshold" in tensors:
        threshold = take(tensors, file, {"activation.threshold": ()})["activation.threshold"].clamp_min(0)
    k = None if name == "Relu" else read_k(params.get("top_k"), len(weights["encoder"]), file)
    centered = schema is None

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        z = (x - weights["b_dec"] if centered else x) @ weights["encoder"].T + weights["b_enc"]
        if name == "Relu":
            codes = z.relu()
        elif threshold is not None:
            codes = z * (z > threshold)
        else:
            assert k is not None
            codes = keep_largest(z, k)
        return codes, codes @ weights["decoder"] + weights["b_dec"]

    variant = {"Relu": "relu"}.get(name, "topk" if threshold is None else "batchtopk")
    ours = weights if threshold is None else {**weights, "threshold": threshold}
    return Foreign("saev", build_sae(variant, ours, centered=centered, k=k), forward)


def _activation(header: Mapping[str, object]) -> tuple[str, Mapping[str, object]]:
    """The class and the parameters of the activation, which each schema keeps in another place."""
    if "schema" not in header:
        return "Relu", {}
    config = header.get("cfg")
    config = config if isinstance(config, dict) else {}
    if header["schema"] == 1 and header.get("cls") in ACTIVATIONS.values():
        return str(header["cls"]), {"top_k": config.get("top_k", 32)}
    activation = config.get("activation")
    activation = activation if isinstance(activation, dict) else {}
    params = activation.get("params")
    return str(activation.get("cls")), params if isinstance(params, dict) else {}


def write(sae: SAE, hook_point: HookPoint) -> dict[str, bytes]:
    """File name -> bytes."""
    refuse(sae, "saev", tuple(ACTIVATIONS))
    variant, folded = sae.config.variant, fold(sae, centered=False)
    tensors = give_weights(folded, PLAIN)
    if "threshold" in folded:
        tensors["activation.threshold"] = folded["threshold"]
    if sae.config.top_k:
        sparsity: dict[str, object] = {"cls": "NoSparsity", "params": {"key": "no-sparsity"}}
        auxiliary, count = {"cls": "AuxK", "params": {"key": "auxk"}}, {"top_k": sae.config.k}
    else:
        sparsity = {"cls": "L1Sparsity", "params": {"key": "l1-sparsity", "coeff": sae.config.l1}}
        auxiliary, count = {"cls": "NoAux", "params": {"key": "no-aux"}}, {}
    params = {"key": KEYS[variant], **count, "sparsity": sparsity, "aux": auxiliary}
    config = {
        "d_model": sae.d_model, "d_sae": sae.config.n_latents, "normalize_w_dec": False,
        "activation": {"cls": ACTIVATIONS[variant], "params": params},
    }  # fmt: skip
    header = {"schema": SCHEMA, "cfg": config, "commit": "unknown", "lib": "unknown"}
    return {WEIGHTS: json.dumps(header).encode() + b"\n" + torch_bytes(tensors)}
