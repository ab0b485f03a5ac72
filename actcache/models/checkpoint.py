"""Reading the weights of a model from a file: what is in it, never running what is in it.

In: a safetensors file, a state dict of torch.save (also inside `{"state_dict": ...}` or `{"model": ...}`, and with the
prefixes of DistributedDataParallel and torch.compile), the checkpoint of a training with teacher and student, a
TorchScript archive as OpenAI published its CLIPs, or the weights of models of transformers. Out: tensors under the
names of open_clip, or of the project that published them.

A TorchScript archive is a zip of a pickle, the tensors and a program. torch.jit.load would run the program, and a
program may open and map files; so the pickle is read here by an unpickler that knows tensors, lists and empty shells of
modules and refuses every other name, and of the program only one question is asked, as text: which GELU it calls.
"""

import argparse
import io
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from actcache.errors import ModelError
from actcache.models import transformers_clip
from actcache.models.transformers_tensors import find_renaming

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
PREFIXES = ("module.", "_orig_mod.", "model.", "_fsdp_wrapped_module.")
TEACHER, STUDENT, BACKBONE = "teacher", "student", "backbone."
"""Of a self-distillation the teacher is what is published: its weights are the average over the training."""
DERIVED = ("input_resolution", "context_length", "vocab_size", "attn_mask")
"""Buffers of TorchScript archives that a model computes by itself."""
LARGEST = 1e9
"""Largest number in a weight. Trained CLIPs stay below 100; products of numbers near 1e38 overflow."""
LARGEST_LOGIT_SCALE = 80.0
"""exp of it is the factor of cosines; exp(88.8) overflows float32, and OpenAI clips at log(100) = 4.6."""
MAX_RATIO = 3
"""A torch file stores its tensors uncompressed. One that unpacks to more than this many times its size is refused."""
MAX_PROGRAM = 1 << 24
MAX_MODULES = 100_000


@dataclass(frozen=True)
class Weights:
    """What a file holds.

    Attributes:
        tensors: under open_clip's names, or those of the project that published them.
        kind: what the file is, for messages.
        quick_gelu: which activation the file itself records; None if it records none, as a plain state dict.
        notes: what of the file was taken, where it holds more than one model.
    """

    tensors: Mapping[str, Tensor]
    kind: str
    quick_gelu: bool | None = None
    notes: tuple[str, ...] = ()


def read_weights(path: str | Path) -> Weights:
    """Read a file. Raises ModelError when it is damaged, holds something else, or has numbers that overflow."""
    path = Path(path)
    try:
        weights = _read(path)
        _check_numbers(weights.tensors)
    except Exception as error:  # safetensors, pickle and zip readers raise a dozen kinds of errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"{path.name} cannot be loaded: {reason[:300].rstrip('.')}. Expected a complete safetensors file, state "
            "dict or TorchScript archive of a model."
        ) from error
    return weights


def _read(path: Path) -> Weights:
    if path.suffix in (".npz", ".npy"):
        raise ValueError("arrays of big_vision belong to image towers that are not supported")
    if path.suffix == ".safetensors":
        return _name(*_unwrap(load_file(path), path.name), "safetensors")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > MAX_RATIO * path.stat().st_size:
                raise ValueError(f"it would unpack to {unpacked:,} bytes")
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return _read_torchscript(archive)
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):  # options of a training
        warnings.simplefilter("ignore")  # torch warns of what it then refuses
        content = torch.load(path, map_location="cpu", weights_only=True)
    return _name(*_unwrap(content, path.name), "state dict")


def _unwrap(content: object, file: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """(the state dict in a file without the names that wrappers put around it, notes)."""
    notes = []
    for _ in range(len(WRAPPERS) + 1):
        if not isinstance(content, Mapping):
            break
        if isinstance(content.get(TEACHER), Mapping) and not isinstance(content[TEACHER], Tensor):
            content = content[TEACHER]
            notes.append(f"{file} is the checkpoint of a training; the teacher's weights were taken.")
            continue
        inner = [content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping)]
        if len(inner) > 1:
            raise ValueError(f"it holds several of {', '.join(WRAPPERS)}")
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"it holds {type(content).__name__}, or nothing, instead of named tensors")
    if wrong := [name for name, value in content.items() if not (isinstance(name, str) and isinstance(value, Tensor))]:
        raise ValueError(f"its entry {str(wrong[0])[:60]!r} is not a named tensor")
    tensors = _strip(dict(content))
    if any(name.startswith(f"{TEACHER}.") for name in tensors) and any(n.startswith(f"{STUDENT}.") for n in tensors):
        notes.append(f"{file} is the checkpoint of a training; the teacher's weights were taken.")
        tensors = _strip(_select(tensors, f"{TEACHER}."))
    if any(name.startswith(BACKBONE) for name in tensors):
        others = sorted(name for name in tensors if not name.startswith(BACKBONE))
        tensors = _strip(_select(tensors, BACKBONE))
        if others:
            rest = f" and {len(others) - 3:,} more" if len(others) > 3 else ""
            notes.append(f"{file} holds more than its backbone; left out: {', '.join(others[:3])}{rest}.")
    return tensors, tuple(notes)


def _select(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _strip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names without what stands before all of them."""
    while prefix := next((p for p in PREFIXES if tensors and all(name.startswith(p) for name in tensors)), None):
        tensors = _select(tensors, prefix)
    return tensors


def _name(tensors: dict[str, Tensor], notes: tuple[str, ...], kind: str, quick_gelu: bool | None = None) -> Weights:
    if transformers_clip.has_transformers_names(tensors):
        return Weights(transformers_clip.rename(tensors), "transformers' CLIP", quick_gelu, notes)
    if (renaming := find_renaming(tensors)) is not None:
        kind, rename = renaming
        return Weights(rename(tensors), kind, quick_gelu, notes)
    return Weights(tensors, kind, quick_gelu, notes)


def check_tensors(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], file: str, name: str) -> None:
    """Raise ModelError unless a file has exactly the tensors of the architecture."""
    shapes = [
        f"{key} {list(tensors[key].shape)} instead of {list(value.shape)}"
        for key, value in wanted.items() if key in tensors and tensors[key].shape != value.shape
    ]  # fmt: skip
    missing = sorted(set(wanted) - set(tensors))
    more = sorted(ascii(key)[1:-1] for key in set(tensors) - set(wanted))
    for what, names in (("tensors are missing", missing), ("tensors are left over", more), ("shapes differ", shapes)):
        if names:
            rest = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
            shown = ", ".join(key[:80] for key in names[:3])
            raise ModelError(
                f"{file} cannot be loaded into {name}: {what}: {shown}{rest}. Expected a complete file of exactly this "
                "architecture."
            )


def _check_numbers(tensors: Mapping[str, Tensor]) -> None:
    for name, value in tensors.items():
        limit = LARGEST_LOGIT_SCALE if name == "logit_scale" else LARGEST
        if value.is_complex() or value.layout != torch.strided:
            raise ValueError(f"{name} is not a plain tensor of numbers")
        if value.is_floating_point() and not bool((value.abs() <= limit).all()):  # NaN fails the comparison
            raise ValueError(f"{name} holds numbers that are not finite, or beyond {limit:g}")


# ---------------------------------------------------------------------------------------------------------------------
# TorchScript


STORAGES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


class _Shell:
    """Stands for a module or another object of the program: it keeps the attributes and does nothing."""

    def __new__(cls, *_: object, **__: object) -> "_Shell":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update({str(name): value for name, value in state.items()})


def _make_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    """A tensor as torch stores it: a view of a storage. A view may not be larger than what it looks at."""
    count = 1
    for length in size:
        count *= length
    if count > len(storage) or min((0, offset, *size, *stride)) < 0:
        raise ValueError("a tensor is larger than its storage")
    return storage.as_strided(size, stride, offset)  # which checks that it lies inside


class _Unpickler(pickle.Unpickler):
    """Knows tensors and containers. A pickle reaches code through `find_class` alone, and this one gives it none."""

    def __init__(self, data: bytes, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(data))
        self.archive, self.root, self.storages = archive, root, dict[str, Tensor]()

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Shell
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return lambda items, *_: items  # lists of numbers, tensors
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _make_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code")

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("it has a storage of unknown kind")
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.root}data/{key}"))
            self.storages[key] = torch.frombuffer(data, dtype=dtype)[:count] if data else torch.empty(0, dtype=dtype)
        return self.storages[key]


def _read_torchscript(archive: zipfile.ZipFile) -> Weights:
    root = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).removesuffix("constants.pkl")
    module = _Unpickler(archive.read(f"{root}data.pkl"), archive, root).load()
    if not isinstance(module, _Shell):
        raise ValueError("its program has no module")
    found = dict(_tensors_of(module, set()))
    tensors = {name: value for name, value in found.items() if name.rsplit(".", 1)[-1] not in DERIVED}
    return _name(tensors, (), "TorchScript archive", _which_gelu(archive, root))


def _tensors_of(module: _Shell, seen: set[int], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if len(seen) > MAX_MODULES or id(module) in seen:  # a pickle can make a chain, a loop or a tree of any size
        raise ValueError("its modules contain each other, or are too many")
    seen.add(id(module))
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Shell):
            yield from _tensors_of(value, seen, f"{prefix}{name}.")


def _which_gelu(archive: zipfile.ZipFile, root: str) -> bool | None:
    """Whether the program computes x sigmoid(1.702 x), read as text: GELU has its own operator, QuickGELU has none."""
    program = ""
    for entry in archive.infolist():
        if entry.filename.startswith(f"{root}code/") and entry.filename.endswith(".py"):
            program += archive.read(entry).decode("utf-8", "replace") if len(program) < MAX_PROGRAM else ""
    if "gelu(" in program:
        return False
    return True if "sigmoid(" in program else None
