"""A contact sheet: one picture that shows the images of an answer as the model saw them, under a latent's heat map.

In: codes, the answer's table, and where the images are. Out: a file of the kind that its suffix names. The heat maps of
a latent share one scale, its maximum over the sheet, and darken the patches to which it does not respond.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from actcache import SettingsError
from actcache.artifacts import write_output
from actcache.text import visible
from analysis.heat_maps import heat_maps
from analysis.lineage import find_images
from analysis.pictures import Pictures, draw_heat_map
from analysis.query.images import find_image
from analysis.query.latents import query_latent
from saetrain import CodeStore

CELL, GAP, LINE, MARGIN = 176, 8, 16, 12
N_COLUMNS = 8
MAX_CELLS = 200
N_TOP_IMAGES = 6
"""How many images of a latent are shown if the answer names latents only."""


FORMATS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"}, ".jpg": {"format": "JPEG", "quality": 92, "subsampling": 0},
    ".jpeg": {"format": "JPEG", "quality": 92, "subsampling": 0}, ".webp": {"format": "WEBP", "lossless": True},
}  # fmt: skip
"""How a sheet is saved, by the suffix of its file. Text beside pictures needs full color resolution in a JPEG."""


class Cell(NamedTuple):
    """An image under a latent's heat map; the cells of a row have the same `row`."""

    row: int
    image: int
    latent: int
    note: str = ""


def draw_sheet(
    codes: CodeStore,
    answer: pa.Table,
    out: str | Path,
    *,
    latents: Sequence[int] = (),
    images: Sequence[int | str] = (),
    where: str | None = None,
    folder: str | Path | None = None,
    store: str | Path | None = None,
    names: Mapping[int, str] = MappingProxyType({}),
) -> Path:
    """Write the pictures of an answer as .png, .jpg or .webp and return the path. An existing file is replaced.

    Args:
        answer: a table with a column `image` or `latent`. Images are shown under the heat map of each of `latents`.
            Latents are shown on each of `images`, or else on the images on which they fire most.
        latents, images: the latents and images (positions or uris) of the question.
        where: the condition of the question, for choosing the images of latents.
        folder: where the images are, if they moved. store: the activation store, if it moved.
        names: the names of latents, which are written beside their numbers.

    Raises:
        SettingsError: the suffix is another one, the answer is empty, or the images cannot be found.
        ParentMismatchError: the images or the store are not those that the codes were made from.
    """
    out = Path(out)
    if out.suffix.lower() not in FORMATS:
        raise SettingsError(f"--sheet must end in {', '.join(FORMATS)}, got {out.name!r}.")
    positions = [find_image(codes, image) for image in images]
    cells = choose_cells(codes, answer, latents=latents, images=positions, where=where)
    if not cells:
        raise SettingsError("The answer is empty, so there is nothing to draw. Ask without --sheet.")
    source = Pictures(codes, find_images(codes, images=folder, store=store))
    pictures = {image: _fit(source.see(image)) for image in sorted({cell.image for cell in cells})}
    n_columns = max(np.bincount([cell.row for cell in cells]).max(), 1)
    n_rows = cells[-1].row + 1
    width = 2 * MARGIN + n_columns * (CELL + GAP) - GAP
    sheet = Image.new("RGB", (width, 2 * MARGIN + n_rows * (CELL + 2 * LINE + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    heats, cls = _heats(codes, cells), _fires_on_cls(codes, cells)
    maxima: dict[int, float] = {}
    for cell, heat in zip(cells, heats, strict=True):
        maxima[cell.latent] = max(maxima.get(cell.latent, 0.0), float(heat.max()))
    labels, uris = codes.images["label_name"], codes.images["uri"]
    column = 0
    for k, (cell, heat) in enumerate(zip(cells, heats, strict=True)):
        column = column + 1 if k and cells[k - 1].row == cell.row else 0
        left, top = MARGIN + column * (CELL + GAP), MARGIN + cell.row * (CELL + 2 * LINE + GAP)
        sheet.paste(_lay_over(pictures[cell.image], heat, maxima[cell.latent], codes.covered), (left, top))
        title = labels[cell.image].as_py() or uris[cell.image].as_py().rsplit("/", 1)[-1]
        strength = f"{heat.max():.3g}" if heat.max() > 0 else "CLS only" if cls[cell] else "0"
        called = f"latent {cell.latent} {names.get(cell.latent, '')}".rstrip()
        for line, text in enumerate((f"{title}  #{cell.image}", f"{called}: {strength}  {cell.note}")):
            shown = _shorten(visible(text), draw, font)
            draw.text((left, top + CELL + 1 + line * LINE), shown, fill="#222222", font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, **FORMATS[out.suffix.lower()])
    return write_output(out, buffer.getvalue())


def choose_cells(
    codes: CodeStore,
    answer: pa.Table,
    *,
    latents: Sequence[int] = (),
    images: Sequence[int] = (),
    where: str | None = None,
) -> list[Cell]:
    """The cells of a sheet, row by row; at most 200."""
    notes = answer["kind"].to_pylist() if "kind" in answer.column_names else [""] * answer.num_rows
    cells: list[Cell] = []
    if "image" in answer.column_names:
        for i, (image, note) in enumerate(zip(answer["image"].to_pylist(), notes, strict=True)):
            row = i if len(latents) > 1 else i // N_COLUMNS
            cells += [Cell(row, image, latent, note) for latent in latents]
        return cells[:MAX_CELLS]
    for i, (latent, note) in enumerate(zip(answer["latent"].to_pylist(), notes, strict=True)):
        if images:  # each latent is a column, with its images below each other
            first = i // N_COLUMNS * len(images)
            cells += [Cell(first + k, image, latent, note) for k, image in enumerate(images)]
        else:
            top = query_latent(codes, latent, n_top=N_TOP_IMAGES, where=where)["image"].to_pylist()
            cells += [Cell(i, image, latent, note) for image in top]
    return sorted(cells[:MAX_CELLS], key=lambda cell: cell.row)


def _heats(codes: CodeStore, cells: Sequence[Cell]) -> list[NDArray[np.float32]]:
    """[rows, columns] for each cell; each latent is read once."""
    heat_of: dict[tuple[int, int], NDArray[np.float32]] = {}
    for latent in {cell.latent for cell in cells}:
        images = sorted({cell.image for cell in cells if cell.latent == latent})
        maps = heat_maps(codes, latent, np.array(images))
        heat_of |= {(latent, image): heat for image, heat in zip(images, maps, strict=True)}
    return [heat_of[cell.latent, cell.image] for cell in cells]


def _fires_on_cls(codes: CodeStore, cells: Sequence[Cell]) -> dict[Cell, bool]:
    """Whether the latent of a cell fires on the image's CLS."""
    rows = {latent: set(codes.read_latent(latent)[0].tolist()) for latent in {cell.latent for cell in cells}}
    return {cell: cell.image * codes.n_tokens in rows[cell.latent] for cell in cells}


def _fit(picture: Image.Image) -> Image.Image:
    """Resize a picture so that its longer side has CELL pixels."""
    longest = max(picture.size)
    size = (max(1, CELL * picture.width // longest), max(1, CELL * picture.height // longest))
    return picture.resize(size, Image.Resampling.NEAREST if longest * 2 <= CELL else Image.Resampling.BICUBIC)


def _lay_over(
    picture: Image.Image, heat: NDArray[np.float32], maximum: float, covered: tuple[float, float]
) -> Image.Image:
    """The picture under the heat map; what no patch covers stays as it is."""
    size = round(picture.width * covered[1]), round(picture.height * covered[0])
    shade = Image.open(io.BytesIO(draw_heat_map(heat, maximum))).resize(size, Image.Resampling.NEAREST)
    shade.putalpha(shade.getchannel("A").point(lambda alpha: alpha * 0.8))  # the object must still be visible
    shown = picture.convert("RGBA")
    shown.alpha_composite(shade)
    return shown.convert("RGB")


def _shorten(text: str, draw: ImageDraw.ImageDraw, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont") -> str:
    """Cut a text to what fits below a picture."""
    if draw.textlength(text, font) <= CELL:
        return text
    while text and draw.textlength(text + "…", font) > CELL:
        text = text[:-1]
    return text + "…"
