"""overcomplete: a state dict in sae.pt, and settings beside it, as ViSAEBench publishes such SAEs.

encoder.final_block.0.{weight [F, D], bias}, dictionary._weights [F, D] (normalized, by default to rows of norm 1),
dictionary.multiplier [] (its exponential multiplies them), for jumprelu `thresholds` [F] (logarithms); and where the
encoder normalizes, encoder.final_block.1.* of a BatchNorm over the latents, which is folded. The package keeps k and
the threshold of batchtopk outside of its tensors, so the settings tell them; ViSAEBench's training adds
_running_threshold []. There is no bias before the encoder or after the decoder, and a value equal to its threshold is
active.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from actcache import CorruptError, SettingsError
from saetrain.config import VARIANTS
from saetrain.interop.constants import Statistics
from saetrain.interop.fields import Fields, check_fields, check_sizes, check_tensors, names, shorten
from saetrain.interop.files import find_settings, load_tensors, read_k, read_settings, take
from saetrain.interop.foreign import build_sae
from saetrain.interop.refusals import refuse_kind
from saetrain.model import SAE

BLOCK = "encoder.final_block."
DEEPER = ("encoder.mlp_blocks.", "encoder.attention_blocks.", "encoder.resnet")
NORM = ("weight", "bias", "running_mean", "running_var")
EPS = 1e-5
RUNNING = "_running_threshold"
ARCHITECTURES = ("relu", "topk", "batchtopk", "jumprelu")
SPELLINGS = ("architecture", "activation", "sae_type")
WIDTHS, COUNTS = ("d_model", "input_dim"), ("dict_size", "hidden_dim")
NORMALIZATIONS = ("l2", "max_l2", "l1", "max_l1", "identity")
FIELDS = Fields(
    "overcomplete or ViSAEBench",
    used=frozenset({*SPELLINGS, *WIDTHS, *COUNTS, "k", "threshold", "normalization"}),
    neutral=names(
        "backbone layer expansion_factor seed lr batch_size n_steps num_steps total_steps num_epochs dataset "
        "activation_dir"
    ),
)


def read(path: Path) -> SAE:
    """Read a checkpoint. Raises CorruptError, and SettingsError for an encoder that no SAE here can compute."""
    settings, tensors = find_settings(path), load_tensors(path)
    config = read_settings(settings)
    check_fields(config, FIELDS, settings)
    variant = read_variant(config, settings)
    own = {"jumprelu": names("thresholds"), "batchtopk": names(RUNNING)}.get(variant, frozenset())
    weights = read_weights(tensors, path, own, config.get("normalization", "l2"))
    n_latents, d_model = weights["encoder"].shape
    check_sizes(config, {**dict.fromkeys(WIDTHS, d_model), **dict.fromkeys(COUNTS, n_latents)}, settings)
    weights["b_dec"] = torch.zeros(d_model)
    if variant == "jumprelu":
        weights["threshold"] = take(tensors, path, {"thresholds": (n_latents,)})["thresholds"].exp()
    if variant == "batchtopk":
        weights["threshold"] = read_threshold(config, tensors, path, settings)
    if "threshold" in weights:
        weights["threshold"] = lower(weights["threshold"])
    k = read_k(config.get("k"), n_latents, settings) if VARIANTS[variant].top_k else None
    return build_sae(variant, weights, k=k)


def read_variant(config: Mapping[str, object], path: Path) -> str:
    """The variant that the settings name, under one of three names."""
    found = [config[name] for name in SPELLINGS if name in config]
    if found:
        refuse_kind(found[0], path)
    found = [value.lower() if isinstance(value, str) else value for value in found]
    if not found or any(value != found[0] for value in found) or found[0] not in ARCHITECTURES:
        shown = ", ".join(map(shorten, found)) or "none"
        raise SettingsError(f"{path} names the architecture {shown}. Give one of {', '.join(ARCHITECTURES)}.")
    return str(found[0])


def read_weights(
    tensors: Mapping[str, object], file: Path, own: frozenset[str] = frozenset(), normalization: object = "l2"
) -> dict[str, Tensor]:
    """Encoder [F, D] and b_enc [F] with the BatchNorm folded, and decoder [F, D] as evaluation has it.

    Args:
        own: other names that the file may have.
    """
    deeper = next((name for name in map(str, tensors) if name.startswith(DEEPER)), None)
    if deeper is not None:
        raise SettingsError(
            f"{file} has an encoder of several layers ({shorten(deeper)}). Give an SAE with a linear encoder."
        )
    known = {f"{BLOCK}0.weight", f"{BLOCK}0.bias", "dictionary._weights", "dictionary.multiplier"} | own
    has_norm = any(name.startswith(f"{BLOCK}1.") for name in map(str, tensors))
    if has_norm:
        known |= {f"{BLOCK}1.{name}" for name in (*NORM, "num_batches_tracked")}
        if f"{BLOCK}1.running_mean" not in tensors:
            raise SettingsError(f"{file} normalizes each token over its latents, which no SAE here can compute.")
    check_tensors(tensors, known, file)
    encoder = take(tensors, file, {f"{BLOCK}0.weight": (None, None)})[f"{BLOCK}0.weight"]
    weights = {"encoder": encoder, "b_enc": take(tensors, file, {f"{BLOCK}0.bias": (len(encoder),)})[f"{BLOCK}0.bias"]}
    shape = (encoder.shape[0], encoder.shape[1])
    weights = _fold_norm(weights, tensors, file) if has_norm else weights
    return {**weights, "decoder": _read_dictionary(tensors, shape, normalization, file)}


def _fold_norm(weights: Mapping[str, Tensor], tensors: Mapping[str, object], file: Path) -> dict[str, Tensor]:
    """gamma (E x + b - m) / sqrt(v + eps) + beta, as one affine map of x."""
    n_latents = len(weights["encoder"])
    taken = take(tensors, file, {f"{BLOCK}1.{name}": (n_latents,) for name in NORM})
    gamma, beta, mean, variance = (taken[f"{BLOCK}1.{name}"] for name in NORM)
    if (variance < 0).any():
        raise CorruptError(f"{file}: a variance of the encoder's BatchNorm is negative. Copy the file again.")
    factor = gamma / (variance + EPS).sqrt()
    return {"encoder": weights["encoder"] * factor[:, None], "b_enc": (weights["b_enc"] - mean) * factor + beta}


def _read_dictionary(
    tensors: Mapping[str, object], shape: tuple[int, int], normalization: object, file: Path
) -> Tensor:  # fmt: skip
    if not isinstance(normalization, str) or normalization not in NORMALIZATIONS:
        raise SettingsError(
            f"{file} has normalization {shorten(normalization)}. Give one of {', '.join(NORMALIZATIONS)}."
        )
    rows = take(tensors, file, {"dictionary._weights": shape})["dictionary._weights"]
    if normalization != "identity":
        lengths = rows.norm(p=1 if normalization.endswith("l1") else 2, dim=1, keepdim=True)
        rows = rows / (lengths.max() if normalization.startswith("max") else lengths).clamp_min(1e-12)
    if "dictionary.multiplier" in tensors:  # older versions have none
        rows = rows * take(tensors, file, {"dictionary.multiplier": ()})["dictionary.multiplier"].exp()
    return rows


def read_threshold(
    config: Mapping[str, object], tensors: Mapping[str, object], file: Path, settings: Path
) -> Tensor:  # fmt: skip
    """The threshold [] of batchtopk: the settings' or else the tensors'; 0 for ViSAEBench, which takes that."""
    value = config.get("threshold")
    if value is None and RUNNING in tensors:
        return take(tensors, file, {RUNNING: ()})[RUNNING]
    if value is None and "backbone" in config:
        return torch.zeros(())
    if not isinstance(value, int | float) or isinstance(value, bool) or not -1e12 < value < 1e12:
        raise CorruptError(
            f"{settings}: threshold must be a number, got {shorten(value)}. overcomplete keeps it in "
            "running_threshold, which is in no state dict; write it into the settings."
        )
    return torch.tensor(float(value))


def lower(threshold: Tensor) -> Tensor:
    """The next smaller number: a value here has to be above its threshold, and there it may be equal."""
    return threshold.float().nextafter(torch.tensor(-torch.inf)).clamp_min(0)


def lacking(path: Path) -> Statistics | None:
    """ViSAEBench's training normalizes by the mean and one deviation of its patches, and keeps them with the patches,
    not with the SAE (visaebench-internal, `scripts/train*`). Its settings name a backbone."""
    return Statistics("variance", "patch") if "backbone" in read_settings(find_settings(path)) else None


def remark(path: Path) -> tuple[str, ...]:
    """That a threshold is missing, without which the codes are not as sparse as they were trained."""
    config = read_settings(find_settings(path))
    missing = config.get("threshold") is None and "batchtopk" in [config.get(name) for name in SPELLINGS]
    if not missing or RUNNING in load_tensors(path, mapped=True):
        return ()
    return ("No file holds the threshold of batchtopk. 0 is used, as visaebench does: every positive code is kept.",)
