"""The picture of a card: top images of some latents under their heat maps, or a chart where no pictures are shown.

In: a run, and its concepts if they are published. Out: a PNG, and a sentence that says what it shows.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from actcache.artifacts import write_new
from analysis.concepts import ConceptTable
from analysis.pictures import SheetCell, save_sheet
from saetrain import Run

MARGIN, LINE = 12, 18
N_LATENTS, N_IMAGES = 8, 5
CHART = (720, 280)
INK, BLUE, PALE = "#222222", "#0b50aa", "#dddddd"


def draw_picture(
    path: Path, run: Run, concepts: ConceptTable | None, names: Mapping[int, str], *, gallery: bool
) -> str:
    """Write the picture that says most about an SAE, among those that may be shown, and return what it is."""
    if concepts is not None and gallery and (cells := _gather_cells(concepts, names)):
        save_sheet(cells, path)
        return (
            "Images on which some latents fire most, as the model saw them. What a latent does not respond to is "
            "darkened."
        )
    if concepts is not None:
        density = np.asarray(concepts.table["density"], dtype=np.float64)
        _save(path, _draw_densities(density))
        return "How often the latents fire: the number of latents by the share of tokens on which they do."
    curves = run.curves()
    if len(curves.get("step", ())) > 1:
        _save(path, _draw_curve(curves["step"], curves["fvu"]))
        return "The fvu of the training batches, by step."
    _save(path, _draw_cosines(run))
    return "How the latents read and write: the number of latents by the cosine of their encoder and decoder rows."


def _gather_cells(concepts: ConceptTable, names: Mapping[int, str]) -> list[list[SheetCell]]:
    """A row for each latent, named ones first: its strongest images, with its heat maps on one scale."""
    table = concepts.gallery
    latents = sorted(dict.fromkeys(table["latent"].to_pylist()), key=lambda latent: latent not in names)
    rows = []
    for latent in latents[:N_LATENTS]:
        shown = table.filter(pc.equal(table["latent"], latent)).slice(0, N_IMAGES).to_pylist()
        heats = [np.array(line["heat"], dtype=np.float32).reshape(concepts.grid) for line in shown]
        strongest = max((float(heat.max()) for heat in heats), default=0.0)
        pictures = [concepts.thumbnail(line["image"]) for line in shown]
        rows.append(
            [
                SheetCell(Image.open(io.BytesIO(data)), heat, strongest, (f"latent {latent}", names.get(latent, "")))
                for data, heat in zip(pictures, heats, strict=True)
                if data is not None
            ]
        )
    return [row for row in rows if row]


# ---------------------------------------------------------------------------------------------------------------------
# Charts


def _draw_densities(density: NDArray[np.float64]) -> Image.Image:
    """Latents by decade of their density; those that never fire have a bar of their own."""
    alive = density[density > 0]
    lowest = min(-1, int(np.floor(np.log10(alive.min())))) if len(alive) else -1
    edges = np.linspace(lowest, 0, 1 + min(40, -lowest * 5))
    counts = [int((density == 0).sum()), *np.histogram(np.log10(alive).clip(lowest, 0), edges)[0].tolist()]
    first, last = "never", "always"
    return _draw_bars(counts, f"{first} | 10^{lowest}", last, "latents by density")


def _draw_cosines(run: Run) -> Image.Image:
    state = run.sae().state_dict()
    encoder, decoder = (np.asarray(state[name]) for name in ("encoder", "decoder"))  # [F, D], which may be large

    def dot(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
        return np.asarray(np.einsum("fd,fd->f", a, b), dtype=np.float64)

    cosines = dot(encoder, decoder) / np.sqrt(np.maximum(dot(encoder, encoder) * dot(decoder, decoder), 1e-24))
    counts = np.histogram(cosines, np.linspace(-1, 1, 41))[0].tolist()
    return _draw_bars(counts, "-1", "1", "latents by cosine of encoder and decoder row")


def _draw_bars(counts: Sequence[int], left: str, right: str, title: str) -> Image.Image:
    chart, draw, (x0, y0, x1, y1) = _begin_chart(title, left, right, f"{max(counts):,}", "0")
    width = (x1 - x0) / len(counts)
    for i, count in enumerate(counts):
        height = (y1 - y0) * count / max(*counts, 1)
        if height:
            draw.rectangle((x0 + i * width + 1, y1 - height, x0 + (i + 1) * width - 1, y1), fill=BLUE)
    return chart


def _draw_curve(x: Sequence[float], y: Sequence[float]) -> Image.Image:
    finite = [(a, b) for a, b in zip(x, y, strict=True) if np.isfinite(b)] or [(0, 0.0), (1, 0.0)]
    top, first, last = max(b for _, b in finite), finite[0][0], finite[-1][0]
    chart, draw, (x0, y0, x1, y1) = _begin_chart("fvu by step", f"{first:,}", f"{last:,}", f"{top:.3g}", "0")
    points = [
        (x0 + (x1 - x0) * (a - first) / max(last - first, 1), y1 - (y1 - y0) * b / max(top, 1e-12)) for a, b in finite
    ]
    draw.line(points, fill=BLUE, width=2)
    return chart


def _begin_chart(
    title: str, left: str, right: str, high: str, low: str
) -> tuple[Image.Image, ImageDraw.ImageDraw, tuple[int, int, int, int]]:
    """An empty chart with its axes, and the box (x0, y0, x1, y1) to draw in."""
    chart = Image.new("RGB", CHART, "white")
    draw, font = ImageDraw.Draw(chart), ImageFont.load_default(13)
    margin = MARGIN + 8 + int(max(draw.textlength(text, font) for text in (high, low)))
    x0, y0, x1, y1 = margin, MARGIN + 2 * LINE, CHART[0] - MARGIN, CHART[1] - MARGIN - LINE
    draw.text((x0, MARGIN), title, INK, font)
    for text, at in ((high, y0), (low, y1)):
        draw.text((x0 - 6, at), text, INK, font, anchor="rm")
        draw.line((x0, at, x1, at), fill=PALE)
    draw.text((x0, y1 + 4), left, INK, font)
    draw.text((x1, y1 + 4), right, INK, font, anchor="ra")
    return chart, draw, (x0, y0, x1, y1)


def _save(path: Path, picture: Image.Image) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    write_new(path, buffer.getvalue())
