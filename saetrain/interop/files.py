"""Reading files of other packages, in bounded memory and without running any code in them.

A .pt file goes through torch's restricted unpickler, which builds only tensors and plain containers. Configuration
classes with a known name become plain objects that hold their fields.
"""

import io
import json
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors
import torch
from safetensors.torch import load
from torch import Tensor

from actcache import CorruptError
from saetrain.interop.fields import shorten

MAX_RATIO = 3
"""A torch file stores its tensors uncompressed. One that unpacks to more than this many times its size is refused."""
MAX_JSON = 1 << 20
"""Largest size of a settings file, in bytes."""

LARGEST = 1e12
"""Largest number in a weight: the product of two of them and a row of activations stays far inside float32."""


class Config(SimpleNamespace):
    """Stands for the configuration object in a checkpoint."""


CONFIGS = (
    "src.sae_training.config.ViTSAERunnerConfig", "src.sae_training.config.Config",
    "sae_training.config.ViTSAERunnerConfig", "sae_training.config.Config",
    "vit_prisma.sae.config.VisionModelSAERunnerConfig", "vit_prisma.sae.config.RunnerConfig",
    "vit_prisma.configs.HookedViTConfig.HookedViTConfig",
)  # fmt: skip


def load_tensors(path: Path, *, skip: int = 0) -> dict[str, object]:
    """Load a .pt file from byte `skip` on, without running any code in it. Raises CorruptError."""
    try:
        source = io.BytesIO(path.read_bytes()[skip:]) if skip else path
        with zipfile.ZipFile(source) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > MAX_RATIO * path.stat().st_size:
            raise ValueError(f"it would unpack to {unpacked:,} bytes")
        if isinstance(source, io.BytesIO):
            source.seek(0)
        shells: list[Any] = [(Config, name) for name in CONFIGS]
        with warnings.catch_warnings(), torch.serialization.safe_globals(shells):
            warnings.simplefilter("ignore")  # torch warns of what it then refuses
            content = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle makes torch raise a dozen kinds, AssertionError among them
        reason = " ".join(str(error).split())[:160]
        raise CorruptError(
            f"{path} could not be read as tensors ({reason}). A checkpoint must hold only tensors and plain settings; "
            "anything that would run code is refused. Export it again as a state dict."
        ) from error
    if not isinstance(content, dict):
        raise CorruptError(
            f"{path} must hold a dict of tensors, but holds {type(content).__name__}. Export it again as a state dict."
        )
    return content


def torch_bytes(content: object) -> bytes:
    """The bytes of a file as torch.save writes it."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def read_config(path: Path) -> dict[str, object]:
    """Read a JSON object. Raises CorruptError."""
    return _read_json(path, whole=True)[0]


def read_header(path: Path) -> tuple[dict[str, object], int]:
    """Read the JSON object in the first line of a file, and the length of that line in bytes. Raises CorruptError."""
    return _read_json(path, whole=False)


def _read_json(path: Path, *, whole: bool) -> tuple[dict[str, object], int]:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_JSON + 1) if whole else file.readline(MAX_JSON + 1)
        if len(data) > MAX_JSON:
            raise ValueError("larger than 1 MiB")
        content = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        part = "" if whole else "The first line of "
        raise CorruptError(f"{part}{path} could not be read as JSON ({error}). Copy the file again.") from error
    if not isinstance(content, dict):
        raise CorruptError(f"{path} must hold a JSON object, but holds {type(content).__name__}. Copy the file again.")
    return content, len(data)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file. Raises CorruptError."""
    try:
        return load(path.read_bytes())
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise CorruptError(f"{path} could not be read as safetensors ({error}). Copy the file again.") from error


def take(tensors: Mapping[str, object], path: Path, shapes: Mapping[str, tuple[int | None, ...]]) -> dict[str, Tensor]:
    """Take the named tensors as float32 and check their shapes, in which None stands for any size.

    Raises:
        CorruptError: a tensor is missing, has another shape, holds integers, or numbers that are not finite or huge.
    """
    taken = {}
    for name, shape in shapes.items():
        value = tensors.get(name)
        if not isinstance(value, Tensor):
            raise CorruptError(
                f"{path} has no tensor {name}: it is incomplete, or its architecture is not the recorded one. Copy the "
                "file again."
            )
        fits = value.dim() == len(shape) and all(n in (None, m) for n, m in zip(shape, value.shape, strict=True))
        if not fits or value.is_complex() or value.layout != torch.strided:
            raise CorruptError(f"{path}: {name} has shape {tuple(value.shape)}, expected {shape}. Copy the file again.")
        if shape and not value.is_floating_point():  # a k may be an integer
            raise CorruptError(
                f"{path}: {name} holds {value.dtype}, expected floats. Give the weights as they were trained."
            )
        taken[name] = value.float()
        if not (taken[name].abs() <= LARGEST).all():  # NaN fails the comparison
            raise CorruptError(
                f"{path}: {name} holds numbers that are not finite, or beyond {LARGEST:g}: the training diverged. "
                "Give an earlier checkpoint."
            )
    return taken


def read_k(value: object, n_latents: int, path: Path) -> int:
    """Read the number of active latents. Raises CorruptError if it is not a whole number in 1..n_latents."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value <= n_latents:  # NaN is not
        k = int(value)
        if k == value:
            return k
    raise CorruptError(
        f"{path}: k must be a whole number in 1..{n_latents}, got {shorten(value)}. Copy the file again."
    )


def read_flag(config: Mapping[str, object], name: str, default: bool, path: Path) -> bool:
    """Read a field that is true or false. Raises CorruptError if it is neither."""
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise CorruptError(f"{path}: {name} must be true or false, got {shorten(value)}. Copy the file again.")
    return value
