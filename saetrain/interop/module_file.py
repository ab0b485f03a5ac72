"""Reading a whole module that torch.save pickled, without its package, its code or its largest tensors in memory.

The pickle of such a file names classes and builds their objects. Here every class that a caller allows becomes an empty
shell that holds the attributes, a tensor becomes a handle on its place in the archive, and any other name is refused
before anything of it is imported. A tensor is read when it is asked for, whole or in blocks of rows.
"""

import collections
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actcache import CorruptError
from saetrain.interop.fields import shorten
from saetrain.interop.files import LARGEST

MAX_PICKLE = 1 << 20
"""Largest size of the pickle of a module, in bytes: its tensors lie beside it."""
BLOCK_BYTES = 1 << 25
"""How much of a tensor is read at once."""
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
}  # fmt: skip


class Shell:
    """Stands for an object of another package: its attributes, and none of its code."""

    def get(self, name: str, default: object = None) -> Any:
        """An attribute, or a parameter, buffer or part of a module, by its name."""
        for table in (self.__dict__, *(self.__dict__.get(each) for each in ("_parameters", "_buffers", "_modules"))):
            if isinstance(table, dict) and name in table:
                return table[name]
        return default


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, which is not read yet."""

    file: Path
    entry: str
    dtype: torch.dtype
    offset: int  # in elements
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """The whole tensor in float32. Raises CorruptError."""
        (whole,) = self._blocks(max(math.prod(self.shape), 1))
        return whole.view(self.shape)

    def rows(self) -> Iterator[Tensor]:
        """Blocks [b, ...] of rows in float32, of about 32 MiB in the file; the next one overwrites the one before.

        Raises CorruptError.
        """
        width = math.prod(self.shape[1:])
        step = max(1, BLOCK_BYTES // (width * self.dtype.itemsize)) * width
        return (block.view(-1, *self.shape[1:]) for block in self._blocks(step))

    def _blocks(self, step: int) -> Iterator[Tensor]:
        count, size = math.prod(self.shape), self.dtype.itemsize
        try:
            with zipfile.ZipFile(self.file) as archive, archive.open(self.entry) as stream:
                stream.seek(self.offset * size)
                memory = memoryview(bytearray(min(step, count) * size))
                for first in range(0, max(count, 1), step):
                    data = memory[: min(step, count - first) * size]
                    part = stream.read(len(data))
                    if len(part) != len(data):
                        raise EOFError("it ends too early")
                    data[:] = part
                    del part
                    block = torch.frombuffer(data, dtype=self.dtype).float() if data else torch.zeros(0)
                    if data and not all(abs(float(end)) <= LARGEST for end in torch.aminmax(block)):  # nor NaN
                        raise ValueError(f"it holds numbers that are not finite, or beyond {LARGEST:g}")
                    yield block
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise CorruptError(f"{self.file}: {self.entry} cannot be read ({error}). Copy the file again.") from error


def load_module(path: Path, classes: Collection[str]) -> Shell:
    """Read the module in a file of torch.save. Raises CorruptError.

    Args:
        classes: the full names of the classes that become shells.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            (name,) = [name for name in entries if name.split("/")[1:] == ["data.pkl"]]
            folder = name.removesuffix("data.pkl")
            if entries[name].file_size > MAX_PICKLE:
                raise ValueError("its pickle is larger than 1 MiB")
            order = entries.get(f"{folder}byteorder")
            if order is not None and archive.read(order)[:8] != b"little":
                raise ValueError("it was written by a machine with another order of bytes")
            content = _Unpickler(path, f"{folder}data/", entries, archive.read(name), classes).load()
        if not isinstance(content, Shell):
            raise ValueError(f"it holds {type(content).__name__}, not a module")
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, TypeError, AttributeError, IndexError, MemoryError,
            ImportError, OverflowError, NotImplementedError, struct.error, pickle.UnpicklingError,
            zipfile.BadZipFile) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:160]
        raise CorruptError(
            f"{path} could not be read as a module ({reason}). Anything that would run code is refused. Give the file "
            "as it was published."
        ) from error
    return content


@dataclass(frozen=True)
class _Storage:
    """The numbers in an entry of the archive, which tensors may share."""

    entry: str
    dtype: torch.dtype
    n_elements: int


class _Unpickler(pickle._Unpickler):  # the one in C takes memory for whatever place a pickle claims to remember
    def __init__(
        self, path: Path, folder: str, entries: dict[str, zipfile.ZipInfo], data: bytes, classes: Collection[str]
    ) -> None:
        super().__init__(BytesIO(data))
        self.path, self.folder, self.entries = path, folder, entries
        self.shells = {name: type(name.rpartition(".")[2], (Shell,), {}) for name in classes}
        self.known: dict[str, Callable[..., object] | type] = {
            "collections.OrderedDict": collections.OrderedDict, "builtins.set": set, "__builtin__.set": set,
            "torch.device": self._name_device, "torch._utils._rebuild_tensor_v2": self._make_tensor,
            "torch._utils._rebuild_parameter": self._make_parameter,
            **{f"torch.{name}": type(name, (), {"dtype": dtype}) for name, dtype in STORAGES.items()},
        }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        key = f"{module}.{name}"
        if key not in self.shells and key not in self.known:
            raise pickle.UnpicklingError(f"it names {shorten(key)}, which is not on the list")
        return self.shells.get(key) or self.known[key]

    def persistent_load(self, pid: Any) -> "_Storage":
        kind, storage, key, _, _ = pid
        entry = self.entries[f"{self.folder}{key}"]
        if kind != "storage" or entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its entry {shorten(key)} is not stored as numbers")
        return _Storage(entry.filename, storage.dtype, entry.file_size // storage.dtype.itemsize)

    def _make_tensor(
        self, storage: "_Storage", offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: object
    ) -> StoredTensor:
        if not isinstance(storage, _Storage):
            raise TypeError("a tensor in it has no numbers")
        contiguous = all(
            step == math.prod(shape[axis + 1 :]) for axis, step in enumerate(stride) if shape[axis] > 1
        ) and len(stride) == len(shape)
        fits = offset >= 0 and min((*shape, 1)) > 0 and offset + math.prod(shape) <= storage.n_elements
        if not fits or not contiguous:
            raise ValueError(f"its entry {shorten(storage.entry)} holds no tensor of shape {shape}, row after row")
        return StoredTensor(self.path, storage.entry, storage.dtype, offset, tuple(shape))

    def _make_parameter(self, data: StoredTensor, *_: object) -> StoredTensor:
        return data

    def _name_device(self, *parts: object) -> str:
        return ":".join(map(str, parts))
