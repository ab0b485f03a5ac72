"""ConceptTable: what `analyze` writes, open for reading.

    concepts.parquet        one row per latent: density, frequency, mean, quantiles, label entropy, token kinds, ...
    top_images.parquet      latent, rank, image, score, peak, peak_patch;  top_patches.parquet: by the strongest patch
    class_counts.parquet    label, latent, n_tokens, n_images (PatchSAE equation 5)
    histogram.npy, position_map.npy, nearest.npy    one row per latent, read by memory map
    images.parquet          copied
    gallery.parquet         heat maps of the latents that are shown;  gallery/<image>.jpg: what the model saw

A report needs neither images nor codes once the table exists.
"""

from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from actcache import ArtifactNotFoundError, CorruptError, IncompleteError, ParentMismatchError
from actcache.artifacts import Artifact, check_parent, open_artifact, read_manifest
from actcache.store import IMAGES_FILE
from analysis.concepts.config import AnalyzeConfig
from analysis.concepts.histograms import Histogram
from saetrain import CodeStore

EMBEDDINGS_FILE = "image_embeddings.npy"


class Quality(TypedDict):
    """How well the SAE reconstructs the activations of one kind of token (all, cls or patch) on held-out images."""

    fvu: float
    l0: float
    cosine: float


class SAEFacts(TypedDict):
    """The SAE that made the codes."""

    variant: str
    n_latents: int
    d_model: int
    hook_point: str


class SourceFacts(TypedDict):
    """The images and the model that the activations come from."""

    images: str
    model: str
    pretrained: str


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
        self.summary = read_manifest(artifact)

    @classmethod
    def open(cls, path: str | Path) -> "ConceptTable":
        """Open a complete table. Raises ArtifactNotFoundError, SchemaError, IncompleteError, CorruptError."""
        return cls(open_artifact(path, "concepts"))

    def __repr__(self) -> str:
        return f"ConceptTable({self.path.name}: {self.table.num_rows:,} latents over {self.images.num_rows:,} images)"

    @cached_property
    def table(self) -> pa.Table:
        """One row per latent."""
        return self._read("concepts.parquet")

    @cached_property
    def images(self) -> pa.Table:
        return self._read(IMAGES_FILE)

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
    def config(self) -> AnalyzeConfig:
        """The settings that the table was made with."""
        return AnalyzeConfig(**{field.name: self.artifact.settings[field.name] for field in fields(AnalyzeConfig)})

    @property
    def quality(self) -> dict[str, Quality]:
        """The SAE's quality by kind of token: `all`, `cls` and `patch`, as far as they were encoded."""
        recorded = self.artifact.provenance["quality"]
        return {kind: recorded[kind] for kind in ("all", "cls", "patch") if kind in recorded}

    @property
    def sae(self) -> SAEFacts:
        return cast(SAEFacts, self.artifact.provenance["sae"])

    @property
    def source(self) -> SourceFacts:
        return cast(SourceFacts, self.artifact.provenance["source"])

    def summary_numbers(self) -> dict[str, int]:
        """The number of images and tokens that were counted, and of latents that fired."""
        return {name: self.summary[name] for name in ("n_images", "n_tokens", "n_alive")}

    @cached_property
    def histogram(self) -> Histogram:
        """Counts [F, B] of the values that a latent takes where it fires, and the bin edges [B + 1], by memory map."""
        return Histogram(self._array("histogram.npy"), self._array("histogram_edges.npy"))

    @cached_property
    def position_map(self) -> NDArray[np.unsignedinteger]:
        """[F, rows, columns]: the number of images on which a latent fires at a patch, by memory map."""
        return self._array("position_map.npy")

    def nearest(self, latent: int) -> list[tuple[int, float]]:
        """(latent, cosine) of the decoder rows nearest to a latent's; empty if the run was not available."""
        if "nearest" in self.left_out:
            return []
        latents, cosines = self._array("nearest.npy")[latent], self._array("nearest_cosine.npy")[latent]
        return list(zip(latents.tolist(), cosines.tolist(), strict=True))

    @property
    def left_out(self) -> dict[str, str]:
        """What could not be computed, and why: part -> reason."""
        return dict(self.summary.get("left_out", {}))

    @property
    def grid(self) -> tuple[int, int]:
        rows, columns = self.summary["grid"]
        return rows, columns

    def thumbnail(self, image: int) -> bytes | None:
        """JPEG of what the model saw of an image in the gallery; None if `analyze` ran without the images."""
        path = self.path / "gallery" / f"{image}.jpg"
        return path.read_bytes() if path.is_file() else None

    def _read(self, name: str) -> pa.Table:
        return pq.read_table(self._file(name))

    def _array(self, name: str) -> NDArray[Any]:
        return np.load(self._file(name), mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]

    def _file(self, name: str) -> Path:
        if not (self.path / name).is_file():
            raise CorruptError(
                f"{self.path} has no {name}. An older version made it, or it is damaged. Run `analyze` again with "
                "--overwrite."
            )
        return self.path / name


def find_codes(concepts: ConceptTable) -> CodeStore | None:
    """The codes that a table was made from; None if they cannot be found."""
    try:
        codes = CodeStore.open(concepts.artifact.parent_path("codes"))
        check_parent(concepts.artifact, "codes", codes.artifact)
    except (ArtifactNotFoundError, IncompleteError, ParentMismatchError):
        return None
    return codes
