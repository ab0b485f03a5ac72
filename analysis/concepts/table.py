"""ConceptTable: what `analyze` writes, open for reading.

    concepts.parquet        one row per latent: density, frequency, mean, quantiles, label entropy, token kinds, ...
    top_images.parquet      latent, rank, image, score, peak, peak_patch;  top_patches.parquet: by the strongest patch
    class_counts.parquet    label, latent, n_tokens, n_images (PatchSAE equation 5)
    histogram.npy, position_map.npy, nearest.npy    one row per latent, read by memory map
    images.parquet          copied
    gallery.parquet         heat maps of the latents that are shown;  gallery/<image>.jpg: what the model saw

A report needs neither images nor codes once the table exists.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from actcache import ArtifactNotFoundError, CorruptError, IncompleteError, ParentMismatchError
from actcache.artifacts import (
    Artifact,
    check_whole,
    find_parent,
    open_artifact,
    open_checked,
    read_provenance,
    read_seal,
    read_settings,
    read_summary,
)
from actcache.notebook import draw_facts
from actcache.store import load_images, table_errors
from analysis.concepts.config import AnalyzeConfig
from analysis.concepts.histograms import Histogram
from analysis.concepts.latent_rows import LatentRows
from saetrain import CodeStore
from saetrain.quality import TokenQuality

EMBEDDINGS_FILE = "image_embeddings.npy"
NOTES, NAMES_FILE, OWN_FILE = "notes", "names.parquet", "own.json"
"""What the latents are called: a folder that is not sealed, in it computed names and those that people give."""

_WHOLE, _REAL = pa.types.is_integer, pa.types.is_floating
COLUMNS: Mapping[str, Mapping[str, Callable[[pa.DataType], bool]]] = {
    "concepts.parquet": dict.fromkeys(("latent", "n_tokens", "n_images"), _WHOLE)
    | dict.fromkeys(("density", "image_frequency", "mean_activation", "max_activation", "label_entropy"), _REAL),
    "top_images.parquet": dict.fromkeys(("latent", "rank", "image"), _WHOLE),
    "top_patches.parquet": dict.fromkeys(("latent", "rank", "image", "row", "column"), _WHOLE),
    "class_counts.parquet": dict.fromkeys(("label", "latent", "n_tokens", "n_images"), _WHOLE),
    "gallery.parquet": dict.fromkeys(("latent", "rank", "image"), _WHOLE),
}
"""The columns of each table that readers rely on."""


@dataclass(frozen=True)
class ConceptSettings(AnalyzeConfig):
    """The settings of a table: what `analyze` was asked for, and what it could compute."""

    pictures: bool = False
    nearest: int = field(default=0, metadata={"at_least": 0})
    embeddings: object = None


@dataclass(frozen=True)
class ConceptSummary:
    """What the manifest says of a table."""

    files: Mapping[str, object]
    grid: tuple[int, int] = field(metadata={"at_least": 1})
    n_images: int = field(metadata={"at_least": 0})
    n_tokens: int = field(metadata={"at_least": 0})
    n_alive: int = field(metadata={"at_least": 0})
    covered: tuple[float, float] = field(default=(1.0, 1.0), metadata={"above": 0, "at_most": 1})
    left_out: Mapping[str, str] = field(default_factory=dict)  # part -> why it could not be computed


@dataclass(frozen=True)
class SAEFacts:
    """The SAE that made the codes, as far as it is known."""

    variant: str = "unknown"
    n_latents: int | None = None
    d_model: int | None = None
    hook_point: str = "unknown"


@dataclass(frozen=True)
class SourceFacts:
    """The images and the model that the activations come from, as far as they are known."""

    images: str = "unknown"
    model: str = "unknown"
    pretrained: str = "unknown"


class RecordedQuality(TypedDict, total=False):
    """The held-out quality of the SAE that made the codes, as far as it is known."""

    all: TokenQuality
    cls: TokenQuality
    patch: TokenQuality
    dead: float


@dataclass(frozen=True)
class CodesProvenance:
    """What codes, and a table made from them, record of their origin; codes of other programs may record nothing."""

    quality: RecordedQuality = field(default_factory=RecordedQuality)
    sae: SAEFacts = SAEFacts()
    source: SourceFacts = SourceFacts()
    curves: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


class ConceptTable:
    """Concept statistics, open for reading.

    concepts = ConceptTable.open("val.concepts"); concepts.table.sort_by("label_entropy")
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.path = artifact.path
        if not artifact.complete:
            raise IncompleteError(
                f"{artifact.path} is not complete. Run the same `analyze` command again to finish it."
            )
        self.config: AnalyzeConfig = read_settings(artifact, ConceptSettings)
        self.provenance = read_provenance(artifact, CodesProvenance)
        self._seal = read_summary(artifact, ConceptSummary)
        self.summary = read_seal(artifact)
        self._by_latent: dict[str, LatentRows] = {}

    @classmethod
    def open(cls, path: str | Path) -> "ConceptTable":
        """Open a complete table. Raises ArtifactNotFoundError, SchemaError, IncompleteError, CorruptError."""
        return cls(open_artifact(path, "concepts"))

    def __repr__(self) -> str:
        return f"ConceptTable({self.path.name}: {self.table.num_rows:,} latents over {self.images.num_rows:,} images)"

    def _repr_html_(self) -> str:
        seal, sae = self._seal, self.sae
        facts = {
            "latents": f"{self.table.num_rows:,}, of which {seal.n_alive:,} fire",
            "images": seal.n_images,
            "tokens": seal.n_tokens,
            "SAE": f"{sae.variant} at {sae.hook_point}",
            **{f"without {part}": why for part, why in self.left_out.items()},
            "concepts id": self.artifact.id,
        }
        return draw_facts(f"Concept table {self.path.name}", facts)

    @cached_property
    def table(self) -> pa.Table:
        """One row per latent."""
        return self._read("concepts.parquet")

    @cached_property
    def images(self) -> pa.Table:
        """One row per image, copied from the codes. Raises CorruptError."""
        return load_images(self.artifact)

    @cached_property
    def top_images(self) -> pa.Table:
        """latent, rank, image, score, peak, peak_patch."""
        return self._read("top_images.parquet")

    @cached_property
    def top_patches(self) -> pa.Table:
        """latent, rank, image, row, column, value: the strongest patches of a latent, one per image."""
        return self._read("top_patches.parquet")

    @cached_property
    def class_counts(self) -> pa.Table:
        """label, label_name, latent, n_tokens, n_images."""
        return self._read("class_counts.parquet")

    @cached_property
    def gallery(self) -> pa.Table:
        """latent, rank, image, heat (row-major list): the latents that are shown, in order."""
        return self._read("gallery.parquet")

    @property
    def quality(self) -> dict[str, TokenQuality]:
        """The SAE's quality by kind of token: `all`, `cls` and `patch`, as far as they were encoded and measured."""
        recorded = self.provenance.quality
        return {kind: recorded[kind] for kind in ("all", "cls", "patch") if kind in recorded}

    @property
    def sae(self) -> SAEFacts:
        """The SAE that made the codes, as it was recorded."""
        return self.provenance.sae

    @property
    def source(self) -> SourceFacts:
        """The model, the store and the images behind the codes, as they were recorded."""
        return self.provenance.source

    def summary_numbers(self) -> dict[str, int]:
        """The number of images and tokens that were counted, and of latents that fired."""
        return {name: getattr(self._seal, name) for name in ("n_images", "n_tokens", "n_alive")}

    @cached_property
    def histogram(self) -> Histogram:
        """Counts [F, B] of the values that a latent takes where it fires, and the bin edges [B + 1], by memory map."""
        return Histogram(self._array("histogram.npy"), self._array("histogram_edges.npy"))

    @cached_property
    def position_map(self) -> NDArray[np.unsignedinteger]:
        """[F, rows, columns]: the number of images on which a latent fires at a patch, by memory map."""
        return self._array("position_map.npy")

    @cached_property
    def image_embeddings(self) -> NDArray[np.floating[Any]]:
        """[I, E]: unit embeddings of the images, by memory map. Raises CorruptError if there are none."""
        return self._array(EMBEDDINGS_FILE)

    def rows_of(self, name: str, latent: int) -> pa.Table:
        """The rows of one latent in `top_images`, `top_patches` or `class_counts`, in the order of the file.

        Of a file that is sorted by latent only the row groups that hold the latent are read.
        """
        file = f"{name}.parquet"
        self._check_presence(file)
        with table_errors(self.path / file, self.artifact.remedy):
            if file not in self._by_latent:
                self._by_latent[file] = LatentRows(
                    lambda: open_checked(self.artifact, file), lambda table: _check_columns(file, table)
                )
            return self._by_latent[file].rows_of(latent)

    def nearest(self, latent: int) -> list[tuple[int, float]]:
        """(latent, cosine) of the decoder rows nearest to a latent's; empty if the run was not available."""
        if "nearest" in self.left_out:
            return []
        latents, cosines = self._array("nearest.npy")[latent], self.nearest_cosines[latent]
        return list(zip(latents.tolist(), cosines.tolist(), strict=True))

    @cached_property
    def nearest_cosines(self) -> NDArray[np.floating[Any]]:
        """[F, m]: cosines of the nearest decoder rows, largest first. Raises CorruptError if there are none."""
        return self._array("nearest_cosine.npy")

    def has(self, file: str) -> bool:
        """Whether the seal lists a file. If a listed file is gone, that is damage, and opening the file reports it."""
        return file in self.summary["files"]

    @property
    def left_out(self) -> dict[str, str]:
        """What could not be computed, and why: part -> reason."""
        return dict(self._seal.left_out)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self._seal.grid

    @property
    def covered(self) -> tuple[float, float]:
        """The share of a picture's height and width that its patches cover, from the upper left corner."""
        return self._seal.covered

    def thumbnail(self, image: int) -> bytes | None:
        """JPEG of what the model saw of an image in the gallery; None if `analyze` ran without the images."""
        name = f"gallery/{image}.jpg"
        if not (self.path / name).is_file():
            return None
        with open_checked(self.artifact, name) as file:
            return file.read()

    def _read(self, name: str) -> pa.Table:
        """A table, compared with its checksum, with the columns that readers rely on."""
        self._check_presence(name)
        with open_checked(self.artifact, name) as file, table_errors(self.path / name, self.artifact.remedy):
            table = pq.ParquetFile(file, pre_buffer=False).read(use_threads=False)
            _check_columns(name, table)
        return table

    def _array(self, name: str) -> NDArray[Any]:
        """An array by memory map, compared with its checksum."""
        self._check_presence(name)
        check_whole(self.artifact, name)
        try:
            return np.load(self.path / name, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
        except (OSError, ValueError, EOFError) as error:
            what = " ".join(str(error).split())[:200]
            raise CorruptError(f"{self.path / name} cannot be read ({what}). {self.artifact.remedy}") from error

    def _check_presence(self, name: str) -> None:
        if not (self.path / name).is_file():
            raise CorruptError(
                f"{self.path} has no {name}. An older version made it, or it is damaged. Run `analyze` again with "
                "--overwrite."
            )


def _check_columns(name: str, table: pa.Table) -> None:
    """Raise ValueError unless a table that was read has the columns that readers rely on."""
    for column, kind in COLUMNS[name].items():
        if column not in table.column_names:
            raise ValueError(f"it has no column {column}")
        if not kind(table.schema.field(column).type) or table[column].null_count:
            raise ValueError(f"its column {column} holds {table.schema.field(column).type}, or nulls")


def find_codes(concepts: ConceptTable) -> CodeStore | None:
    """The codes that a table was made from; None if they cannot be found."""
    try:
        return CodeStore.open(find_parent(concepts.artifact, "codes"))
    except (ArtifactNotFoundError, IncompleteError, ParentMismatchError):
        return None
