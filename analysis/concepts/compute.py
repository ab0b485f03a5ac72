"""analyze(): codes -> ConceptTable, in one pass of dask over ranges of latents."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from actcache import SettingsError
from actcache.artifacts import begin_artifact, file_digest, remove_litter, seal_artifact
from analysis.concepts.files import (
    RangeFound,
    choose_gallery,
    copy_images,
    describe_range,
    write_array,
    write_found,
    write_gallery,
    write_nearest,
)
from analysis.concepts.histograms import N_BINS, entry_counts_statistic
from analysis.concepts.monosemanticity import check_embeddings, monosemanticity, n_monosemanticity_tasks
from analysis.concepts.nearest import n_geometry_tasks, nearest_latents
from analysis.concepts.statistics import (
    CLASS_BYTES,
    class_counts_statistic,
    present_labels,
    top_images_statistic,
    totals_statistic,
)
from analysis.concepts.table import EMBEDDINGS_FILE, ConceptTable
from analysis.lineage import find_run, open_parents
from analysis.pictures import Pictures
from analysis.reduce import SCORES, TAU, cut_latents, open_scheduler, reduce_latents, tokens_per_image
from saetrain import CodeStore, Run

N_NEAREST = 8


RANGE_BYTES = 1 << 26
"""What the counts of a range of latents may take; a task holds a few times as much."""


RANGE_ENTRIES, PIECE_ENTRIES = 1 << 22, 1 << 16
"""Entries of a range, and at least of a range in a shard: below that the fixed cost of numpy's calls shows."""


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
        from actcache.prompts import open_towers  # torch
        from analysis.classifier import embed_images

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


class _Steps:
    """Several counts of tasks as one."""

    def __init__(self, on_progress: Callable[[int, int], None] | None) -> None:
        self.on_progress, self.total = on_progress, 0

    def add(self, n_tasks: int) -> Callable[[int, int], None]:
        """What counts the next `n_tasks`."""
        before = self.total
        self.total += n_tasks
        return lambda done, total: self.on_progress(before + done, self.total) if self.on_progress else None
