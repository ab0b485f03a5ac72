"""A contact sheet: one picture that shows the images of an answer as the model saw them, under a latent's heat map.

In: codes, the answer's table, and where the images are. Out: a file of the kind that its suffix names. The heat maps of
a latent share one scale, its maximum over the sheet, and darken the patches to which it does not respond.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actcache import SettingsError
from analysis.heat_maps import heat_maps
from analysis.lineage import find_images
from analysis.pictures import CELL, SHEETS, Pictures, SheetCell, fit_picture, save_sheet
from analysis.query.images import find_image
from analysis.query.latents import query_latent
from saetrain import CodeStore

N_COLUMNS = 8
MAX_CELLS = 200
N_TOP_IMAGES = 6
"""How many images of a latent are shown if the answer names latents only."""


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
    if out.suffix.lower() not in SHEETS:
        raise SettingsError(f"--sheet must end in {', '.join(SHEETS)}, got {out.name!r}.")
    positions = [find_image(codes, image) for image in images]
    cells = choose_cells(codes, answer, latents=latents, images=positions, where=where)
    if not cells:
        raise SettingsError("The answer is empty, so there is nothing to draw. Ask without --sheet.")
    source = Pictures(codes, find_images(codes, images=folder, store=store))
    pictures = {image: fit_picture(source.see(image), CELL) for image in sorted({cell.image for cell in cells})}
    heats, cls = _heats(codes, cells), _fires_on_cls(codes, cells)
    maxima: dict[int, float] = {}
    for cell, heat in zip(cells, heats, strict=True):
        maxima[cell.latent] = max(maxima.get(cell.latent, 0.0), float(heat.max()))
    labels, uris = codes.images["label_name"], codes.images["uri"]
    rows: dict[int, list[SheetCell]] = {}
    for cell, heat in zip(cells, heats, strict=True):
        title = labels[cell.image].as_py() or uris[cell.image].as_py().rsplit("/", 1)[-1]
        strength = f"{heat.max():.3g}" if heat.max() > 0 else "CLS only" if cls[cell] else "0"
        called = f"latent {cell.latent} {names.get(cell.latent, '')}".rstrip()
        lines = (f"{title}  #{cell.image}", f"{called}: {strength}  {cell.note}")
        shown = SheetCell(pictures[cell.image], heat, maxima[cell.latent], lines, covered=codes.covered)
        rows.setdefault(cell.row, []).append(shown)
    return save_sheet(list(rows.values()), out)


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
