"""A Look as pictures: a sheet, an HTML page, or the HTML that a notebook shows.

Each image is shown alone and under the heat maps of its latents. The heat maps of a latent share one scale, its maximum
over all images, and darken the patches on which it does not fire.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache import SettingsError
from actcache.artifacts import write_output
from analysis.pictures import SHEETS, SheetCell, draw_heat_map, encode_jpeg, save_sheet
from analysis.report import Frame, fill, share_pictures
from analysis.views.view import Look, View

N_COLUMNS = 6
SIDE = 224
MAX_SHOWN = 400
"""Most heat maps that a file shows; a page of so many has 10 MB."""


class Shown(NamedTuple):
    """A latent on an image. `maximum` is that of the latent on all images."""

    latent: int
    name: str
    peak: float
    share: float
    at: str
    heat: NDArray[np.float32]
    maximum: float

    @property
    def title(self) -> str:
        return f"latent {self.latent} {self.name}".rstrip()

    @property
    def numbers(self) -> str:
        if not self.peak:
            return "does not fire"
        place = f" at {self.at}" if self.at else ""
        return f"peak {self.peak:.3g}{place}, on {self.share:.0%} of patches"


def check_out(out: str | Path) -> Path:
    """Raise SettingsError unless the suffix names a kind of file that `draw_look` writes."""
    path, known = Path(out), (".html", *SHEETS)
    if path.suffix.lower() not in known:
        raise SettingsError(f"--out must end in {', '.join(known)}, got {path.name!r}.")
    return path


def draw_look(look: Look, out: str | Path) -> Path:
    path = check_out(out)
    if path.suffix.lower() != ".html":
        return _save_sheet(look, path)
    page = fill(
        "look.html.jinja", script="", frame=Frame("1", "1", "100", "100"), title=f"What {Path(look.sae).name} sees",
        subtitle=f"{look.sae} reads {look.hook_point} of {look.model}.", body=draw_html(look, tables=True),
    )  # fmt: skip
    return write_output(path, share_pictures(page).encode())


def draw_html(look: Look, *, tables: bool = False) -> str:
    """The pictures as a piece of HTML with its own style, escaped. tables: add the numbers of each image."""
    parts = []
    for view, shown in _choose(look):
        parts.append(
            {
                "title": look.title(view),
                "picture": encode_jpeg(view.picture),
                "frame": _frame(look, view),
                "aspect": f"{view.picture.width} / {view.picture.height}",
                "covered": f"height: {100 * view.covered[0]:g}%; width: {100 * view.covered[1]:g}%",
                "maps": [(each, draw_heat_map(each.heat, each.maximum)) for each in shown],
                "rows": _rows(look, view) if tables else [],
            }
        )
    return fill("look_parts.html.jinja", images=parts, notes=look.notes)


def _rows(look: Look, view: View) -> list[list[str]]:
    table = look.table(view).drop_columns(["row", "column"])
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values()] for row in
             table.to_pylist()]  # fmt: skip
    return [table.column_names, *cells]


def _frame(look: Look, view: View) -> tuple[float, float, float, float] | None:
    """(top, left, bottom, right) of the place that was asked about, as shares of the picture; None if there is none."""
    if look.at is None:
        return None
    rows, columns = view.find_patches(look.at)
    high, wide = (share / n for share, n in zip(view.covered, view.grid, strict=True))
    return rows.start * high, columns.start * wide, rows.stop * high, columns.stop * wide


def _save_sheet(look: Look, out: Path) -> Path:
    rows: list[list[SheetCell]] = []
    for view, shown in _choose(look):
        frame = _frame(look, view)
        first = SheetCell(view.picture, None, 0.0, (look.title(view), "as the model sees it"), frame)
        cells = [first, *(SheetCell(view.picture, each.heat, each.maximum, (each.title, each.numbers), frame,
                                    view.covered)
                          for each in shown)]  # fmt: skip
        rows += [cells[i : i + N_COLUMNS] for i in range(0, len(cells), N_COLUMNS)]
    return save_sheet(rows, out, side=SIDE)


def _choose(look: Look) -> list[tuple[View, list[Shown]]]:
    """Each image with the latents that are shown of it. Raises SettingsError for too many, or an SAE of CLS."""
    tables = [look.table(view).to_pylist() for view in look]
    if any(view.tokens == "cls" for view in look):
        raise SettingsError("The SAE reads CLS only, so there are no heat maps to draw. Leave out --out.")
    if (n := sum(map(len, tables))) > MAX_SHOWN:
        raise SettingsError(f"{n:,} heat maps are too many for one file; {MAX_SHOWN} are allowed. Lower --n-top.")
    heats = [{row["latent"]: view.heat_map(row["latent"]) for row in rows} for view, rows in
             zip(look, tables, strict=True)]  # fmt: skip
    maxima: dict[int, float] = {}
    for maps in heats:
        for latent, heat in maps.items():
            maxima[latent] = max(maxima.get(latent, 0.0), float(heat.max()))
    return [
        (view, [_show(row, maps[row["latent"]], maxima[row["latent"]]) for row in rows])
        for view, rows, maps in zip(look, tables, heats, strict=True)
    ]


def _show(row: Mapping[str, Any], heat: NDArray[np.float32], maximum: float) -> Shown:
    return Shown(row["latent"], row.get("name", ""), row["peak"], row["share"], row["at"], heat, maximum)
