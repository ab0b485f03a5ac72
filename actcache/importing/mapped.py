"""Arrays in the files of others, mapped into memory: .npy, .pt, .safetensors, and raw floats without a header.

In: a path. Out: `Mapped` arrays by name; nothing of their values is read before rows are taken. Promises: no code of a
file is run; only floating-point numbers are taken; a file that is cut off, or of which anything else is wrong, raises
an error of one line. bfloat16, which numpy lacks, is read as 16 bits and becomes float32.
"""

import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import CorruptError, PipelineError, SettingsError

SUFFIXES = (".npy", ".pt", ".pth", ".safetensors")
ALONE = ""
"""The name of an array that is alone in its file."""

_TAKEN = "Expected float16, bfloat16, float32 or float64."


@dataclass(frozen=True)
class Mapped:
    """An array of floating-point numbers in a file.

    Attributes:
        file: the file's name, for messages.
        values: float16, float32 or float64; or uint16, the bits of bfloat16.
    """

    file: str
    values: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Some rows, [n, ...] in float16, float32 or float64."""
        taken = self.values[rows]
        if taken.dtype != np.uint16:
            return np.asarray(taken)
        return (taken.astype(np.uint32) << 16).view(np.float32)  # bfloat16 is the upper half of float32

    def layer(self, number: int) -> "Mapped":
        """One layer of an array whose axis 1 holds several; a view."""
        return Mapped(self.file, self.values[:, number])


def map_arrays(path: Path) -> Mapping[str, Mapped]:
    """The arrays of a file by their names; one that has no name is called ALONE.

    Raises:
        SettingsError: it is not a file of a known kind, or holds other things than floating-point numbers.
        CorruptError: it is damaged.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise SettingsError(f"{path} is not a file of activations. Expected {', '.join(SUFFIXES)}, or saev's folder.")
    check_regular(path)
    try:
        if suffix == ".npy":
            return {ALONE: _map_npy(path)}
        return _map_safetensors(path) if suffix == ".safetensors" else _map_torch(path)
    except PipelineError:
        raise
    except (OSError, ValueError, RuntimeError, OverflowError, MemoryError, EOFError, KeyError, TypeError) as error:
        raise CorruptError(f"{path} cannot be read ({_reason(error)}). Copy or write it again.") from error


def map_raw(path: Path, shape: tuple[int, ...]) -> Mapped:
    """The beginning of a file without a header, little-endian float32 in C order. Raises as `map_arrays`."""
    check_regular(path)
    wanted, there = 4 * math.prod(shape), path.stat().st_size
    if there < wanted:
        raise CorruptError(
            f"{path} has {there:,} bytes, but {' x '.join(map(str, shape))} float32 values take {wanted:,}. "
            "Copy or write it again."
        )
    return Mapped(path.name, np.memmap(path, dtype="<f4", mode="r", shape=shape))


def check_regular(path: Path) -> None:
    """Raise SettingsError for what is missing, or is a folder, a pipe or a device."""
    try:
        there, regular = os.path.lexists(path), path.is_file()
    except (OSError, ValueError) as error:  # no permission, or a zero byte
        raise SettingsError(f"{path} cannot be opened ({_reason(error)}). Check the path.") from error
    if not regular:
        what = "is not a file" if there else "does not exist"
        raise SettingsError(f"{path} {what}. Expected a file of activations; check the path.")


def _map_npy(path: Path) -> Mapped:
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    if dtype.hasobject:
        raise SettingsError(f"{path} holds Python objects, which could run code when they are read. {_TAKEN}")
    if dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
        raise SettingsError(f"{path} holds {dtype}. {_TAKEN}")
    if math.prod(shape) == 0:
        raise SettingsError(f"{path} is empty: its shape is {_show(shape)}. Expected at least one image.")
    return Mapped(path.name, np.lib.format.open_memmap(path, mode="r"))


def _map_safetensors(path: Path) -> Mapping[str, Mapped]:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: _of_tensor(path, name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CorruptError(f"{path} cannot be read ({_reason(error)}). Copy or write it again.") from error


def _map_torch(path: Path) -> Mapping[str, Mapped]:
    import pickle

    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what is refused below
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise SettingsError(
            f"{path} holds more than tensors, which could run code when it is read. "
            "Save the tensor alone: torch.save(tensor, path)."
        ) from error
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        raise SettingsError(
            f"{path} is not in the format that torch has written since version 1.6, so it cannot be read in parts. "
            "Load it and save it again with torch.save."
        ) from error
    tensors = content if isinstance(content, dict) else {ALONE: content}
    named = {
        name: value for name, value in tensors.items() if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    if not named:
        raise SettingsError(f"{path} holds {type(content).__name__}. Expected a tensor, or tensors by their names.")
    return {name: _of_tensor(path, name, value) for name, value in named.items()}


def _of_tensor(path: Path, name: str, tensor: Any) -> Mapped:
    import torch

    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    where = f"{path}{f' ({name!r:.60})' if name else ''}"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in dtypes:
        kind = str(tensor.dtype if tensor.layout == torch.strided else tensor.layout).removeprefix("torch.")
        raise SettingsError(f"{where} holds {kind}. {_TAKEN}")
    if tensor.numel() == 0:
        raise SettingsError(f"{where} is empty: its shape is {_show(tensor.shape)}. Expected at least one image.")
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return Mapped(path.name, tensor.view(torch.int16).numpy().view(np.uint16))
    return Mapped(path.name, tensor.numpy())


def _show(shape: Any) -> str:
    return str([int(n) for n in shape])[:80]


def _reason(error: BaseException) -> str:
    text = str(getattr(error, "strerror", None) or error)
    return (text.splitlines() or [type(error).__name__])[0].rstrip(".")[:160]
