"""saev: one sae.pt, which is a JSON line followed by a plain state dict: W_enc [D, F], b_enc, W_dec [F, D], b_dec, and
for BatchTopK also activation.threshold [].

Schemas 1 to 5 do not subtract b_dec before the encoder; a file without a schema (saev 0.1, ReLU) does. TopK, and
BatchTopK without a threshold, keep the k largest without a ReLU, so a code can be negative. An SAE here cannot have
such codes, and the parity report shows whether the checkpoint has any.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from actcache import CorruptError, HookPoint, SettingsError
from saetrain.interop.constants import Statistics
from saetrain.interop.fields import Fields, check_fields, check_sizes, check_tensors, is_same, names, shorten
from saetrain.interop.files import load_tensors, read_header, read_k, take, torch_bytes
from saetrain.interop.foreign import PLAIN, build_sae, fold, give_weights, refuse, take_weights
from saetrain.model import SAE

WEIGHTS = "sae.pt"
SCHEMA = 5
ACTIVATIONS = {"relu": "Relu", "topk": "TopK", "batchtopk": "BatchTopK"}
KEYS = {"relu": "relu", "topk": "top-k", "batchtopk": "batch-top-k"}
_TRAINING = names(
    "exp_factor n_reinit_samples reinit_blend reinit_enc_dec_tranpose remove_parallel_grads normalize_w_dec seed"
)
BARE = Fields("saev 0.1", names("d_vit"), _TRAINING | names("sparsity_coeff l1_coeff ghost_grads use_ghost_grads"))
"""The first line of a file without a schema. The tensors tell the number of latents, not `exp_factor`."""
HEADER = Fields("saev", names("schema cfg cls"), names("commit lib"))
CONFIG = Fields("saev", names("d_vit d_model d_sae activation top_k"), _TRAINING)
ACTIVATION = Fields("saev", names("cls params"))
PARAMS = Fields("saev", names("top_k"), names("key kind sparsity aux momentum"))
"""`sparsity` and `aux` are terms of the training's loss; `momentum` is that of the threshold while it is trained."""


def read(path: Path) -> SAE:
    """Read sae.pt, given the file or its folder. Raises CorruptError, SettingsError (activation, schema)."""
    file = path / WEIGHTS if path.is_dir() else path
    header, skip = read_header(file)
    schema = header.get("schema")
    if schema is not None and not any(is_same(schema, known) for known in range(1, SCHEMA + 1)):
        raise SettingsError(
            f"{file} has schema {shorten(schema)}, but only schemas up to {SCHEMA} are known. Save it "
            "with an older version of saev."
        )
    name, top_k, config = _activation(header, file)
    tensors = load_tensors(file, skip=skip)
    check_tensors(tensors, {*PLAIN.values(), *(["activation.threshold"] if name == "BatchTopK" else [])}, file)
    weights = take_weights(tensors, file, PLAIN)
    n_latents, d_model = weights["encoder"].shape
    check_sizes(config, {"d_vit": d_model, "d_model": d_model, "d_sae": n_latents}, file)
    variant = {"Relu": "relu", "TopK": "topk", "BatchTopK": "topk"}[name]
    if name == "BatchTopK" and "activation.threshold" in tensors:
        threshold = take(tensors, file, {"activation.threshold": ()})["activation.threshold"]
        variant, weights["threshold"] = "batchtopk", threshold.clamp_min(0)
    k = None if name == "Relu" else read_k(top_k, n_latents, file)
    return build_sae(variant, weights, centered=schema is None, k=k)


def lacking(path: Path) -> Statistics | None:
    """A file without a schema is of the first release, whose training normalized the activations by their statistics
    without keeping these (scale_mean and scale_norm of its configs/preprint/baseline.toml); schemas do not."""
    header, _ = read_header(path / WEIGHTS if path.is_dir() else path)
    return None if "schema" in header else Statistics("norm", "patch")


def _activation(header: Mapping[str, object], file: Path) -> tuple[str, object, Mapping[str, object]]:
    """(class, k, the settings of the SAE), which each schema keeps in another place."""
    if "schema" not in header:
        check_fields(header, BARE, file)
        return "Relu", None, header
    check_fields(header, HEADER, file)
    config = _object(header, "cfg", file)
    check_fields(config, CONFIG, file)
    if header["schema"] == 1 and header.get("cls") in ACTIVATIONS.values():
        return str(header["cls"]), config.get("top_k", 32), config
    if header.get("cls", "SparseAutoencoderConfig") != "SparseAutoencoderConfig":
        raise SettingsError(f"{file} has the class {shorten(header['cls'])}. Give a sparse autoencoder.")
    if header["schema"] == 1 and "activation" not in config:  # the default of that time
        return "Relu", None, config
    activation = _object(config, "activation", file)
    check_fields(activation, ACTIVATION, file)
    name, params = activation.get("cls"), _object(activation, "params", file)
    check_fields(params, PARAMS, file)
    if not isinstance(name, str) or name not in ACTIVATIONS.values():
        raise SettingsError(
            f"{file} has activation {shorten(name)}. Give an SAE with one of {', '.join(ACTIVATIONS.values())}."
        )
    return name, params.get("top_k"), config


def _object(fields: Mapping[str, object], name: str, file: Path) -> Mapping[str, object]:
    value = fields.get(name)
    if not isinstance(value, dict):
        raise CorruptError(f"{file}: {name} must be an object, got {shorten(value)}. Copy the file again.")
    return value


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
