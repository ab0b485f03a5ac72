"""analyze(): codes -> ConceptTable, in one pass of dask over ranges of latents."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa

from actcache import PipelineError, SettingsError
from actcache.artifacts import (
    Artifact,
    OutputLock,
    artifact_path,
    begin_artifact,
    check_whole,
    file_digest,
    open_artifact,
    read_provenance,
    seal_artifact,
    write_new,
)
from actcache.machine import available_bytes, check_memory
from actcache.progress import Progress
from actcache.store import IMAGES_FILE, StoreGroup, Stores
from analysis.concepts.config import AnalyzeConfig
from analysis.concepts.counting import range_counter
from analysis.concepts.files import CountsWriter, describe_range, write_array, write_files
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
from analysis.concepts.table import EMBEDDINGS_FILE, NAMES_FILE, NOTES, OWN_FILE, CodesProvenance, ConceptTable
from analysis.lineage import find_images, find_run, open_parents, open_same_images
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
    embedded = None if embeddings is None or str(embeddings) == "clip" else Path(embeddings)
    other = None if with_ is None else open_same_images(codes, with_)
    if other is not None and embedded is not None:
        raise SettingsError(f"--embeddings {embedded} and --with both give embeddings. Leave one of them out.")
    if embedded is not None:
        check_embeddings(codes, embedded)

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
        "embeddings": _describe_embeddings(embeddings, embedded, other),
    }
    there = _find_table(concepts, codes)
    if overwrite and there is None:
        _check_notes(concepts)

    def copy_files(path: Path) -> None:
        write_new(path / IMAGES_FILE, (codes.path / IMAGES_FILE).read_bytes())
        notes = {} if there is None else _read_notes(there, settings)  # only now, because the lock is held
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
            overwrite=overwrite or (there is not None and _is_completed(there, settings)),
            lock=lock,
        )
        if artifact.complete:
            return ConceptTable.open(artifact.path)
        if (embeddings is not None or other is not None) and embedded is None:
            embedded = artifact.path / EMBEDDINGS_FILE
            group = open_parents(codes, store, has_flag=True) if other is None else other
            _embed_all_images(group, embedded, device=device, on_progress=on_progress)
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
        tasks = _TaskCount(on_progress)
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


def _describe_embeddings(embeddings: str | Path | None, file: Path | None, other: StoreGroup | None) -> object:
    """What stands for the embeddings in a table's identity: the content of a file, or the stores they are from."""
    if other is not None:
        return {"stores": [member.store_id for member in other.stores]}
    return embeddings if file is None else file_digest(file)["pieces"]


def _embed_all_images(group: StoreGroup, out: Path, *, device: str, on_progress: Progress | None) -> None:
    """Write the embedding of every image by the stores' own model."""
    from actcache.prompts import open_towers  # torch
    from analysis.classifier import embed_stored_images

    vision = open_towers(group.stores[0].artifact, device=device).vision
    write_array(out, embed_stored_images(group, np.arange(group.n_images), vision=vision, on_progress=on_progress))


def _find_table(concepts: str | Path, codes: CodeStore) -> Artifact | None:
    """The table of the same codes that is there already, whatever its settings are."""
    try:
        there = open_artifact(concepts, "concepts")
    except PipelineError:
        return None
    same = there.parents.keys() == {"codes"} and there.parent("codes").id == codes.codes_id
    return there if same else None


def _is_completed(there: Artifact, settings: Mapping[str, object]) -> bool:
    """Whether a table differs only in lacking parts that can be computed now.

    It was made without the images or the run; `analyze` advised to name them, and that must lead to the whole table.
    """
    old = dict(there.settings)
    gained = [part for part in ("pictures", "nearest") if not old.get(part) and settings[part]]
    same = {**old, **{part: settings[part] for part in gained}} == json.loads(json.dumps(settings))
    return bool(gained) and same


def _read_notes(there: Artifact, settings: Mapping[str, object]) -> dict[str, bytes]:
    """What a new table keeps of the names of the latents: file name -> content.

    What people wrote is stored nowhere else. Computed names are left out if the new table chooses other top images.
    """
    files = [file for file in sorted((there.path / NOTES).glob("*")) if file.is_file()]
    if any(there.settings.get(name) != settings[name] for name in ("n_top", "score")):
        files = [file for file in files if file.name != NAMES_FILE]
    return {str(file.relative_to(there.path)): file.read_bytes() for file in files}


def _check_notes(concepts: str | Path) -> None:
    """Raise SettingsError if names of people would be deleted: those of other codes, or of a table that is damaged."""
    own = artifact_path(concepts) / NOTES / OWN_FILE
    if own.is_file():
        raise SettingsError(
            f"{own} holds names that people gave to other latents, and they are stored nowhere else. Move the file "
            f"out of {concepts}, or delete it, before you replace the table with --overwrite."
        )


class _TaskCount:
    """Shows the tasks of several steps as one count."""

    def __init__(self, on_progress: Progress | None) -> None:
        self.on_progress, self.total = on_progress, 0

    def add(self, n_tasks: int) -> Progress:
        """A callback that counts the next `n_tasks`."""
        before = self.total
        self.total += n_tasks
        return lambda done, total: self.on_progress(before + done, self.total) if self.on_progress else None
