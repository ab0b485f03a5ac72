"""MSAE: one .pth of {"model": encoder [D, F], decoder [F, D] (none if tied), pre_bias [D], latent_bias [F],
latents_activation_frequency; mean_center [D], scaling_factor, target_norm}.

What computes the codes stands in the name of the file: latents, inputs, activation with its k, whether the codes are
nested (RW, UW), tied, normalize, soft cap, data, joined by `_`. x' = (x - mean_center) scaling_factor; the codes are
activation((x' - pre_bias) encoder + latent_bias), and the reconstruction is (codes decoder + pre_bias) / scaling_factor
+ mean_center.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from actcache import CorruptError, SettingsError
from saetrain.config import VARIANTS
from saetrain.interop.fields import Fields, check_fields, check_tensors, names, shorten
from saetrain.interop.files import load_tensors, read_k, take, take_state
from saetrain.interop.foreign import build_sae, set_input, take_weights
from saetrain.interop.refusals import refuse_kind
from saetrain.model import SAE

NAMES = {"encoder": "encoder", "decoder": "decoder", "b_dec": "pre_bias", "b_enc": "latent_bias"}
TIED = {name: spelling for name, spelling in NAMES.items() if name != "decoder"}
COUNTS = "latents_activation_frequency"
FIELDS = Fields("MSAE", names("model mean_center scaling_factor"), names("target_norm"))
"""`scaling_factor` was derived from `target_norm`."""
ACTIVATIONS = {"ReLU": "relu", "TopK": "topk", "TopKReLU": "topk", "BatchTopKReLU": "relu"}
"""Activation -> variant. BatchTopKReLU stores no threshold, and its package then keeps all positive codes."""
EXAMPLE = "6144_768_TopKReLU_64_RW_False_False_0.0_cc3m.pth"


@dataclass(frozen=True)
class Settings:
    """What the name of a file says.

    Attributes:
        k: None if the activation has none.
        normalize: whether each token is normalized by its own mean and deviation.
        soft_cap: codes become cap tanh(codes / cap); 0 leaves them.
    """

    n_latents: int
    d_model: int
    activation: str
    k: int | None
    tied: bool
    normalize: bool
    soft_cap: float


def read(path: Path) -> SAE:
    """Read a file. Raises CorruptError, and SettingsError for a name or a code that cannot be read."""
    settings = read_name(path)
    _refuse(settings, path)
    content = load_tensors(path)
    check_fields(content, FIELDS, path)
    tensors = take_state(content, "model", path)
    spelling = TIED if settings.tied else NAMES
    check_tensors(tensors, {*spelling.values(), COUNTS}, path)
    if settings.tied:
        tensors = {**tensors, "decoder": _transpose(tensors.get("encoder"))}
    weights = take_weights(tensors, path, NAMES)
    if tuple(weights["encoder"].shape) != (settings.n_latents, settings.d_model):
        raise CorruptError(
            f"{path} has an encoder of {tuple(weights['encoder'].shape)}, but its name says "
            f"{(settings.n_latents, settings.d_model)}. Give the file the name under which it was published."
        )
    variant = ACTIVATIONS[settings.activation]
    k = read_k(settings.k, settings.n_latents, path) if VARIANTS[variant].top_k else None
    mean = take(content, path, {"mean_center": (settings.d_model,)})["mean_center"]
    return set_input(build_sae(variant, weights, k=k), mean, _read_scale(content, path))


def read_name(path: Path) -> Settings:
    """The settings in the name of a file. Raises SettingsError if it has none."""
    parts = iter(path.name.partition(".pt")[0].split("_"))
    try:
        n_latents, d_model, activation, k = int(next(parts)), int(next(parts)), next(parts), None
        if "TopK" in activation:
            k = int(next(parts))
        elif activation == "ReLU":
            next(parts)  # the digits of the weight of its penalty
        following = next(parts)
        tied = next(parts) if following in ("RW", "UW") else following
        flags = {"True": True, "False": False}
        return Settings(n_latents, d_model, activation, k, flags[tied], flags[next(parts)], float(next(parts)))
    except (ValueError, KeyError, StopIteration) as error:
        raise SettingsError(
            f"{path} does not say by its name how its codes are computed, as {EXAMPLE} does, and its tensors do not "
            "either. Give the file the name under which it was published."
        ) from error


def _refuse(settings: Settings, path: Path) -> None:
    refuse_kind(settings.activation, path)
    if settings.activation not in ACTIVATIONS:
        raise SettingsError(
            f"{path} has activation {shorten(settings.activation)}. Give an SAE with one of {', '.join(ACTIVATIONS)}."
        )
    if settings.normalize:
        raise SettingsError(f"{path} normalizes each token by its own mean and deviation. Give an SAE without it.")
    if settings.soft_cap != 0:
        raise SettingsError(
            f"{path} bends its codes (cap tanh(code / cap), with cap {settings.soft_cap:g}), which no SAE here can "
            "compute. Give an SAE whose soft cap is 0.0."
        )


def _transpose(value: object) -> object:
    return value.T if isinstance(value, Tensor) and value.dim() == 2 else None


def _read_scale(content: Mapping[str, object], path: Path) -> float:
    value = content.get("scaling_factor")
    if isinstance(value, Tensor):
        value = float(take(content, path, {"scaling_factor": ()})["scaling_factor"])
    if not isinstance(value, int | float) or isinstance(value, bool) or not 1e-9 < value < 1e9:
        raise CorruptError(f"{path}: scaling_factor must be a positive number, got {shorten(value)}.")
    return float(value)


def remark(path: Path) -> tuple[str, ...]:
    if read_name(path).activation != "BatchTopKReLU":
        return ()
    return ("MSAE stores no threshold of BatchTopK. As its package does, every positive code is kept.",)
