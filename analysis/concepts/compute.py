"""analyze(): codes -> ConceptTable, in one pass of dask over ranges of latents."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa

from actcache.artifacts import (
    OutputLock,
    begin_artifact,
    check_whole,
    read_provenance,
    seal_artifact,
    write_new,
)
from actcache.machine import available_bytes, check_memory
from actcache.progress import Progress, TaskCount
from actcache.store import IMAGES_FILE, StoreGroup, Stores
from analysis.concepts.config import AnalyzeConfig
from analysis.concepts.counting import range_counter
from analysis.concepts.embeddings import choose_embeddings, write_embeddings
from analysis.concepts.files import CountsWriter, describe_range, write_files
from analysis.concepts.histograms import N_BINS, entry_counts_statistic
from analysis.concepts.monosemanticity import monosemanticity, n_monosemanticity_tasks
from analysis.concepts.nearest import n_geometry_tasks, nearest_latents
from analysis.concepts.replaced import check_notes, find_table, is_completed, read_notes
from analysis.concepts.statistics import (
    CLASS_BYTES,
    class_counts_statistic,
    present_labels,
    top_images_statistic,
    totals_statistic,
)
from analysis.concepts.table import CodesProvenance, ConceptTable
from analysis.lineage import find_images, find_run
from analysis.reduce import cut_latents, open_scheduler, reduce_latents, tokens_per_image
from saetrain import CodeStore, Run

N_NEAREST = 8

RANGE_BYTES = 1 << 26
"""Memory that the counts of a range of latents may take; a task holds a few times as much."""

RANGE_ENTRIES, PIECE_ENTRIES = 1 << 22, 1 << 16
"""Entries of a range, and the least of a range in a shard: below that the fixed cost of numpy's calls shows."""


def analyze(
    codes: CodeStore | str | Path,
    concepts: str | Path,
    *,
    config: AnalyzeConfig | None = None,
    images: str | Path | None = None,
    store: str | Path | None = None,
    run: str | Path | None = None,
    embeddings: str | Path | None = None,
    with_: Stores | StoreGroup | None = None,
    device: str = "auto",
    n_workers: int | None = None,
    scheduler: str | None = None,
    overwrite: bool = False,
    on_progress: Progress | None = None,
    on_wait: Callable[[str], None] | None = None,
) -> ConceptTable:
    """Compute the statistics of every latent.

    Args:
        config: what decides the table's content; the defaults of `AnalyzeConfig` if None.
        images: where the images are, if they moved; the table has no pictures when they cannot be found.
        store: the activation store that the codes were made from, if it moved; used to find the images and the model.
        run: the run that made the codes, if it moved; the table has no nearest latents when it cannot be found.
        embeddings: image embeddings for the monosemanticity scores: `clip` (the store's own model, continued from the
            cached activations), or an .npy file [I, width] with one row per image, in stored order.
        with_: another model's store of the same images, whose model computes the embeddings instead.
        device: where `clip` is computed. Speed only.
        n_workers, scheduler: see `open_scheduler`; speed only. By default dask's threads, or the client that is open.
        on_progress: called with (tasks done, tasks in all); a task takes a range of latents.
        on_wait: see `open_scheduler`.

    Raises:
        IncompleteError, SettingsError, ParentMismatchError.
    """
    with open_scheduler(n_workers, scheduler, on_wait=on_wait):  # first, because nothing is written if it fails
        return _analyze(
            codes, concepts, config=config, images=images, store=store, run=run, embeddings=embeddings, with_=with_,
            device=device, overwrite=overwrite, on_progress=on_progress,
        )  # fmt: skip


def _analyze(
    codes: CodeStore | str | Path, concepts: str | Path, *, config: AnalyzeConfig | None, images: str | Path | None,
    store: str | Path | None, run: str | Path | None, embeddings: str | Path | None,
    with_: Stores | StoreGroup | None, device: str, overwrite: bool, on_progress: Progress | None,
) -> ConceptTable:  # fmt: skip
    config = config or AnalyzeConfig()
    codes = codes if isinstance(codes, CodeStore) else CodeStore.open(codes)
    places, made_by = find_images(codes, images=images, store=store), find_run(codes, run)
    left_out = {}
    if not places.all_there():
        left_out["pictures"] = "the images were not found; analyze again with --images and --overwrite"
    if not isinstance(made_by, Run):
        left_out["nearest"] = f"{made_by}; analyze again with --run and --overwrite"
    wanted = choose_embeddings(codes, embeddings, with_)

    decoder_bytes = 4 * made_by.sae_config.n_latents * made_by.d_model if isinstance(made_by, Run) else 0
    check_memory(
        decoder_bytes + 8 * codes.n_latents * (codes.n_tokens + N_BINS), available_bytes(), f"Analyzing {codes.path}",
        "Take a machine with more memory.",
    )  # fmt: skip

    check_whole(codes.artifact, IMAGES_FILE)
    settings = {
        **asdict(config),
        "pictures": "pictures" not in left_out,
        "nearest": 0 if "nearest" in left_out else N_NEAREST,
        "embeddings": None if wanted is None else wanted.identity,
    }
    there = find_table(concepts, codes)
    if overwrite and there is None:
        check_notes(concepts)

    def copy_files(path: Path) -> None:
        write_new(path / IMAGES_FILE, (codes.path / IMAGES_FILE).read_bytes())
        notes = {} if there is None else read_notes(there, settings)  # only now, because the lock is held
        for name, data in notes.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            write_new(path / name, data)

    recorded = codes.artifact.provenance
    read_provenance(codes.artifact, CodesProvenance)
    with OutputLock(concepts) as lock:
        artifact = begin_artifact(
            concepts,
            "concepts",
            settings=settings,
            parents={"codes": (codes.codes_id, codes.path)},
            provenance={key: recorded[key] for key in ("quality", "source", "sae", "curves") if key in recorded},
            prepare=copy_files,
            overwrite=overwrite or (there is not None and is_completed(there, settings)),
            lock=lock,
        )
        if artifact.complete:
            return ConceptTable.open(artifact.path)
        embedded = None
        if wanted is not None:
            embedded = write_embeddings(wanted, codes, store, artifact.path, device=device, on_progress=on_progress)
        labels = np.asarray(codes.images["label"])
        statistics = {
            "totals": totals_statistic(),
            "top": top_images_statistic(config.n_top, config.score),
            "top_patches": top_images_statistic(config.n_top, "patch"),
            "classes": class_counts_statistic(labels),
            "entries": entry_counts_statistic(),
        }
        latent_bytes = CLASS_BYTES * len(present_labels(labels)) + 8 * (codes.n_tokens + N_BINS) + 48 * config.n_top
        n_entries = max(RANGE_ENTRIES, PIECE_ENTRIES * codes.n_shards)
        ranges = cut_latents(codes, n_entries, at_most=max(1, RANGE_BYTES // latent_bytes))
        tasks = TaskCount(on_progress)
        semantics = tasks.add(n_monosemanticity_tasks(codes) if embedded else 0)
        geometry = tasks.add(n_geometry_tasks(codes.n_latents) if isinstance(made_by, Run) else 0)
        passes = tasks.add(len(ranges))
        scores = monosemanticity(codes, embedded, score=config.score, on_progress=semantics) if embedded else None
        nearest = nearest_latents(made_by, N_NEAREST, on_progress=geometry) if isinstance(made_by, Run) else None
        with CountsWriter(artifact.path, len(ranges), codes.images) as counts:
            parts = reduce_latents(
                codes, ranges, statistics, describe_range, tau=config.tau, counter=range_counter(labels, config),
                on_progress=passes, on_part=counts.add,
            )  # fmt: skip
            table = pa.concat_tables([part.concepts for part in parts]).combine_chunks()
            if scores is not None:
                table = table.append_column("monosemanticity", pa.array(scores))
            write_files(artifact.path, codes, config, parts, table, nearest, None if "pictures" in left_out else places)
        n_images = int(codes.valid.sum())
        seal_artifact(
            artifact.path,
            grid=list(codes.grid),
            covered=list(codes.covered),
            n_images=n_images,
            n_tokens=n_images * tokens_per_image(codes),
            n_alive=int(np.count_nonzero(table["n_tokens"])),
            left_out=left_out,
        )
        return ConceptTable.open(artifact.path)
