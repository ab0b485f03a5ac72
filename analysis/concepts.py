"""analyze(): codes -> ConceptTable, in one pass of dask over ranges of latents.

    concepts.parquet        one row a latent: density, frequency, mean, quantiles, label entropy, token kinds, ...
    top_images.parquet      latent, rank, image, score, peak, peak_patch;  top_patches.parquet  by their strongest patch
    class_counts.parquet    label, latent, n_tokens, n_images (PatchSAE equation 5)
    histogram.npy, position_map.npy, nearest.npy    a row a latent, read by memory map
    images.parquet          copied
    gallery.parquet         heat maps of the latents that are shown;  gallery/<image>.jpg  what the model saw

Analysis after this needs neither images nor codes.
"""

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
    ArtifactNotFoundError,
    CorruptError,
    IncompleteError,
    ParentMismatchError,
    SettingsError,
    begin_artifact,
    check_parent,
    file_digest,
    open_artifact,
    open_towers,
    read_manifest,
    remove_litter,
    seal_artifact,
)
from analysis.catalogue import (
    CLASS_BYTES,
    class_counts_statistic,
    present_labels,
    top_images_statistic,
    totals_statistic,
)
from analysis.gallery import Pictures
from analysis.geometry import n_geometry_tasks, nearest_latents
from analysis.histograms import N_BINS, Histogram, entry_counts_statistic
from analysis.join import open_parents, open_scheduler
from analysis.monosemanticity import check_embeddings, monosemanticity, n_monosemanticity_tasks
from analysis.pairs import SCORES, tokens_per_image
from analysis.reduction import cut_latents, reduce_latents
from analysis.tables import (
    RangeFound,
    choose_gallery,
    copy_images,
    describe_range,
    write_array,
    write_found,
    write_gallery,
    write_nearest,
)
from saetrain import CodeStore, Run

TAU = 0.2
"""PatchSAE's threshold of a patch activation (equation 4)."""

N_NEAREST = 8
EMBEDDINGS_FILE = "image_embeddings.npy"

RANGE_BYTES = 1 << 26
"""What the counts of a range of latents may take; a task holds a few times as much."""

RANGE_ENTRIES, PIECE_ENTRIES = 1 << 22, 1 << 16
"""Entries of a range, and at least of a range in a shard: below that the fixed cost of numpy's calls shows."""


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
    def top_patches(self) -> pa.Table:
        """latent, rank, image, row, column, value: the strongest patches of a latent, the best one of each image."""
        return self._read("top_patches.parquet")

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

    @cached_property
    def histogram(self) -> Histogram:
        """Counts [F, B] of the values a latent takes where it fires, and the bins' edges [B + 1], by memory map."""
        return Histogram(self._array("histogram.npy"), self._array("histogram_edges.npy"))

    @cached_property
    def position_map(self) -> NDArray[np.unsignedinteger]:
        """[F, rows, columns]: images on which a latent fires at a patch, by memory map."""
        return self._array("position_map.npy")

    def nearest(self, latent: int) -> list[tuple[int, float]]:
        """(latent, cosine) of the decoder rows most like a latent's; empty when the run was not at hand."""
        if "nearest" in self.left_out:
            return []
        latents, cosines = self._array("nearest.npy")[latent], self._array("nearest_cosine.npy")[latent]
        return list(zip(latents.tolist(), cosines.tolist(), strict=True))

    @property
    def left_out(self) -> dict[str, str]:
        """What could not be computed -> why."""
        return dict(self.summary.get("left_out", {}))

    @property
    def grid(self) -> tuple[int, int]:
        rows, columns = self.summary["grid"]
        return rows, columns

    def thumbnail(self, image: int) -> bytes | None:
        """JPEG of what the model saw of an image in the gallery; None when analysis ran without the images."""
        path = self.path / "gallery" / f"{image}.jpg"
        return path.read_bytes() if path.is_file() else None

    def _read(self, name: str) -> pa.Table:
        return pq.read_table(self._file(name))

    def _array(self, name: str) -> NDArray[Any]:
        return np.load(self._file(name), mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]

    def _file(self, name: str) -> Path:
        if not (self.path / name).is_file():
            raise CorruptError(
                f"{self.path} has no {name}: it was made by an older version, or it is damaged. Run `analyze` again, "
                "with --overwrite."
            )
        return self.path / name


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
    run: str | Path | None = None,
    embeddings: str | Path | None = None,
    device: str = "auto",
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
        store: the activation store the codes were made from, where it moved; used to find the images and the model.
        run: the run that made the codes, where it moved; nearest latents are left out when it cannot be found.
        embeddings: of images, for monosemanticity scores: `clip` (the store's own model, run on from the cached
            activations), or an .npy file [I, width] with a row an image in stored order.
        device: of `clip`. Speed only.
        n_workers, scheduler: see `open_scheduler`; speed only. By default dask's threads, or the client that is open.
        on_progress: called with (tasks done, tasks in all); a task takes a range of latents.

    Raises:
        IncompleteError, SettingsError, ParentMismatchError.
    """
    codes = codes if isinstance(codes, CodeStore) else CodeStore.open(codes)
    if n_top < 1:
        raise SettingsError(f"--n-top must be at least 1, got {n_top}.")
    if score not in SCORES:
        raise SettingsError(f"--score must be one of {', '.join(SCORES)}, got {score!r}.")
    given = None if embeddings is None or str(embeddings) == "clip" else Path(embeddings)
    if given is not None:
        check_embeddings(codes, given)
    pictures = Pictures(codes, images=images, store=store)
    shown = pictures if pictures.all_there() else None
    decoder = find_run(codes, run)
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
            "pictures": shown is not None,
            "nearest": N_NEAREST if isinstance(decoder, Run) else 0,
            "embeddings": file_digest(given)["pieces"] if given else embeddings,
        },
        parents={"codes": (codes.codes_id, codes.path)},
        provenance=provenance,
        prepare=lambda path: copy_images(codes, path),
        overwrite=overwrite,
    )
    if artifact.complete:
        return ConceptTable.open(artifact.path)
    remove_litter(artifact.path)
    if embeddings is not None and given is None:
        from analysis.embeddings import embed_images

        group = open_parents(codes, store)
        vision = open_towers(group.stores[0].artifact, device=device).vision
        everything = np.arange(codes.n_images)
        write_array(
            artifact.path / EMBEDDINGS_FILE, embed_images(group, everything, vision=vision, on_progress=on_progress)
        )
        given = artifact.path / EMBEDDINGS_FILE
    labels = np.asarray(codes.images["label"])
    statistics = {
        "totals": totals_statistic(),
        "top": top_images_statistic(n_top, score),
        "top_patches": top_images_statistic(n_top, "patch"),
        "classes": class_counts_statistic(labels),
        "entries": entry_counts_statistic(),
    }
    latent_bytes = CLASS_BYTES * len(present_labels(labels)) + 8 * (codes.n_tokens + N_BINS) + 48 * n_top
    ranges = cut_latents(
        codes, max(RANGE_ENTRIES, PIECE_ENTRIES * codes.n_shards), at_most=max(1, RANGE_BYTES // latent_bytes)
    )
    steps = _Steps(on_progress)
    passes = steps.add(len(ranges))
    geometry = steps.add(n_geometry_tasks(codes.n_latents) if isinstance(decoder, Run) else 0)
    semantics = steps.add(n_monosemanticity_tasks(codes) if given else 0)
    with open_scheduler(n_workers, scheduler):
        parts: list[RangeFound] = reduce_latents(codes, ranges, statistics, describe_range, tau=tau, on_progress=passes)
        table = pa.concat_tables([part.concepts for part in parts]).combine_chunks()
        if isinstance(decoder, Run):
            write_nearest(artifact.path, nearest_latents(decoder, N_NEAREST, on_progress=geometry))
        if given:
            scores = monosemanticity(codes, given, score=score, on_progress=semantics)
            table = table.append_column("monosemanticity", pa.array(scores))
    write_found(artifact.path, codes, parts, table)
    top = pa.concat_tables([part.top_images for part in parts])
    write_gallery(artifact.path, codes, top, choose_gallery(table, n_gallery, min_images=min(n_top, 8)), shown)
    n_images = int(codes.valid.sum())
    seal_artifact(
        artifact.path,
        grid=list(codes.grid),
        n_images=n_images,
        n_tokens=n_images * tokens_per_image(codes),
        n_alive=int(np.count_nonzero(table["n_tokens"])),
        left_out={
            **({} if shown is not None else {"pictures": "the images were not found; give them with --images"}),
            **({} if isinstance(decoder, Run) else {"nearest": f"{decoder}; give the run with --run"}),
        },
    )
    return ConceptTable.open(artifact.path)


def find_run(codes: CodeStore, run: str | Path | None = None) -> Run | str:
    """The run that made some codes, or why it cannot be had.

    Raises ParentMismatchError and what `Run.open` raises for a run that was given.
    """
    if run is not None:
        opened = Run.open(run)
        check_parent(codes.artifact, "run", opened.artifact)
        return opened
    place = codes.artifact.parent_path("run")
    try:
        return find_run(codes, place)
    except (ArtifactNotFoundError, IncompleteError, ParentMismatchError):
        return f"the run that made the codes is not at {codes.artifact.parents['run'].path} any more"


class _Steps:
    """Several counts of tasks as one."""

    def __init__(self, on_progress: Callable[[int, int], None] | None) -> None:
        self.on_progress, self.total = on_progress, 0

    def add(self, n_tasks: int) -> Callable[[int, int], None]:
        """What counts the next `n_tasks`."""
        before = self.total
        self.total += n_tasks
        return lambda done, total: self.on_progress(before + done, self.total) if self.on_progress else None
