"""The files of a ConceptTable: what the reductions found, as tables (a row a latent) and arrays (a row a latent).

Tables are Parquet; arrays are plain .npy, so that one latent is read by a memory map.
"""

import io
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from actcache import IMAGES_FILE, ImageSource, write_atomic
from analysis.catalogue import ClassCounts, TopImages, Totals, drop_silent, label_spread
from analysis.gallery import make_thumbnail
from analysis.geometry import Nearest
from analysis.heat import heat_maps
from analysis.histograms import QUANTILES, EntryCounts, Histogram, quantiles, to_histogram
from saetrain import CodeStore

N_SHOWN = 8
"""Images a latent in the gallery."""


class Found(NamedTuple):
    """What one pass over the codes gave, and what was computed beside it where it could be."""

    totals: Totals
    top: TopImages
    top_patches: TopImages
    classes: ClassCounts
    entries: EntryCounts
    nearest: Nearest | None
    monosemanticity: NDArray[np.float64] | None


def concept_table(found: Found, labels: NDArray[np.int32]) -> pa.Table:
    """One row a latent; the columns are described in docs/format.md."""
    totals, top, classes = found.totals, found.top, found.classes
    fired = totals.fired_tokens
    n_latents, n_images = len(fired), max(totals.n_images, 1)
    per_image = totals.n_tokens / n_images
    entropy, deviation = label_spread(top.latent, labels[top.image], top.score.astype(np.float64), n_latents)
    entropy_all, deviation_all = label_spread(classes.latent, classes.label, classes.total, n_latents)
    table = {
        "latent": np.arange(n_latents),
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
    shares = quantiles(to_histogram(found.entries), QUANTILES)
    table |= {f"q{round(100 * share)}_activation": shares[:, i] for i, share in enumerate(QUANTILES)}
    if found.monosemanticity is not None:
        table["monosemanticity"] = found.monosemanticity
    return pa.table(table)


def write_found(path: Path, codes: CodeStore, found: Found, table: pa.Table) -> None:
    """All tables and arrays of the latents."""
    top, patches, classes = found.top, found.top_patches, drop_silent(found.classes)
    row, column = np.divmod(patches.peak_patch - 1, codes.grid[1])
    labels, first = np.unique(np.asarray(codes.images["label"]), return_index=True)
    names = codes.images["label_name"].take(first).combine_chunks()
    write_table(path / "concepts.parquet", table)
    write_table(path / "top_images.parquet", pa.table({"latent": top.latent, "rank": top.rank(), **_columns(top, 1)}))
    place = {"latent": patches.latent, "rank": patches.rank(), "image": patches.image, "row": row, "column": column}
    write_table(path / "top_patches.parquet", pa.table({**place, "value": patches.score}))
    counts = dict(list(_columns(classes, 0).items())[:4])
    write_table(
        path / "class_counts.parquet",
        pa.table({"label_name": names.take(np.searchsorted(labels, classes.label)), **counts}),
    )
    histogram: Histogram = to_histogram(found.entries)
    write_array(path / "histogram.npy", histogram.counts)
    write_array(path / "histogram_edges.npy", histogram.edges)
    write_array(path / "position_map.npy", found.entries.position[:, 1:].reshape(-1, *codes.grid))
    if found.nearest is not None:
        write_array(path / "nearest.npy", found.nearest.latent)
        write_array(path / "nearest_cosine.npy", found.nearest.cosine)


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


def write_gallery(
    path: Path, codes: CodeStore, top: TopImages, shown: NDArray[np.int64], source: ImageSource | None
) -> None:
    """Heat maps, and thumbnails where the images are at hand."""
    rows, columns = codes.grid
    lines: dict[str, list[Any]] = {"latent": [], "rank": [], "image": [], "heat": []}
    for latent in shown.tolist():
        images = top.of(latent).image[:N_SHOWN]
        for rank, (image, heat) in enumerate(zip(images.tolist(), heat_maps(codes, latent, images), strict=True)):
            lines["latent"].append(latent)
            lines["rank"].append(rank)
            lines["image"].append(image)
            lines["heat"].append(heat.reshape(rows * columns))
    schema = pa.schema(
        [("latent", pa.int64()), ("rank", pa.int64()), ("image", pa.int64()), ("heat", pa.list_(pa.float32()))]
    )
    write_table(path / "gallery.parquet", pa.table(lines, schema=schema))
    if source is None:
        return
    (path / "gallery").mkdir(exist_ok=True)
    uris, sizes = codes.images["uri"], codes.images["bytes"]
    for image in sorted(set(lines["image"])):
        thumbnail = make_thumbnail(source, uris[image].as_py(), sizes[image].as_py(), codes.preprocess)
        (path / "gallery" / f"{image}.jpg").write_bytes(thumbnail)


def copy_images(codes: CodeStore, path: Path) -> None:
    shutil.copyfile(codes.path / IMAGES_FILE, path / IMAGES_FILE)


def write_table(path: Path, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_atomic(path, sink.getvalue().to_pybytes())


def write_array(path: Path, array: NDArray[Any]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomic(path, buffer.getvalue())


def _columns(value: TopImages | ClassCounts, first: int) -> dict[str, NDArray[Any]]:
    return dict(zip(value._fields[first:], value[first:], strict=True))
