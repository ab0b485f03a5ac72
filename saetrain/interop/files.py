"""Reading files of other packages, in bounded memory and without running any code in them.

A .pt file goes through torch's restricted unpickler, which builds only tensors and plain containers. Configuration
classes with a known name become plain objects that hold their fields.
"""

import io
import json
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors
import torch
from safetensors.torch import load
from torch import Tensor

from actcache import CorruptError, SettingsError
from actcache.text import is_utf8
from saetrain.interop.fields import shorten

MAX_RATIO = 3
"""A torch file stores its tensors uncompressed. One that unpacks to more than this many times its size is refused."""
MAX_JSON = 1 << 20
"""Largest size of a settings file, in bytes."""

SETTINGS = ("config.json", "config.yaml", "config.yml")

LARGEST = 1e12
"""Largest number in a weight: the product of two of them and a row of activations stays far inside float32."""


class Config(SimpleNamespace):
    """Stands for the configuration object in a checkpoint."""


class NumpyType:
    """Stands for a numpy.dtype in a pickle, of which only the name is read."""

    def __init__(self, name: str, *flags: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        """The byte order and what else a dtype has; a number is written in the order of almost every machine."""


def read_number(kind: NumpyType, data: bytes) -> float:
    """Stands for numpy's function that makes a number in a pickle, without numpy's objects. Raises ValueError."""
    codes = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i"}
    if not isinstance(kind, NumpyType) or kind.name not in codes or not isinstance(data, bytes):
        raise ValueError("it holds a number of a kind that is not known")
    number: float = struct.unpack(codes[kind.name], data)[0]
    return number


CONFIGS = (
    "src.sae_training.config.ViTSAERunnerConfig", "src.sae_training.config.Config",
    "sae_training.config.ViTSAERunnerConfig", "sae_training.config.Config",
    "vit_prisma.sae.config.VisionModelSAERunnerConfig", "vit_prisma.sae.config.RunnerConfig",
    "vit_prisma.configs.HookedViTConfig.HookedViTConfig",
    "sae_training.config.LanguageModelSAERunnerConfig", "sae_training.config.RunnerConfig",
    "sae_lens.training.config.LanguageModelSAERunnerConfig",
)  # fmt: skip
NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
"""Where numpy 1 and 2 have the function that makes a number."""
PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml")
POINTER = b"version https://git-lfs"


def check_download(path: Path) -> None:
    """Raise CorruptError for what lies in place of a file that was not really downloaded."""
    try:
        with open(path, "rb") as file:
            start = file.read(256).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    except OSError:
        return  # who reads it says so
    if start.startswith(PAGES):
        raise CorruptError(
            f"{path} is a web page, not a checkpoint. Download the file itself; where a repository asks for a login "
            "or for consent, do that first."
        )
    if start.startswith(POINTER):
        raise CorruptError(
            f"{path} is a pointer of Git LFS, not the file that it stands for. Run `git lfs pull` in its repository, "
            "or download the file itself."
        )


def load_tensors(path: Path, *, skip: int = 0, mapped: bool = False) -> dict[str, object]:
    """Load a .pt file from byte `skip` on, without running any code in it.

    Args:
        mapped: leave the tensors in the file until they are used, and verify no checksums. For a look at the names, and
            for a file that was loaded before.

    Raises:
        CorruptError: it holds other things than tensors and plain settings, is damaged, or claims absurd sizes.
    """
    check_download(path)
    try:
        size = path.stat().st_size
        source = io.BytesIO(path.read_bytes()[skip:]) if skip else path
        with zipfile.ZipFile(source) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > MAX_RATIO * size:
                raise ValueError(f"it would unpack to {unpacked:,} bytes")
            if not mapped and (damaged := archive.testzip()) is not None:  # torch does not compare them
                raise CorruptError(f"{path} is damaged: {shorten(damaged)} has a wrong checksum. Download it again.")
        if isinstance(source, io.BytesIO):
            source.seek(0)
        shells: list[Any] = [(Config, name) for name in CONFIGS]
        shells += [(NumpyType, "numpy.dtype"), *((read_number, f"{room}.scalar") for room in NUMPY)]
        with warnings.catch_warnings(), torch.serialization.safe_globals(shells):
            warnings.simplefilter("ignore")  # torch warns of what it then refuses
            mmap = True if mapped and not skip and is_utf8(path) else None  # torch maps no file of another name
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
        check_claims(content, size)
    except CorruptError:
        raise
    except Exception as error:  # a damaged pickle makes torch raise a dozen kinds, AssertionError among them
        if isinstance(error, zipfile.BadZipFile) and _starts_as_zip(path, skip):
            raise CorruptError(
                f"{path} is cut off after {size:,} bytes: its download did not finish. Download it again."
            ) from error
        raise refuse_pickle(path, error) from error
    return check_dict(content, path)


def refuse_pickle(path: Path, error: BaseException) -> CorruptError:
    """The error for a file that does not hold tensors and plain settings only, with what it names if it names code."""
    text = " ".join(str(error).split())
    named = re.search(r"GLOBAL ([\w.]+)", text)  # after a long text of torch on its defaults
    reason = f"it names {shorten(named[1])}" if named else text[:160]
    return CorruptError(
        f"{path} could not be read as tensors ({reason}). A checkpoint must hold only tensors and plain settings; "
        "anything that would run code is refused. Export it again as a state dict."
    )


def check_dict(content: object, path: Path) -> dict[str, object]:
    """Raise CorruptError for anything but a dict."""
    if not isinstance(content, dict):
        raise CorruptError(
            f"{path} must hold a dict of tensors, but holds {type(content).__name__}. Export it again as a state dict."
        )
    return content


def _starts_as_zip(path: Path, skip: int) -> bool:
    with open(path, "rb") as file:
        file.seek(skip)
        return file.read(2) == b"PK"


def check_claims(content: object, size: int) -> None:
    """Raise ValueError if the tensors in a file of `size` bytes claim far more: strides of 0 make one number many."""
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in _walk_tensors(content))
    if claimed > MAX_RATIO * size:
        raise ValueError(f"its tensors claim {claimed:,} bytes, but it has {size:,}")


def _walk_tensors(content: object) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        for inner in content.values() if isinstance(content, dict) else content:
            yield from _walk_tensors(inner)


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
    check_download(path)
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


def find_settings(path: Path) -> Path:
    """The settings beside a checkpoint, under any of their three names. Raises SettingsError if there are none."""
    for name in SETTINGS:
        if (path.parent / name).is_file():
            return path.parent / name
    raise SettingsError(
        f"{path} has no {SETTINGS[0]} or {SETTINGS[1]} beside it, and its tensors do not say how the codes are chosen. "
        "Put the settings that were published with it into its folder."
    )


def read_settings(path: Path) -> dict[str, object]:
    """Read settings from JSON, or from YAML of one `name: value` a line. Raises CorruptError."""
    if path.suffix == ".json":
        return read_config(path)
    check_download(path)
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_JSON + 1)
        if len(data) > MAX_JSON:
            raise ValueError("larger than 1 MiB")
        lines = [line for line in data.decode().splitlines() if line.strip() and not line.lstrip().startswith("#")]
        if not all(re.match(r"\w+:( |$)", line) for line in lines):
            raise ValueError("it is not one `name: value` a line")
    except (OSError, ValueError) as error:
        raise CorruptError(f"{path} could not be read as settings ({error}). Copy the file again.") from error
    return {name: _scalar(value.strip()) for name, _, value in (line.partition(":") for line in lines)}


def _scalar(text: str) -> object:
    """A value of YAML, as far as settings have them: null, a truth value, a number or a text."""
    if text in ("", "~", "null", "true", "false"):
        return {"true": True, "false": False}.get(text)
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file. Raises CorruptError."""
    check_download(path)
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
        low, high = taken[name].aminmax() if value.numel() else (0.0, 0.0)
        if not (low >= -LARGEST and high <= LARGEST):  # NaN fails the comparisons
            raise CorruptError(
                f"{path}: {name} holds numbers that are not finite, or beyond {LARGEST:g}: the training diverged. "
                "Give an earlier checkpoint."
            )
    return taken


def take_state(content: Mapping[str, object], entry: str, path: Path) -> Mapping[str, object]:
    """The state dict in an entry of a checkpoint. Raises CorruptError if there is none."""
    state = content.get(entry)
    if not isinstance(state, dict):
        raise CorruptError(f"{path} has no {entry} with tensors. Download it again.")
    return state


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
