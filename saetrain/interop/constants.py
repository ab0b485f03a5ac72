"""InputConstants: the normalization of its input that a package applies before its SAE, where it lies in no file.

    x_in = (x - mean) scale,  x^ = x^_in / scale + mean

Several packages normalize the activations before their training and save the SAE only. The constants are then given by
the user, or estimated from a store by the statistics that the package itself takes of its training rows. Sources: saev
at d03db3b, `activations.py` (scale_mean, scale_norm); visaebench-internal, `scripts/train*`; sache, `train.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from actcache import HookPoint, SettingsError
from actcache.store import StoreGroup, Tokens
from saetrain.interop.foreign import build_sae, fold
from saetrain.interop.formulas.forward import Forward
from saetrain.model import SAE

N_SAMPLE = 1 << 16
"""Rows from which a mean norm is estimated: its relative error is below 1 % then, whatever the activations are like."""
SMALLEST, LARGEST = 1e-12, 1e12
CHANNEL_EPS = 1e-6
"""What CLIP-Scope's training adds to the deviation of a channel."""


@dataclass(frozen=True)
class InputConstants:
    """The normalization of the input, x_in = (x - mean) scale.

    Attributes:
        mean: [D], or [] for all channels.
        scale: [D], or [] for all channels: what a centered activation is multiplied by, 1 / deviation.
        origin: where the numbers come from, as a sentence shows it.
    """

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    origin: str


@dataclass(frozen=True)
class Statistics:
    """Which statistics of its training rows a package normalizes by.

    Attributes:
        deviation: `norm` is mean ||x - mean|| / sqrt(D), `variance` the root of the mean variance of a channel, and
            `channel` the deviation of each channel, and `all` the deviation of all numbers from their one mean.
        tokens: of which tokens.
    """

    deviation: Literal["norm", "variance", "channel", "all"]
    tokens: Tokens


def estimate_constants(statistics: Statistics, store: StoreGroup, hook_point: HookPoint) -> InputConstants:
    """Estimate the constants from a store: from the statistics in its records, and a norm from a sample of rows.

    Raises:
        SettingsError: the store has none of these tokens.
    """
    kind = store.layout.token_kind(statistics.tokens)
    recorded = store.statistics(hook_point, kind)
    if not recorded.count:
        raise SettingsError(f"{store.path} holds no {kind} tokens to estimate the input's mean and scale from.")
    n_rows = f"{recorded.count:,} {'' if kind == 'all' else kind + ' '}rows"
    origin = f"estimated from {store.path.name}, {n_rows}"
    if statistics.deviation == "all":
        mean = recorded.mean.mean()
        deviation = np.sqrt(recorded.variance.mean() + np.square(recorded.mean - mean).mean())
        return InputConstants(np.array(mean), 1 / np.maximum(deviation, SMALLEST), origin)
    if statistics.deviation == "channel":
        deviation = np.sqrt(recorded.variance) + CHANNEL_EPS
    elif statistics.deviation == "variance":
        deviation = np.sqrt(recorded.variance.mean())
    else:
        norm, n_sample = _mean_norm(store, hook_point, kind, recorded.mean)
        deviation = np.array(norm / len(recorded.mean) ** 0.5)
        origin += f" (the scale from {n_sample:,} of them)" if n_sample < recorded.count else ""
    return InputConstants(recorded.mean, 1 / np.maximum(deviation, SMALLEST), origin)


def _mean_norm(
    store: StoreGroup, hook_point: HookPoint, kind: Tokens, mean: NDArray[np.float64]
) -> tuple[float, int]:  # fmt: skip
    """The mean of ||x - mean|| over the rows of the first images, whose order is random, and how many rows that is."""
    readable = np.flatnonzero(store.valid)
    images = readable[: -(-N_SAMPLE // store.n_read_tokens(kind))]
    total, count, step = 0.0, 0, store.layout.chunk_images
    for first in range(0, len(images), step):
        part = store.read(hook_point, images=images[first : first + step], tokens=kind, check=store.checks_cheaply)
        rows = part.reshape(-1, part.shape[-1]).astype(np.float32) - mean.astype(np.float32)
        total += float(np.linalg.norm(rows, axis=1).sum(dtype=np.float64))
        count += len(rows)
    return total / count, count


def read_constants(mean: str | Path | ArrayLike | None, scale: str | Path | ArrayLike | None) -> InputConstants | None:
    """The constants that a user gives: each a number, an array [D], or the .npy file of one. None if none is given.

    Raises:
        SettingsError: only one is given; a file or a number cannot be read, or is not finite; a scale is not above 0.
    """
    if mean is None and scale is None:
        return None
    if mean is None or scale is None:
        missing = "--input-scale" if scale is None else "--input-mean"
        other = "1 leaves the size as it is" if scale is None else "0 subtracts nothing"
        raise SettingsError(f"--input-mean and --input-scale belong together. Give {missing} too; {other}.")
    values = {"--input-mean": _read_array("--input-mean", mean), "--input-scale": _read_array("--input-scale", scale)}
    if not (values["--input-scale"] > 0).all():
        raise SettingsError("--input-scale must be above 0: a centered activation is multiplied by it.")
    return InputConstants(values["--input-mean"], values["--input-scale"], "given with --input-mean and --input-scale")


def _read_array(flag: str, value: str | Path | ArrayLike) -> NDArray[np.float64]:
    if isinstance(value, str | Path):
        try:
            number = float(str(value))
        except ValueError:
            array = _load_array(flag, Path(value))
        else:
            array = np.array(number)
    else:
        array = np.asarray(value)
    if array.ndim > 1 or not array.size or not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
        raise SettingsError(f"{flag} must be a number or one per channel, got an array {array.shape} of {array.dtype}.")
    numbers = array.astype(np.float64)
    if not (np.abs(numbers) <= LARGEST).all():
        raise SettingsError(f"{flag} must be finite and at most {LARGEST:g} in size.")
    return numbers


def _load_array(flag: str, path: Path) -> NDArray[np.generic]:
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)  # nothing is read before the shape is known
        if not isinstance(stored, np.ndarray) or stored.ndim > 1:
            raise ValueError("it holds no single row of numbers")
        return np.array(stored)
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:160]
        raise SettingsError(f"{flag} must be a number or a .npy file, but {path} cannot be read: {reason}.") from error


def fold_constants(sae: SAE, constants: InputConstants) -> SAE:
    """The SAE of activations x, given the SAE of their normalized x_in. It may change `sae`, and return it.

    With one scale c for all channels, ((x - m) c - mean) scale = (x - (m + mean / c)) c scale. A scale of each channel
    goes into the weights: E (c (x - m) - b) = (E c) (x - (m + b / c)), and (f W + b) / c + m = f (W / c) + (m + b / c).

    Raises:
        SettingsError: another number of channels; or the SAE normalizes each token by itself.
    """
    if sae.config.per_token:
        raise SettingsError(
            f"This SAE normalizes each token by itself ({sae.config.normalize}), and no constants apply to it. Leave "
            "out --input-mean and --input-scale."
        )
    for flag, value in (("--input-mean", constants.mean), ("--input-scale", constants.scale)):
        if value.ndim and len(value) != sae.d_model:
            raise SettingsError(f"{flag} has {len(value):,} channels, but the SAE reads {sae.d_model:,}.")
    mean, scale = torch.from_numpy(np.array(constants.mean)), torch.from_numpy(np.array(constants.scale))
    if scale.ndim and bool((scale == scale[0]).all()):
        scale = scale[0]
    if not scale.ndim:
        sae.mean.copy_(mean + sae.mean.double() / scale)
        sae.scale.mul_(scale)
        return sae
    weights = fold(sae)
    weights["encoder"] = (weights["encoder"] * scale).float()
    weights["decoder"] = (weights["decoder"] / scale).float()
    weights["b_dec"] = (mean + weights["b_dec"] / scale).float()
    return build_sae(sae.config.variant, weights, k=sae.config.k)


def normalize_input(forward: Forward, constants: InputConstants) -> Forward:
    """What a package computes from activations x, given what it computes from their normalized x_in."""
    mean, scale = (torch.from_numpy(np.array(value)).float() for value in (constants.mean, constants.scale))

    def normalized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, reconstruction = forward((x - mean) * scale)
        return codes, reconstruction / scale + mean

    return normalized


Lacking = Callable[[Path], Statistics | None]
"""The path that a reader takes -> by which statistics the checkpoint's package normalizes its input, if they lie in no
file."""
