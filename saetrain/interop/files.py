"""Files of other packages, which may be anything: read in bounded memory, without running what they hold.

A .pt file goes through torch's restricted unpickler, which builds tensors and plain containers; config classes that
are known by name become empty shells for their fields.
"""

import io
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import safetensors
import torch
from safetensors.torch import load
from torch import Tensor

from actcache import CorruptError

MAX_RATIO = 3
"""A torch file stores its tensors uncompressed: one that unpacks to more than so many times its size is none."""
MAX_JSON = 1 << 20
"""Bytes of a settings file."""


class Config(SimpleNamespace):
    """Stands for the config object of a checkpoint."""


CONFIGS = (
    "src.sae_training.config.ViTSAERunnerConfig", "src.sae_training.config.Config",
    "sae_training.config.ViTSAERunnerConfig", "sae_training.config.Config",
    "vit_prisma.sae.config.VisionModelSAERunnerConfig", "vit_prisma.sae.config.RunnerConfig",
    "vit_prisma.configs.HookedViTConfig.HookedViTConfig",
)  # fmt: skip


def load_tensors(path: Path, *, skip: int = 0) -> dict[str, object]:
    """What a .pt file holds after its first `skip` bytes, without running anything in it. Raises CorruptError."""
    try:
        source = io.BytesIO(path.read_bytes()[skip:]) if skip else path
        with zipfile.ZipFile(source) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > MAX_RATIO * path.stat().st_size:
            raise ValueError(f"it would unpack to {unpacked:,} bytes")
        if isinstance(source, io.BytesIO):
            source.seek(0)
        with torch.serialization.safe_globals([(Config, name) for name in CONFIGS]):
            found = torch.load(source, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, TypeError, AttributeError, IndexError,
            pickle.UnpicklingError, zipfile.BadZipFile) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:160]
        raise CorruptError(
            f"{path} cannot be read as tensors ({reason}). A checkpoint holds tensors and plain settings; what would "
            "run code is refused."
        ) from error
    if not isinstance(found, dict):
        raise CorruptError(f"{path} must hold a dict of tensors, holds {type(found).__name__}.")
    return found


def read_config(path: Path) -> dict[str, object]:
    """A JSON object. Raises CorruptError."""
    return _read_json(path, whole=True)[0]


def read_header(path: Path) -> tuple[dict[str, object], int]:
    """(the JSON object in a file's first line, bytes of that line). Raises CorruptError."""
    return _read_json(path, whole=False)


def _read_json(path: Path, *, whole: bool) -> tuple[dict[str, object], int]:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_JSON + 1) if whole else file.readline(MAX_JSON + 1)
        if len(data) > MAX_JSON:
            raise ValueError("larger than 1 MiB")
        found = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        what = "a JSON file" if whole else "a file with a JSON line first"
        raise CorruptError(f"{path} is not {what} that can be read ({error}). Copy it again.") from error
    if not isinstance(found, dict):
        raise CorruptError(f"{path} must hold a JSON object, holds {type(found).__name__}. Copy it again.")
    return found, len(data)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file. Raises CorruptError."""
    try:
        return load(path.read_bytes())
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise CorruptError(f"{path} cannot be read as safetensors ({error}). Copy it again.") from error


def take(tensors: Mapping[str, object], path: Path, **shapes: tuple[int | None, ...]) -> dict[str, Tensor]:
    """The named tensors as float32, their shapes checked; `__` in a name stands for a dot, None for any size.

    Raises:
        CorruptError: one is missing, has another shape, is of integers, or is not finite.
    """
    taken = {}
    for name, shape in shapes.items():
        name = name.replace("__", ".")
        value = tensors.get(name)
        if not isinstance(value, Tensor):
            raise CorruptError(
                f"{path} has no tensor {name}. It is incomplete, or of another architecture than it says."
            )
        fits = value.dim() == len(shape) and all(n in (None, m) for n, m in zip(shape, value.shape, strict=True))
        if not fits or value.is_complex() or value.layout != torch.strided:
            raise CorruptError(f"{path}: {name} has shape {tuple(value.shape)}, expected {shape}. Copy it again.")
        if shape and not value.is_floating_point():  # a k may be an integer
            raise CorruptError(f"{path}: {name} holds {value.dtype}, expected floats. Give the weights as trained.")
        taken[name.replace(".", "__")] = value.float()
        if not taken[name.replace(".", "__")].isfinite().all():
            raise CorruptError(f"{path}: {name} holds numbers that are not finite. The training had diverged.")
    return taken


def read_k(value: object, n_latents: int, path: Path) -> int:
    """A whole number of active latents. Raises CorruptError."""
    if not isinstance(value, int | float) or value != int(value) or not 1 <= value <= n_latents:
        raise CorruptError(f"{path}: k must be a whole number in 1..{n_latents}, is {value!r}.")
    return int(value)
