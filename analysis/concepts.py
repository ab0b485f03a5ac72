"""analyze(): codes -> ConceptTable, in one pass of dask over the shards.

    concepts.parquet        one row a latent: density, frequency, mean, maximum, label entropy
    top_images.parquet      latent, rank, image, score, peak, peak_patch
    class_counts.parquet    label, latent, n_tokens, n_images (PatchSAE equation 5)
    images.parquet          copied
    gallery.parquet         heat maps of the latents that are shown;  gallery/<image>.jpg  what the model saw

Analysis after this needs neither images nor codes.
"""

import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from actcache import (
    IMAGES_FILE,
    Artifact,
    ImageSource,
    IncompleteError,
    SettingsError,
    begin_artifact,
    open_artifact,
    open_source,
    read_manifest,
    remove_litter,
    seal_artifact,
    write_atomic,
)
from analysis.catalogue import (
    ClassCounts,
    TopImages,
    Totals,
    class_counts_statistic,
    label_entropy,
    top_images_statistic,
    totals_statistic,
)
from analysis.gallery import make_thumbnail
from analysis.heat import heat_maps
from analysis.join import find_images, open_scheduler
from analysis.pairs import SCORES
from analysis.reduction import reduce_shards
from saetrain import CodeStore

TAU = 0.2
"""PatchSAE's threshold of a patch activation (equation 4)."""


class ConceptTable:
    """Concept statistics, open for reading.

    concepts = ConceptTable.open("val.concepts"); concepts.table.sort_by("label_entropy")
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.path = artifact.path
        if not artifact.complete:
            raise IncompleteError(
                f"{artifact.path} is not complete. Finish it by running the same `analyze` command again."
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
        """One row a latent."""
        return self._read("concepts.parquet")

    @cached_property
    def images(self) -> pa.Table:
        return self._read(IMAGES_FILE)

    @cached_property
    def top_images(self) -> pa.Table:
        """latent, rank, image, score, peak, peak_patch."""
        return self._read("top_images.parquet")

    @cached_property
    def class_counts(self) -> pa.Table:
        """label, label_name, latent, n_tokens, n_images."""
        return self._read("class_counts.parquet")

    @cached_property
    def gallery(self) -> pa.Table:
        """latent, rank, image, heat (row-major list): the latents that are shown, in order."""
        return self._read("gallery.parquet")

    def summary_numbers(self) -> dict[str, int]:
        """Images and tokens that were counted, and latents that fired."""
        return {name: self.summary[name] for name in ("n_images", "n_tokens", "n_alive")}

    @property
    def grid(self) -> tuple[int, int]:
        rows, columns = self.summary["grid"]
        return rows, columns

    def thumbnail(self, image: int) -> bytes | None:
        """JPEG of what the model saw of an image in the gallery; None when analysis ran without the images."""
        path = self.path / "gallery" / f"{image}.jpg"
        return path.read_bytes() if path.is_file() else None

    def _read(self, name: str) -> pa.Table:
        return pq.read_table(self.path / name)


def analyze(
    codes: CodeStore | str | Path,
    concepts: str | Path,
    *,
    n_top: int = 16,
    score: str = "mean",
    tau: float = TAU,
    n_gallery: int = 100,
    images: str | Path | None = None,
    store: str | Path | None = None,
    n_workers: int | None = None,
    scheduler: str | None = None,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> ConceptTable:
    """Compute the statistics of every latent.

    Args:
        n_top: images kept a latent; the label entropy is taken over them.
        score: what orders a latent's images: `mean` over the image's tokens (PatchSAE), or `max`.
        tau: a token counts for a class when its activation exceeds this.
        n_gallery: latents whose pictures are kept.
        images: where the images lie, if they moved; pictures are left out when they cannot be found.
        store: the activation store the codes were made from, where it moved; used to find the images.
        n_workers, scheduler: see `open_scheduler`; speed only. By default dask's threads, or the client that is open.
        on_progress: called with (shards done, shards in all).

    Raises:
        IncompleteError, SettingsError, ParentMismatchError.
    """
    codes = codes if isinstance(codes, CodeStore) else CodeStore.open(codes)
    if n_top < 1:
        raise SettingsError(f"--n-top must be at least 1, got {n_top}.")
    if score not in SCORES:
        raise SettingsError(f"--score must be one of {', '.join(SCORES)}, got {score!r}.")
    where = find_images(codes, images=images, store=store)
    source = None if where is None else open_source(where)
    provenance = {key: codes.artifact.provenance[key] for key in ("quality", "source", "sae")}
    provenance["curves"] = codes.artifact.provenance.get("curves", {})  # older codes have none
    artifact = begin_artifact(
        concepts,
        "concepts",
        settings={
            "n_top": n_top,
            "score": score,
            "tau": tau,
            "n_gallery": n_gallery,
            "pictures": source is not None,
        },
        parents={"codes": (codes.codes_id, codes.path)},
        provenance=provenance,
        prepare=lambda path: _copy_images(codes, path),
        overwrite=overwrite,
    )
    if not artifact.complete:
        remove_litter(artifact.path)
        labels = np.asarray(codes.images["label"])
        statistics = {
            "totals": totals_statistic(),
            "top": top_images_statistic(n_top, score),
            "classes": class_counts_statistic(labels),
        }
        with open_scheduler(n_workers, scheduler):
            result = reduce_shards(codes, statistics, tau=tau, on_progress=on_progress)
        table = _concept_table(result["totals"], result["top"], labels)
        shown = choose_gallery(table, n_gallery, min_images=min(n_top, 8))
        _write_tables(artifact.path, codes, table, result["top"], result["classes"])
        _write_gallery(artifact.path, codes, result["top"], shown, source)
        totals: Totals = result["totals"]
        seal_artifact(
            artifact.path,
            grid=list(codes.grid),
            n_images=totals.n_images,
            n_tokens=totals.n_tokens,
            n_alive=int((totals.fired_tokens > 0).sum()),
        )
    return ConceptTable.open(artifact.path)


def choose_gallery(table: pa.Table, n_gallery: int, *, min_images: int) -> NDArray[np.int64]:
    """Latents worth a look: specific first (low label entropy), then strong; neither rare nor everywhere.

    A latent must fire on `min_images` images, and on less than half of them.
    """
    frequency = table["image_frequency"].to_numpy()
    entropy = np.nan_to_num(table["label_entropy"].to_numpy(), nan=np.inf)
    maximum = table["max_activation"].to_numpy()
    wanted = np.flatnonzero((table["n_images"].to_numpy() >= min_images) & (frequency < 0.5))
    order = np.lexsort((wanted, -maximum[wanted], np.round(entropy[wanted], 2)))
    return wanted[order][:n_gallery]


def _concept_table(totals: Totals, top: TopImages, labels: NDArray[np.int32]) -> pa.Table:
    fired_tokens, fired_images = totals.fired_tokens, totals.fired_images
    n_latents = len(fired_tokens)
    token_sum = totals.total
    per_image = totals.n_tokens / max(totals.n_images, 1)
    return pa.table(
        {
            "latent": np.arange(n_latents),
            "n_tokens": fired_tokens,
            "n_images": fired_images,
            "density": fired_tokens / max(totals.n_tokens, 1),
            "image_frequency": fired_images / max(totals.n_images, 1),
            "mean_activation": token_sum / np.maximum(fired_tokens, 1),  # over the tokens it fires on
            "image_activation": token_sum / per_image / np.maximum(fired_images, 1),  # PatchSAE's m_s
            "max_activation": totals.maximum,
            "label_entropy": label_entropy(top, labels, n_latents),
        }
    )


def _copy_images(codes: CodeStore, path: Path) -> None:
    shutil.copyfile(codes.path / IMAGES_FILE, path / IMAGES_FILE)


def _write_tables(path: Path, codes: CodeStore, table: pa.Table, top: TopImages, classes: ClassCounts) -> None:
    names = dict(zip(codes.images["label"].to_pylist(), codes.images["label_name"].to_pylist(), strict=True))
    _write_table(path / "concepts.parquet", table)
    _write_table(path / "top_images.parquet", pa.table({"latent": top.latent, "rank": top.rank(), **_columns(top, 1)}))
    _write_table(
        path / "class_counts.parquet",
        pa.table({"label_name": [names[label] for label in classes.label.tolist()], **_columns(classes, 0)}),
    )


def _columns(value: TopImages | ClassCounts, first: int) -> dict[str, NDArray[Any]]:
    return dict(zip(value._fields[first:], value[first:], strict=True))


def _write_gallery(
    path: Path, codes: CodeStore, top: TopImages, shown: NDArray[np.int64], source: ImageSource | None, n_shown: int = 8
) -> None:
    """Heat maps, and thumbnails where the images are at hand."""
    rows, columns = codes.grid
    lines: dict[str, list[Any]] = {"latent": [], "rank": [], "image": [], "heat": []}
    for latent in shown.tolist():
        images = top.of(latent).image[:n_shown]
        for rank, (image, heat) in enumerate(zip(images.tolist(), heat_maps(codes, latent, images), strict=True)):
            lines["latent"].append(latent)
            lines["rank"].append(rank)
            lines["image"].append(image)
            lines["heat"].append(heat.reshape(rows * columns))
    schema = pa.schema(
        [("latent", pa.int64()), ("rank", pa.int64()), ("image", pa.int64()), ("heat", pa.list_(pa.float32()))]
    )
    _write_table(path / "gallery.parquet", pa.table(lines, schema=schema))
    if source is None:
        return
    (path / "gallery").mkdir(exist_ok=True)
    uris, sizes = codes.images["uri"], codes.images["bytes"]
    for image in sorted(set(lines["image"])):
        thumbnail = make_thumbnail(source, uris[image].as_py(), sizes[image].as_py(), codes.preprocess)
        (path / "gallery" / f"{image}.jpg").write_bytes(thumbnail)


def _write_table(path: Path, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_atomic(path, sink.getvalue().to_pybytes())
