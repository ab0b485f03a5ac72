"""Discover-then-Name: a state dict of ai-safety-foundation's sparse_autoencoder in one .pt.

tied_bias [D], encoder._weight [F, D], encoder._bias [F], decoder._weight [D, F], each with a leading axis of the
components that it was trained on, here 1, or without; and pre_encoder_bias._bias_reference and
post_decoder_bias._bias_reference, which are tied_bias again. Later versions of the package spell the names without the
second underscore. The codes are relu(encoder (x - tied_bias) + bias), and the reconstruction is decoder codes +
tied_bias.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from actcache import CorruptError, SettingsError
from saetrain.interop.fields import check_tensors
from saetrain.interop.files import load_tensors, take
from saetrain.interop.foreign import build_sae, take_weights
from saetrain.model import SAE

NAMES = {"encoder": "encoder._weight", "decoder": "decoder._weight", "b_dec": "tied_bias", "b_enc": "encoder._bias"}
LATER = {ours: name.replace("._", ".") for ours, name in NAMES.items()}
COPIES = ("pre_encoder_bias._bias_reference", "post_decoder_bias._bias_reference")


def read(path: Path) -> SAE:
    """Read a file. Raises CorruptError, and SettingsError for a file of several components."""
    content = load_tensors(path)
    spelling = NAMES if NAMES["encoder"] in content else LATER
    check_tensors(content, {*spelling.values(), *COPIES}, path)
    tensors = _drop_components(content, path)
    weights = take_weights(tensors, path, spelling)
    for name in COPIES:
        if name in tensors:
            copy = take(tensors, path, {name: tuple(weights["b_dec"].shape)})[name]
            if not torch.equal(copy, weights["b_dec"]):
                raise CorruptError(f"{path}: {name} is not tied_bias, although it is a copy of it. Download it again.")
    return build_sae("relu", weights)


def _drop_components(content: Mapping[str, object], path: Path) -> dict[str, object]:
    bias = content.get("tied_bias")
    if not isinstance(bias, Tensor) or bias.dim() != 2:
        return dict(content)
    if len(bias) != 1:
        raise SettingsError(f"{path} holds the SAEs of {len(bias):,} components. Save the one that you want alone.")
    single = {name: value for name, value in content.items() if isinstance(value, Tensor) and value.shape[:1] == (1,)}
    return {**content, **{name: value[0] for name, value in single.items()}}
