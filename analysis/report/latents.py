"""What a page shows of each latent: numbers, classes, activation values, positions, neighbors and images.

In: a ConceptTable; one of an older version may lack some files. Out: a `Portrait` for each latent in the gallery, in
the same order. Only the rows of these latents are read.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
from markupsafe import Markup
from numpy.typing import NDArray

from analysis.concepts import (
    SHOWN_QUANTILES,
    ClassShare,
    ConceptTable,
    Kind,
    choose_bins,
    class_shares,
    finite,
    token_kinds,
    top_labels,
)
from analysis.naming import read_names, read_origins, read_own_names
from analysis.pictures import draw_heat_map, draw_position_map
from analysis.report.page import trust
from analysis.report.top_images import Shot

N_CLASSES = 5


class Places(NamedTuple):
    """Where in the image a latent fires: a picture of the grid, and the patch at which it fires on most images."""

    picture: bytes
    most: int
    row: int
    column: int


class Neighbor(NamedTuple):
    latent: int
    cosine: float
    name: str
    shown: bool


@dataclass(frozen=True)
class Portrait:
    """One latent, with numbers from the table. What is not known is None or empty. `origin` says who named it."""

    latent: int
    name: str
    origin: str
    note: str
    numbers: dict[str, float | None]
    labels: str
    quantiles: dict[str, float]
    strengths: Markup
    places: Places | None
    kinds: list[Kind]
    classes: list[ClassShare]
    n_other_classes: int
    nearest: list[Neighbor]
    shots: list[Shot]

    @property
    def words(self) -> str:
        """The text that the page's search box looks through."""
        classes = [entry.name for entry in self.classes]
        return " ".join([str(self.latent), self.name, self.note, self.labels, *classes]).lower()


NUMBERS = (
    "n_images", "n_tokens", "density", "image_frequency", "mean_activation", "max_activation", "label_entropy",
    "label_entropy_all", "label_std", "label_std_all", "monosemanticity",
)  # fmt: skip


def make_portraits(concepts: ConceptTable) -> list[Portrait]:
    """One portrait for every latent in the gallery."""
    shown = pc.unique(concepts.gallery["latent"]).to_pylist()
    names, own, origins = read_names(concepts), read_own_names(concepts), read_origins(concepts)
    shots, strengths = _shots(concepts), _strengths(concepts, shown)
    portraits = []
    for latent in shown:
        row = concepts.table.slice(latent, 1).to_pylist()[0]
        shares = class_shares(concepts, latent)
        portraits.append(
            Portrait(
                latent=latent,
                name=names.get(latent, ""),
                origin=origins.get(latent, ""),
                note=own.get(latent, {}).get("note", ""),
                numbers={name: finite(row.get(name)) for name in NUMBERS},
                labels=", ".join(f"{name} {n}" for name, n in top_labels(concepts, latent).most_common(3)),
                quantiles={
                    title: row[name] for title, name in SHOWN_QUANTILES.items() if finite(row.get(name)) is not None
                },
                strengths=strengths.get(latent, Markup()),
                places=_places(concepts, latent),
                kinds=token_kinds(concepts, row),
                classes=shares[:N_CLASSES],
                n_other_classes=len(shares[N_CLASSES:]),
                nearest=_nearest(concepts, latent, names, set(shown)),
                shots=shots[latent],
            )
        )
    return portraits


def missing_parts(concepts: ConceptTable) -> list[str]:
    """The names of parts that a table of an older version does not have."""
    parts = {"histogram.npy": "histograms of activation", "position_map.npy": "position maps"}
    missing = [part for file, part in parts.items() if not concepts.has(file)]
    if not concepts.has("nearest.npy") and "nearest" not in concepts.left_out:
        missing.append("nearest latents")
    if "label_std" not in concepts.table.column_names:
        missing.append("label spread")
    return missing


def _shots(concepts: ConceptTable) -> dict[int, list[Shot]]:
    gallery, maxima = concepts.gallery, concepts.table["max_activation"]
    uris, labels = concepts.images["uri"], concepts.images["label_name"]
    pictures = {image: concepts.thumbnail(image) or b"" for image in pc.unique(gallery["image"]).to_pylist()}
    top = concepts.top_images.filter(pc.is_in(concepts.top_images["latent"], value_set=pc.unique(gallery["latent"])))
    scores = {(line["latent"], line["image"]): line["score"] for line in top.to_pylist()}
    shots: dict[int, list[Shot]] = {}
    for line in gallery.to_pylist():
        heat = np.array(line["heat"], dtype=np.float32).reshape(concepts.grid)
        image = line["image"]
        shots.setdefault(line["latent"], []).append(
            Shot(
                uri=uris[image].as_py(),
                label=labels[image].as_py(),
                score=scores[line["latent"], image],
                peak=float(heat.max()),
                picture=pictures[image],
                heat=draw_heat_map(heat, float(maxima[line["latent"]].as_py())),
            )
        )
    return shots


def _strengths(concepts: ConceptTable, shown: list[int]) -> dict[int, Markup]:
    if not concepts.has("histogram.npy") or not shown:
        return {}
    histogram = concepts.histogram
    counts = np.asarray(histogram.counts[shown], dtype=np.int64)
    bins = choose_bins(counts)
    return {
        latent: draw_strengths(row[bins], histogram.edges[bins.start : bins.stop + 1])
        for latent, row in zip(shown, counts, strict=True)
    }


def _places(concepts: ConceptTable, latent: int) -> Places | None:
    if not concepts.has("position_map.npy"):
        return None
    counts = np.asarray(concepts.position_map[latent], dtype=np.int64)
    row, column = divmod(int(counts.argmax()), counts.shape[1])
    return Places(draw_position_map(counts), int(counts.max()), row, column) if counts.any() else None


def _nearest(concepts: ConceptTable, latent: int, names: dict[int, str], shown: set[int]) -> list[Neighbor]:
    if not concepts.has("nearest.npy"):
        return []
    return [Neighbor(n, cosine, names.get(n, ""), n in shown) for n, cosine in concepts.nearest(latent)]


WIDTH, HEIGHT, AXIS = 250, 58, 14


def draw_strengths(counts: NDArray[np.int64], edges: NDArray[np.float32]) -> Markup:
    """SVG histogram of counts [B] over values with edges [B + 1]; the first may be 0 and the last infinite."""
    n_bins = len(counts)
    if not counts.any():
        return Markup()
    heights = np.where(counts > 0, 2 + (HEIGHT - 3) * np.log1p(counts) / np.log1p(counts.max()), 0)
    step = WIDTH / n_bins
    bars = "".join(
        f"M{i * step:.1f} {HEIGHT}v{-height:.1f}h{step * 0.9:.1f}v{height:.1f}z"
        for i, height in enumerate(heights)
        if height
    )
    axis = "".join(
        f'<path d="M{x:.1f} {HEIGHT}v3" stroke="currentColor"/>'
        f'<text x="{x:.1f}" y="{HEIGHT + AXIS - 2}" text-anchor="{anchor}">{value:g}</text>'
        for value, x, anchor in _ticks(edges, step)
    )
    return trust(
        f'<svg class="strengths" viewBox="0 0 {WIDTH} {HEIGHT + AXIS}" role="img" aria-label="histogram of activation">'
        f"<title>tokens by activation, both axes logarithmic; the fullest bin has {int(counts.max()):,}</title>"
        f'<path class="bars" d="{bars}"/><path d="M0 {HEIGHT}H{WIDTH}" stroke="currentColor" opacity="0.3"/>'
        f"{axis}</svg>"
    )


def _ticks(edges: NDArray[np.float32], step: float) -> list[tuple[float, float, str]]:
    """(value, x, anchor) of ticks at powers of ten, or at powers of two if fewer than two powers of ten fit."""
    known = np.flatnonzero((edges > 0) & np.isfinite(edges))
    if len(known) < 2:
        return []
    logs = np.log2(edges[known].astype(np.float64))
    ticks: list[tuple[float, float, str]] = []
    for candidates in (10.0 ** np.arange(-4, 6), 2.0 ** np.arange(-12, 17)):
        inside = candidates[(np.log2(candidates) >= logs[0]) & (np.log2(candidates) <= logs[-1])]
        places = np.interp(np.log2(inside), logs, known) * step
        ticks = [
            (float(value), float(x), "start" if x < 8 else "end" if x > WIDTH - 8 else "middle")
            for value, x in zip(inside, places, strict=True)
        ]
        if len(ticks) >= 2:
            break
    return ticks
