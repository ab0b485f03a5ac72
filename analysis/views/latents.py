"""show_latents(): latents with the images on which they fire most, as a notebook shows them. No torch.

In: a concept table; pictures and heat maps come from its gallery, from the codes and from the images, as far as they
are found. Out: numbers, and HTML without scripts or styles, whose pictures hold their heat maps. A page that removes
styles, as GitHub does, shows the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from numpy.typing import ArrayLike

from actcache import SettingsError
from actcache.options import check_number
from analysis.concepts import ClassShare, ConceptTable, class_shares
from analysis.naming import read_names, read_own_names
from analysis.pictures import draw_shot
from analysis.report import Shot, TopShots, fill

N_SHOWN = 4
"""How many latents of the gallery are shown if none are named."""
N_COLUMNS, SIDE = 6, 100
MAX_IMAGES = 24
"""Most images of a latent; so many have at most 250 kB."""
N_CLASSES = 3


@dataclass(frozen=True, eq=False)
class ShownLatent:
    """One latent and its top images. It shows itself in a notebook.

    Attributes:
        name, note: what it is called; "" if it has no name.
        image_frequency, density: shares of the images and of the tokens on which it fires.
        mean_activation, max_activation: over the tokens on which it fires.
        classes: those on whose tokens it is above tau, largest share first; none without labels.
        shots: the images, the strongest first.
    """

    latent: int
    name: str
    note: str
    image_frequency: float
    density: float
    mean_activation: float
    max_activation: float
    classes: tuple[ClassShare, ...] = field(repr=False)
    shots: tuple[Shot, ...] = field(repr=False)
    covered: tuple[float, float] = field(default=(1.0, 1.0), repr=False)

    def _repr_html_(self) -> str:
        cells = [
            (shot, draw_shot(shot.picture, shot.heat, SIDE, covered=self.covered) if shot.picture or shot.heat else b"")
            for shot in self.shots
        ]
        rows = [cells[i : i + N_COLUMNS] for i in range(0, len(cells), N_COLUMNS)]
        return fill("shown_latent.html.jinja", latent=self, classes=self.classes[:N_CLASSES], rows=rows, side=SIDE)


@dataclass(frozen=True, eq=False)
class ShownLatents:
    """Several latents, one below the other. They show themselves in a notebook."""

    latents: tuple[ShownLatent, ...]

    def __len__(self) -> int:
        return len(self.latents)

    def __iter__(self) -> Iterator[ShownLatent]:
        return iter(self.latents)

    def __getitem__(self, number: int) -> ShownLatent:
        return self.latents[number]

    def _repr_html_(self) -> str:
        return "".join(latent._repr_html_() for latent in self.latents)


def show_latents(
    concepts: ConceptTable | str | Path, latents: ArrayLike | None = None, *, n_images: int = N_COLUMNS
) -> ShownLatents:
    """Show latents with the images on which they fire most, darkened where they do not.

        show_latents(concepts, 907)
        show_latents(concepts, query_image(codes, 12, n_top=3)["latent"])

    Args:
        latents: one or several; by default the first four of the report's gallery.
        n_images: how many images of each, at most 24.

    Raises:
        SettingsError: there is no such latent, or n_images is out of range.
        CorruptError: a file of the table is damaged.
    """
    table = concepts if isinstance(concepts, ConceptTable) else ConceptTable.open(concepts)
    n_images = check_number("n_images", n_images, int, at_least=1, at_most=MAX_IMAGES)
    if latents is None:
        latents = pc.unique(table.gallery["latent"])[:N_SHOWN]
    wanted = [check_number("latent", latent, int, at_least=0) for latent in np.ravel(np.asarray(latents)).tolist()]
    if wanted and max(wanted) >= table.table.num_rows:
        raise SettingsError(f"There is no latent {max(wanted)}: the SAE has 0..{table.table.num_rows - 1}.")
    names, own, shots = read_names(table), read_own_names(table), TopShots({"": table})
    shown = []
    for latent in wanted:
        row = table.table.slice(latent, 1).to_pylist()[0]
        shown.append(
            ShownLatent(
                latent, names.get(latent, ""), own.get(latent, {}).get("note", ""), row["image_frequency"],
                row["density"], row["mean_activation"], row["max_activation"],
                classes=tuple(class_shares(table, latent)), shots=tuple(shots.of("", latent, n_images)),
                covered=table.covered,
            )
        )  # fmt: skip
    return ShownLatents(tuple(shown))
