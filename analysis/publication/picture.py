"""The picture of a card: top images of some latents under their heat maps, or a chart where no pictures are shown.

In: a run, and its concepts if they are published. Out: the bytes of a PNG, and a sentence that says what it shows.
"""

import io
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from actcache.text import visible
from analysis.concepts import ConceptTable
from analysis.pictures import draw_heat_map
from saetrain import Run

CELL, GAP, MARGIN, LINE = 120, 6, 12, 18
N_LATENTS, N_IMAGES = 8, 5
CHART = (720, 280)
INK, BLUE, PALE = "#222222", "#0b50aa", "#dddddd"


def draw_picture(
    run: Run, concepts: ConceptTable | None, names: Mapping[int, str], *, gallery: bool
) -> tuple[bytes, str]:
    """The picture that says most about an SAE, among those that may be shown, and what it is."""
    if concepts is not None and gallery:
        return _png(_draw_sheet(concepts, names)), (
            "Images on which some latents fire most, as the model saw them. What a latent does not respond to is "
            "darkened."
        )
    if concepts is not None:
        density = np.asarray(concepts.table["density"], dtype=np.float64)
        return _png(_draw_densities(density)), (
            "How often the latents fire: the number of latents by the share of tokens on which they do."
        )
    curves = run.curves()
    if len(curves.get("step", ())) > 1:
        return _png(_draw_curve(curves["step"], curves["fvu"])), "The fvu of the training batches, by step."
    return _png(_draw_cosines(run)), (
        "How the latents read and write: the number of latents by the cosine of their encoder and decoder rows."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of images


def _draw_sheet(concepts: ConceptTable, names: Mapping[int, str]) -> Image.Image:
    """A row for each latent: its strongest images, the heat maps of a latent on one scale."""
    table = concepts.gallery
    latents = list(dict.fromkeys(table["latent"].to_pylist()))
    latents = sorted(latents, key=lambda latent: latent not in names)[:N_LATENTS]  # named ones first, else in order
    sheet = Image.new(
        "RGB", (2 * MARGIN + N_IMAGES * (CELL + GAP) - GAP, 2 * MARGIN + len(latents) * (CELL + LINE + GAP)), "white"
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for row, latent in enumerate(latents):
        top = MARGIN + row * (CELL + LINE + GAP)
        draw.text((MARGIN, top), _cut(f"latent {latent}  {names.get(latent, '')}", draw, font, sheet.width), INK, font)
        shown = table.filter(pc.equal(table["latent"], latent)).slice(0, N_IMAGES).to_pylist()
        heats = [np.array(line["heat"], dtype=np.float32).reshape(concepts.grid) for line in shown]
        strongest = max((float(heat.max()) for heat in heats), default=0.0)
        for column, (line, heat) in enumerate(zip(shown, heats, strict=True)):
            picture = concepts.thumbnail(line["image"])
            if picture is not None:
                place = (MARGIN + column * (CELL + GAP), top + LINE)
                sheet.paste(_shade(Image.open(io.BytesIO(picture)), heat, strongest), place)
    return sheet


def _shade(picture: Image.Image, heat: NDArray[np.float32], strongest: float) -> Image.Image:
    longest = max(picture.size)
    size = (max(1, CELL * picture.width // longest), max(1, CELL * picture.height // longest))
    shade = Image.open(io.BytesIO(draw_heat_map(heat, strongest))).resize(size, Image.Resampling.NEAREST)
    shade.putalpha(shade.getchannel("A").point(lambda alpha: alpha * 0.8))  # the object must still be visible
    return Image.alpha_composite(picture.convert("RGBA").resize(size), shade).convert("RGB")


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
    encoder, decoder = (np.asarray(state[name], dtype=np.float64) for name in ("encoder", "decoder"))
    lengths = np.linalg.norm(encoder, axis=1) * np.linalg.norm(decoder, axis=1)
    cosines = (encoder * decoder).sum(1) / np.maximum(lengths, 1e-12)
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


def _cut(text: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    text = visible(text)
    while text and draw.textlength(text, font) > width - 2 * MARGIN:
        text = text[:-1]
    return text


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
