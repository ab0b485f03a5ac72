"""The files of a ConceptTable: the results of the reductions, as tables and arrays with one row per latent.

`describe_range` makes the rows of a range of latents inside the task that counted them; `CountsWriter` and
`write_files` write the ranges one after the other. Tables are Parquet; arrays are plain .npy, so that one latent can be
read by a memory map.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from actcache.artifacts import build_folder, open_atomic, write_new
from analysis.concepts.config import AnalyzeConfig
from analysis.concepts.histograms import QUANTILES, EntryCounts, Histogram, join_latents, quantiles, to_histogram
from analysis.concepts.statistics import ClassCounts, TopImages, Totals, label_spread, present_labels
from analysis.cosines import Nearest
from analysis.heat_maps import heat_maps
from analysis.lineage import ImagePlaces
from analysis.pictures import Pictures
from saetrain import CodeStore

N_SHOWN = 8
"""Images of each latent in the gallery."""
GROUP_ROWS = 1 << 16
"""Rows of class counts in a row group, all of which are read for one latent."""
COUNTS = ("label", "latent", "n_tokens", "n_images")
"""Columns of class counts that are packed."""


class LatentRows(NamedTuple):
    """What is kept of a range of latents: rows, which carry the latents' own numbers, and counts of entries."""

    concepts: pa.Table
    top_images: pa.Table
    top_patches: pa.Table
    class_counts: "CountRows"
    entries: EntryCounts


class CountRows(NamedTuple):
    """Rows of class_counts.parquet by latent, then class. There may be F x C rows; each takes 5 to 10 bytes."""

    n_classes: NDArray[np.int64]  # [F] number of rows of each latent
    place: NDArray[np.unsignedinteger[Any]]  # [N] index of the label in `present_labels`
    n_tokens: NDArray[np.unsignedinteger[Any]]
    n_images: NDArray[np.unsignedinteger[Any]]


class ClassSummary(NamedTuple):
    """What is kept of a range's class counts: rows, and how widely each latent spreads over labels; see `label_spread`.

    The latter is told of the latent's top images, and of all images.
    """

    rows: CountRows
    top_spread: tuple[NDArray[np.float64], NDArray[np.float64]]
    spread: tuple[NDArray[np.float64], NDArray[np.float64]]


class LatentStatistics(TypedDict):
    """The statistics of a range of latents, finished."""

    totals: Totals
    top: TopImages
    top_patches: TopImages
    classes: ClassCounts | ClassSummary
    entries: EntryCounts


def describe_range(codes: CodeStore, latents: range, statistics: LatentStatistics) -> LatentRows:
    """Turn the statistics of a range into rows; a task calls this, so that only rows leave it."""
    top, patches, classes = statistics["top"], statistics["top_patches"], statistics["classes"]
    if isinstance(classes, ClassCounts):
        classes = _summarize_classes(classes, top, np.asarray(codes.images["label"]), len(latents))
    row, column = np.divmod(patches.peak_patch - 1, codes.grid[1])
    place = {"rank": patches.rank(), "image": patches.image, "row": row, "column": column, "value": patches.score}
    return LatentRows(
        concepts=_describe_latents(latents, statistics, classes),
        top_images=pa.table({"latent": _number(top, latents), "rank": top.rank(), **_columns(top)}),
        top_patches=pa.table({"latent": _number(patches, latents), **place}),
        class_counts=classes.rows,
        entries=statistics["entries"],
    )


def _describe_latents(latents: range, statistics: LatentStatistics, classes: ClassSummary) -> pa.Table:
    """One row for each latent; the columns are described in docs/reference/statistics.md."""
    totals = statistics["totals"]
    fired = totals.fired_tokens
    n_images = max(totals.n_images, 1)
    per_image = totals.n_tokens / n_images
    (entropy, deviation), (entropy_all, deviation_all) = classes.top_spread, classes.spread
    table = {
        "latent": np.arange(latents.start, latents.stop),
        "n_tokens": fired,
        "n_images": totals.fired_images,
        "density": fired / max(totals.n_tokens, 1),
        "image_frequency": totals.fired_images / n_images,
        "mean_activation": totals.total / np.maximum(fired, 1),
        "image_activation": totals.total / max(per_image, 1) / np.maximum(totals.fired_images, 1),
        "max_activation": totals.maximum,
        "label_entropy": entropy,
        "label_std": deviation,
        "label_entropy_all": entropy_all,
        "label_std_all": deviation_all,
        "cls_density": totals.fired_cls / max(totals.n_cls, 1),
        "cls_mean_activation": totals.total_cls / np.maximum(totals.fired_cls, 1),
        "cls_max_activation": totals.maximum_cls,
        "patch_density": (fired - totals.fired_cls) / max(totals.n_tokens - totals.n_cls, 1),
        "patch_mean_activation": (totals.total - totals.total_cls) / np.maximum(fired - totals.fired_cls, 1),
        "patch_max_activation": totals.maximum_patch,
    }
    shares = quantiles(to_histogram(statistics["entries"]), QUANTILES)
    table |= {f"q{round(100 * share)}_activation": shares[:, i] for i, share in enumerate(QUANTILES)}
    return pa.table(table)


def _summarize_classes(classes: ClassCounts, top: TopImages, labels: NDArray[np.int32], n_latents: int) -> ClassSummary:
    present = present_labels(labels)
    mass = _sum_labels(top, labels, present, n_latents)
    return ClassSummary(_list_counts(classes), label_spread(mass, present), label_spread(classes.total, present))


def _sum_labels(
    top: TopImages, labels: NDArray[np.int32], present: NDArray[np.int32], n_latents: int
) -> NDArray[np.float64]:
    """[F, C]: the scores of each latent's top images, summed by label."""
    label = labels[top.image]
    keep = label >= 0
    cell = top.latent[keep].astype(np.int64) * len(present) + np.searchsorted(present, label[keep])
    mass: NDArray[Any] = np.bincount(cell, top.score[keep], n_latents * len(present))
    return mass.reshape(n_latents, len(present))


def _list_counts(classes: ClassCounts) -> CountRows:
    """The counts that are not 0, in the smallest type that holds them."""
    cells = np.flatnonzero(classes.n_tokens)
    n_classes = classes.n_tokens.shape[1]

    return CountRows(
        n_classes=np.count_nonzero(classes.n_tokens, axis=1),
        place=shorten(cells % max(n_classes, 1)),
        n_tokens=shorten(classes.n_tokens.ravel()[cells]),
        n_images=shorten(classes.n_images.ravel()[cells]),
    )


def shorten(values: NDArray[Any]) -> NDArray[Any]:
    """Counts in the smallest type that holds them."""
    return values.astype(np.min_scalar_type(values.max(initial=0)))


def _name_counts(rows: CountRows, first: int, images: pa.Table) -> pa.Table:
    """The rows of a range of latents that begins with `first`, as they are written to the file."""
    labels, where = np.unique(np.asarray(images["label"]), return_index=True)
    names = images["label_name"].take(where[labels >= 0]).combine_chunks()
    latents = np.arange(first, first + len(rows.n_classes), dtype=np.int32)
    big = np.uint32 if rows.n_tokens.itemsize < 8 else np.uint64
    table = pa.table(
        {
            "label_name": pa.DictionaryArray.from_arrays(pa.array(rows.place.astype(np.int32)), names),
            "label": labels[labels >= 0][rows.place],
            "latent": np.repeat(latents, rows.n_classes),
            "n_tokens": rows.n_tokens.astype(big),
            "n_images": rows.n_images.astype(np.uint32),
        }
    )
    there = [field.with_nullable(field.name not in COUNTS) for field in table.schema]
    return table.cast(pa.schema(there))


class CountsWriter:
    """Writes class_counts.parquet in a thread, range by range, while others are still being counted.

    With CountsWriter(path, len(ranges), images) as writer: writer.add(0, part)...

    Raises StorageError when it is left.
    """

    def __init__(self, path: Path, n_ranges: int, images: pa.Table) -> None:
        self._path, self._n_ranges, self._images = path, n_ranges, images
        self._parts: Queue[tuple[int, LatentRows] | None] = Queue()

    def __enter__(self) -> "CountsWriter":
        self._pool = ThreadPoolExecutor(1)
        file = self._path / "class_counts.parquet"
        self._written = self._pool.submit(write_tables, file, self._tables(), group_rows=GROUP_ROWS, packed=COUNTS)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._parts.put(None)  # what is missing will not come
        self._pool.shutdown()
        if kind is None:
            self._written.result()

    def add(self, number: int, part: LatentRows) -> None:
        """Take what is kept of a range. Ranges may come in any order, from any thread.

        Raises StorageError if what came before could not be written.
        """
        if self._written.done():
            self._written.result()
        self._parts.put((number, part))

    def _tables(self) -> Iterator[pa.Table]:
        early: dict[int, LatentRows] = {}
        first = 0
        for number in range(self._n_ranges):
            while number not in early:
                if (came := self._parts.get()) is None:
                    raise CancelledError
                early[came[0]] = came[1]
            part = early.pop(number)
            yield _name_counts(part.class_counts, first, self._images)
            first += part.concepts.num_rows


def write_files(
    path: Path,
    codes: CodeStore,
    config: AnalyzeConfig,
    parts: Sequence[LatentRows],
    table: pa.Table,
    nearest: Nearest | None,
    images: ImagePlaces | None,
) -> None:
    """Write all tables, arrays and pictures of the latents but class_counts.parquet, see `CountsWriter`.

    Args:
        table: the content of concepts.parquet; the other files come from the ranges.
        images: where the images are, if the gallery shall have thumbnails.
    """
    write_tables(path / "concepts.parquet", [table])
    write_tables(path / "top_images.parquet", [part.top_images for part in parts])
    write_tables(path / "top_patches.parquet", [part.top_patches for part in parts])
    entries = join_latents([part.entries for part in parts])
    histogram: Histogram = to_histogram(entries)
    write_array(path / "histogram.npy", histogram.counts)
    write_array(path / "histogram_edges.npy", histogram.edges)
    small = np.uint16 if entries.position.max(initial=0) < 1 << 16 else np.uint32
    write_array(path / "position_map.npy", entries.position[:, 1:].astype(small).reshape(-1, *codes.grid))
    if nearest is not None:
        write_array(path / "nearest.npy", nearest.neighbor)
        write_array(path / "nearest_cosine.npy", nearest.cosine)
    shown = choose_gallery(table, config.n_gallery, min_images=min(config.n_top, 8))
    _write_gallery(path, codes, pa.concat_tables([part.top_images for part in parts]), shown, images)


def choose_gallery(table: pa.Table, n_gallery: int, *, min_images: int) -> NDArray[np.int64]:
    """Choose latents worth looking at: the most specific first (low label entropy), then the strongest.

    A latent must fire on at least `min_images` images, but on less than half of all images.
    """
    frequency = table["image_frequency"].to_numpy()
    entropy = np.nan_to_num(table["label_entropy"].to_numpy(), nan=np.inf)
    maximum = table["max_activation"].to_numpy()
    eligible = np.flatnonzero((table["n_images"].to_numpy() >= min_images) & (frequency < 0.5))
    order = np.lexsort((eligible, -maximum[eligible], np.round(entropy[eligible], 2)))
    return eligible[order][:n_gallery]


def _write_gallery(
    path: Path, codes: CodeStore, top: pa.Table, shown: NDArray[np.int64], places: ImagePlaces | None
) -> None:
    """Write heat maps, and thumbnails if the images are available. top: the content of top_images.parquet."""
    of_latent, of_image = np.asarray(top["latent"]), np.asarray(top["image"])
    lines: dict[str, list[Any]] = {"latent": [], "rank": [], "image": [], "heat": []}
    for latent in shown.tolist():
        start, stop = np.searchsorted(of_latent, [latent, latent + 1])
        images = of_image[start:stop][:N_SHOWN]
        for rank, (image, heat) in enumerate(zip(images.tolist(), heat_maps(codes, latent, images), strict=True)):
            lines["latent"].append(latent)
            lines["rank"].append(rank)
            lines["image"].append(image)
            lines["heat"].append(heat.ravel())
    schema = pa.schema(
        [("latent", pa.int64()), ("rank", pa.int64()), ("image", pa.int64()), ("heat", pa.list_(pa.float32()))]
    )
    write_tables(path / "gallery.parquet", [pa.table(lines, schema=schema)])
    if places is None:
        return
    pictures = Pictures(codes, places)
    with build_folder(path / "gallery", replace=True) as folder:
        for image in sorted(set(lines["image"])):
            write_new(folder / f"{image}.jpg", pictures.thumbnail(image))


def write_tables(
    path: Path, tables: Iterable[pa.Table], *, group_rows: int | None = None, packed: Sequence[str] = ()
) -> None:
    """Write at least one table, all with the same columns, into one Parquet file; each starts a new row group.

    Args:
        group_rows: the most rows of a row group; None for as many as pyarrow takes, which is a million.
        packed: columns of integers that are written as differences, of as few bits as they need; then all others are
            written without statistics. Of class counts, a row takes 48 ns instead of 108 to 200, and 2.2 bytes instead
            of 2.9: the smallest and largest name of each group took 45 ns, dictionaries of integers most of the rest.
            Columns that are declared to be whole (not nullable) save another fifth.
    """
    rest = iter(tables)
    table = next(rest)
    others = [name for name in table.column_names if name not in packed]
    options = {
        "use_dictionary": others,
        "column_encoding": dict.fromkeys(packed, "DELTA_BINARY_PACKED"),
        "write_statistics": list(packed),
    }
    with open_atomic(path) as file, pq.ParquetWriter(file, table.schema, **(options if packed else {})) as writer:
        while table is not None:
            writer.write_table(table, row_group_size=group_rows)
            table = next(rest, None)


def write_array(path: Path, array: NDArray[Any]) -> None:
    with open_atomic(path) as file:
        np.save(file, array, allow_pickle=False)


def _number(top: TopImages, latents: range) -> NDArray[np.int32]:
    return (top.latent + latents.start).astype(np.int32)


def _columns(top: TopImages) -> dict[str, NDArray[Any]]:
    return dict(zip(top._fields[1:], top[1:], strict=True))
