"""The top images of any latent with heat maps, even if the gallery does not hold it.

In: concept tables of the same images. Pictures are taken from the galleries or, failing that, from the images
themselves; heat maps come from the codes or, failing that, from the gallery. What cannot be found is left out.
"""

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from actcache import ImageSourceError, ParentMismatchError, SettingsError
from analysis.concepts import ConceptTable, find_codes
from analysis.heat_maps import heat_maps
from analysis.lineage import find_images
from analysis.pictures import Pictures, draw_heat_map


class Shot(NamedTuple):
    """An image under a latent's heat map. A picture or heat map that is not available is b"".

    Attributes:
        score: what the latent's top images are ordered by: its mean or maximum activation on the image.
        peak: its maximum activation on the image.
    """

    uri: str
    label: str
    score: float
    peak: float
    picture: bytes
    heat: bytes


class Frame(NamedTuple):
    """How a page lays heat maps over pictures, in CSS.

    Attributes:
        picture, grid: the shapes of a picture and of the grid of patches, as aspect ratios.
        width, height: percentages of a picture's width and height that lie under patches, from the upper left corner.
    """

    picture: str
    grid: str
    width: str
    height: str


def frame_of(table: ConceptTable) -> Frame:
    (rows, columns), (down, across) = table.grid, table.covered
    picture = f"{columns / across:g} / {rows / down:g}"
    return Frame(picture, f"{columns} / {rows}", f"{100 * across:g}", f"{100 * down:g}")


class TopShots:
    """The top images of latents, from one or several tables of the same images. Opened files and pictures are kept."""

    def __init__(self, tables: Mapping[str, ConceptTable]) -> None:
        self.tables = tables
        self._codes = {name: find_codes(table) for name, table in tables.items()}
        self._pictures = [Pictures(codes, find_images(codes)) for codes in self._codes.values() if codes is not None]
        self._picture = cache(self._find_picture)

    def of(self, name: str, latent: int, n: int) -> list[Shot]:
        """The n images on which a latent fires most in one of the tables; none if that table is missing."""
        table = self.tables.get(name)
        if table is None:
            return []
        top = table.top_images.filter(pc.equal(table.top_images["latent"], latent)).sort_by("rank").slice(0, n)
        images = np.asarray(top["image"], dtype=np.int64)
        maps, maximum = self._maps(name, latent, images), float(table.table["max_activation"][latent].as_py())
        return [
            Shot(
                uri=table.images["uri"][image].as_py(),
                label=table.images["label_name"][image].as_py(),
                score=line["score"],
                peak=float(maps[image].max()) if image in maps else line["peak"],
                picture=self._picture(image),
                heat=draw_heat_map(maps[image], maximum) if image in maps else b"",
            )
            for image, line in zip(images.tolist(), top.to_pylist(), strict=True)
        ]

    def _maps(self, name: str, latent: int, images: NDArray[np.int64]) -> dict[int, NDArray[np.float32]]:
        table, codes = self.tables[name], self._codes[name]
        if codes is not None:
            return dict(zip(images.tolist(), heat_maps(codes, latent, images), strict=True))
        kept = table.gallery.filter(pc.equal(table.gallery["latent"], latent)).to_pylist()
        return {line["image"]: np.array(line["heat"], dtype=np.float32).reshape(table.grid) for line in kept}

    def _find_picture(self, image: int) -> bytes:
        for table in self.tables.values():
            if picture := table.thumbnail(image):
                return picture
        for pictures in self._pictures:
            try:
                return pictures.thumbnail(image)
            except (SettingsError, ParentMismatchError, ImageSourceError):  # gone or replaced
                continue
        return b""
