"""The shards of saev (OSU-NLP-Group/saev): metadata.json, and acts000000.bin ... of float32 without a header.

In: the folder. Out: `SaevShards`, which says what lies where. All numbers come from files that may say anything, so
they are checked against the sizes of the files before anything is mapped. `data`, which may hold a pickle, is not read.

Sources: src/saev/data/protocol.md of the repository, protocols 1.0.0 and 2.1, and activations.py of saev 0.1. An array
has the axes image, layer, token, channel; CLS comes first if there is one. Every file is as long as the first, also the
last one, which need not be full. The slots of the layers are filled in the order in which a forward pass reaches the
blocks, whatever the order in which they were asked for.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actcache.artifacts import read_json
from actcache.errors import CorruptError
from actcache.importing.mapped import Mapped, map_raw
from actcache.schema import parse

METADATA, SHARDS = "metadata.json", "shards.json"

_NAMES = {
    "vit_family": "family", "vit_ckpt": "ckpt", "n_patches_per_img": "content_tokens_per_example", "d_vit": "d_model",
    "n_imgs": "n_examples", "n_patches_per_shard": "max_tokens_per_shard",
    "max_patches_per_shard": "max_tokens_per_shard",
}  # fmt: skip
"""Names of fields in saev 0.1 and protocol 1, and in protocol 2."""
_ADVICE = "Give a folder that saev has written, or its activations as .npy."
_SIZE = {"at_least": 1, "at_most": 1 << 40}


@dataclass(frozen=True)
class _Metadata:
    """What is read of metadata.json."""

    family: str
    ckpt: str
    layers: tuple[int, ...] = field(metadata={"at_least": -1000, "at_most": 1000})
    content_tokens_per_example: int = field(metadata=_SIZE)
    cls_token: bool
    d_model: int = field(metadata=_SIZE)
    n_examples: int = field(metadata=_SIZE)
    max_tokens_per_shard: int = field(metadata=_SIZE)
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype != "float32":
            raise ValueError(f"dtype is {self.dtype!r:.40}, expected float32")
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers must be distinct, and at least one, got {str(list(self.layers))[:80]}")


@dataclass(frozen=True)
class _Shard:
    """What shards.json says of a file."""

    name: str
    n_examples: int = field(metadata={"at_least": 0, "at_most": 1 << 40})


@dataclass(frozen=True)
class SaevShards:
    """Attributes:
    layers: of the slots along the axis of layers; None if they are counted from the end, so that only the user knows.
    model: saev's name of the model.
    """

    files: tuple[Path, ...]
    arrays: tuple[Mapped, ...]  # [images of the file, layer, token, channel]
    layers: tuple[int, ...] | None
    n_layers: int
    has_cls: bool
    model: str


def is_saev(folder: Path) -> bool:
    """Whether saev has written a folder."""
    return folder.is_dir() and (folder / METADATA).is_file()


def open_saev(folder: Path) -> SaevShards:
    """Read the metadata and map the files. Raises CorruptError, in one line."""
    metadata = _read_metadata(folder / METADATA)
    n_tokens = metadata.content_tokens_per_example + metadata.cls_token
    shape = (len(metadata.layers), n_tokens, metadata.d_model)
    files, arrays = [], []
    for name, n_images in _list_shards(folder, metadata, n_tokens):
        arrays.append(map_raw(folder / name, (n_images, *shape)))
        files.append(folder / name)
    order = tuple(sorted(metadata.layers))
    return SaevShards(
        files=(folder / METADATA, *files),
        arrays=tuple(arrays),
        layers=order if order[0] >= 0 else None,
        n_layers=len(order),
        has_cls=metadata.cls_token,
        model=f"{metadata.family}/{metadata.ckpt}",
    )


def _read_metadata(path: Path) -> _Metadata:
    fields = read_json(path, _ADVICE)
    if not isinstance(fields, dict):
        raise CorruptError(f"{path} holds no JSON object. {_ADVICE}")
    return parse(_Metadata, _renamed(fields), str(path), _ADVICE)


def _renamed(fields: Mapping[str, Any]) -> dict[str, object]:
    return {_NAMES.get(name, name): value for name, value in fields.items()}


def _list_shards(folder: Path, metadata: _Metadata, n_tokens: int) -> Sequence[tuple[str, int]]:
    """(name, number of images) of the files that hold images, in their order."""
    if (folder / SHARDS).is_file():
        shards = _read_shards(folder / SHARDS)
        if (total := sum(shard.n_examples for shard in shards)) != metadata.n_examples:
            raise CorruptError(
                f"{folder / SHARDS} lists {total:,} images, but {METADATA} says {metadata.n_examples:,}: its writing "
                "has not finished. Run saev again."
            )
        return [(shard.name, shard.n_examples) for shard in shards if shard.n_examples]
    each = metadata.max_tokens_per_shard // (n_tokens * len(metadata.layers))
    if not each:
        raise CorruptError(
            f"{folder / METADATA} has no room for one image in a shard of {metadata.max_tokens_per_shard:,} tokens. "
            f"{_ADVICE}"
        )
    n_files = -(-metadata.n_examples // each)
    there = sum(1 for _ in folder.glob("acts*.bin"))
    if there < n_files:  # before a list of that length is made
        raise CorruptError(f"{folder} has {there:,} of the {n_files:,} files of its {METADATA}. Run saev again.")
    return [(f"acts{number:06}.bin", min(each, metadata.n_examples - number * each)) for number in range(n_files)]


def _read_shards(path: Path) -> Sequence[_Shard]:
    listed = read_json(path, _ADVICE)
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise CorruptError(f"{path} is not a list of shards. {_ADVICE}")
    shards = [parse(_Shard, _renamed(entry), str(path), _ADVICE) for entry in listed]
    for shard in shards:
        if not re.fullmatch(r"acts\d{6,9}\.bin", shard.name, re.ASCII):
            raise CorruptError(f"{path} names {shard.name!r:.80}. Expected names such as acts000000.bin. {_ADVICE}")
    return shards
