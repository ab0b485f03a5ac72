"""The files that hold activations: which they are, in which order, and what tells them from others.

In: a file, several, a folder of them, or saev's folder. Out: `Files`, mapped into memory and not read.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from actcache.artifacts import ARTIFACT_FILE
from actcache.errors import SettingsError
from actcache.importing.mapped import ALONE, SUFFIXES, Mapped, map_arrays
from actcache.importing.saev import is_saev, open_saev

SAMPLES, SAMPLE_BYTES = 64, 1 << 16
"""Pieces of the files that their fingerprint covers, 4 MiB in all; terabytes are not read twice."""


@dataclass(frozen=True)
class Files:
    """Files of one kind in their order.

    Attributes:
        name: what messages call them.
        arrays: of each file, by name.
        format: npy, pt, safetensors or saev.
        fingerprint: see `fingerprint_files`.
        layers: the layers along the axis of layers, where the files say them.
        n_layers: their number, where the files say no more.
        prefix: the kinds of the special tokens, where the files say them.
        model: the name of the model, where the files say it.
    """

    name: str
    arrays: Sequence[Mapping[str, Mapped]]
    format: str
    fingerprint: str
    layers: tuple[int, ...] | None = None
    n_layers: int | None = None
    prefix: tuple[str, ...] | None = None
    model: str | None = None


def open_files(acts: Sequence[Path]) -> Files:
    """Map the arrays of files. Raises SettingsError and CorruptError, see `map_arrays` and `open_saev`."""
    if len(acts) == 1 and is_saev(acts[0]):
        shards = open_saev(acts[0])
        return Files(
            str(acts[0]),
            [{ALONE: array} for array in shards.arrays],
            "saev",
            fingerprint_files(shards.files),
            layers=shards.layers,
            n_layers=shards.n_layers,
            prefix=("cls",) if shards.has_cls else (),
            model=shards.model,
        )
    paths = [path for place in acts for path in list_files(place)]
    if not paths:
        raise SettingsError("No file of activations was given. Give at least one.")
    suffixes = sorted({path.suffix.lower().replace(".pth", ".pt") for path in paths})
    if len(suffixes) > 1:
        raise SettingsError(f"{acts[0]} and others are files of several kinds ({', '.join(suffixes)}). Give one kind.")
    arrays = [map_arrays(path) for path in paths]
    return Files(", ".join(map(str, acts[:3])), arrays, suffixes[0].lstrip("."), fingerprint_files(paths))


def list_files(place: Path) -> list[Path]:
    """A file, or the files of a folder in the order of the numbers in their names: 2.pt before 10.pt."""
    if not place.is_dir():
        return [place]
    if (place / ARTIFACT_FILE).is_file():
        raise SettingsError(f"{place} is an artifact already. Expected activations that another program has written.")
    found = [path for path in place.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
    if not found:
        raise SettingsError(f"{place} holds no activations. Expected {', '.join(SUFFIXES)}, or saev's metadata.json.")
    return sorted(found, key=lambda path: _natural(path.name))


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A key by which names are sorted, numbers in them by their value."""
    parts = [part for part in re.split(r"(\d+)", name, flags=re.ASCII) if part]
    return [
        (digits, int(part[:1000]) if digits else 0, part) for part in parts for digits in (part[0] in "0123456789",)
    ]


def fingerprint_files(paths: Sequence[Path]) -> str:
    """A hash of names, sizes, and pieces of 64 KiB spread evenly over all of the bytes."""
    sizes = [path.stat().st_size for path in paths]
    total, starts = hashlib.blake2b(digest_size=8), np.cumsum([0, *sizes])
    total.update(repr([(path.name, size) for path, size in zip(paths, sizes, strict=True)]).encode())
    places = np.linspace(0, max(int(starts[-1]) - SAMPLE_BYTES, 0), SAMPLES).astype(np.int64)
    for place in np.unique(places).tolist():
        number = int(np.searchsorted(starts[1:], place, side="right"))
        with open(paths[number], "rb") as file:
            file.seek(place - int(starts[number]))
            total.update(file.read(SAMPLE_BYTES))
    return total.hexdigest()
