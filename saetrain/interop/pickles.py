"""Plain pickles of tensors and settings, .pkl or .pkl.gz, as SAELens wrote them in its first months.

`pickle` calls whatever a file names. Here it may name only what tensors and their settings are made of; anything else
is refused before it is called. torch's own reader of a pickled storage would unpickle freely, so it is replaced by the
restricted one.
"""

import collections
import gzip
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from actcache import CorruptError
from saetrain.interop.files import (
    CONFIGS,
    MAX_RATIO,
    Config,
    check_claims,
    check_dict,
    check_download,
    load_tensors,
    refuse_pickle,
)

GZIP = b"\x1f\x8b"
DTYPES = ("float16", "bfloat16", "float32", "float64")


def _load_storage(data: bytes) -> object:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


ALLOWED: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": collections.OrderedDict,
    "torch.device": torch.device,
    "torch.storage._load_from_bytes": _load_storage,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    **dict.fromkeys(CONFIGS, Config),
}  # fmt: skip
"""What a file may name, and what stands for it."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in ALLOWED:
            return ALLOWED[full]
        if module == "torch" and name in DTYPES:
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {full[:100]}")


def is_pickle(path: Path) -> bool:
    """Whether a file is a plain pickle, which torch did not write. OSError if there is none."""
    with open(path, "rb") as file:
        return file.read(len(GZIP)) == GZIP or path.suffix == ".pkl"


def load_checkpoint(path: Path) -> dict[str, object]:
    """What a file of torch or a plain pickle holds, whichever it is. Raises CorruptError."""
    return load_pickle(path) if is_pickle(path) else load_tensors(path)


def load_pickle(path: Path) -> dict[str, object]:
    """Load a dict of tensors and settings from .pkl or .pkl.gz, without running any code in it. Raises CorruptError."""
    check_download(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            compressed = file.read(len(GZIP)) == GZIP
        with gzip.open(path) if compressed else open(path, "rb") as source:
            data = source.read(MAX_RATIO * size + 1)
        if len(data) > MAX_RATIO * size:
            raise ValueError(f"it would unpack to more than {MAX_RATIO * size:,} bytes")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of its own old class of storages
            content = _Unpickler(io.BytesIO(data)).load()
        check_claims(content, len(data))
    except EOFError as error:
        raise CorruptError(f"{path} is cut off: its download did not finish. Download it again.") from error
    except Exception as error:  # as `load_tensors` has it
        raise refuse_pickle(path, error) from error
    return check_dict(content, path)
