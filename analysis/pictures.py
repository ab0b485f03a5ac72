"""Pictures: what the model saw of an image, as a small JPEG, and a heat map as a transparent PNG."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from actcache import ImageSourceError, ParentMismatchError, SettingsError
from actcache.preprocess import Preprocess
from actcache.sources import ImageSource, decode_image, open_source, resize_image
from analysis.lineage import find_images, image_stores
from saetrain import CodeStore

THUMBNAIL_PIXELS = 160


class Pictures:
    """The images of codes as the model saw them, from wherever they lie: a source for each store they were made from.

    Args:
        images, store: where they moved, as in `find_images`.
    """

    def __init__(self, codes: CodeStore, *, images: str | Path | None = None, store: str | Path | None = None) -> None:
        self._codes = codes
        self._images, self._store = images, store
        self._stores = image_stores(codes)
        self._sources: dict[int, ImageSource] = {}

    def all_there(self) -> bool:
        n_stores = sum(name.split()[0] == "images" for name in self._codes.artifact.parents)
        return all((found := self._find(number)) is not None and found.exists() for number in range(n_stores))

    def see(self, image: int) -> Image.Image:
        """As `see_image`; raises SettingsError too, where the images are not there."""
        return see_image(*self._locate(image))

    def thumbnail(self, image: int) -> bytes:
        """As `make_thumbnail`; raises SettingsError too, where the images are not there."""
        return make_thumbnail(*self._locate(image))

    def _locate(self, image: int) -> tuple[ImageSource, str, int, Preprocess]:
        table = self._codes.images
        number = int(self._stores[image])
        return self._source(number), table["uri"][image].as_py(), table["bytes"][image].as_py(), self._codes.preprocess

    def _find(self, number: int) -> Path | None:
        return find_images(self._codes, images=self._images, store=self._store, number=number)

    def _source(self, number: int) -> ImageSource:
        if number not in self._sources:
            name = f"images {number + 1}" if number else "images"
            where = self._find(number) or self._codes.artifact.parent_path(name)
            if not where.exists():
                raise SettingsError(f"{where} is not there any more. Say with --images where the images are.")
            self._sources[number] = open_source(where)
        return self._sources[number]


def make_thumbnail(source: ImageSource, uri: str, n_bytes: int, preprocess: Preprocess) -> bytes:
    """JPEG of the part of an image that the model sees, at most 160 pixels wide. Arguments and errors: `see_image`."""
    image = see_image(source, uri, n_bytes, preprocess)
    if image.width > THUMBNAIL_PIXELS:
        image = image.resize((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS * image.height // image.width))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80, optimize=True)
    return buffer.getvalue()


def see_image(source: ImageSource, uri: str, n_bytes: int, preprocess: Preprocess) -> Image.Image:
    """The part of an image that the model sees, at the model's size.

    Args:
        n_bytes: what the image had when it was extracted; -1: not known.

    Raises:
        ParentMismatchError: the image is missing, or has another size than the one that was extracted.
        ImageSourceError: it cannot be decoded.
    """
    advice = "Give the images that were extracted with --images."
    try:
        data = source.read(uri)
    except ImageSourceError as error:
        raise ParentMismatchError(f"{str(error).rstrip('.')}; it was there when it was extracted. {advice}") from error
    if n_bytes not in (-1, len(data)):
        raise ParentMismatchError(
            f"{uri} has {len(data):,} bytes in {source.path}; the codes were made from a file of {n_bytes:,} bytes. "
            f"{advice}"
        )
    return resize_image(decode_image(data, name=uri), preprocess)


def draw_heat_map(heat: NDArray[np.floating[Any]], maximum: float) -> bytes:
    """PNG [rows, columns], one pixel a patch: black where the latent is silent, clear where it is strongest.

    Laid over the image it darkens everything the latent does not see.
    """
    share = np.clip(heat / max(maximum, 1e-12), 0, 1)
    pixels = np.zeros((*heat.shape, 4), dtype=np.uint8)
    pixels[..., 3] = np.round(215 * (1 - np.sqrt(share)))
    return _png(pixels)


def draw_position_map(counts: NDArray[np.integer[Any]]) -> bytes:
    """PNG [rows, columns], one pixel a patch: white where a latent never fires, blue where it does most often."""
    return _draw_shares(counts / max(int(counts.max()), 1))


def draw_matrix(counts: NDArray[np.integer[Any]]) -> bytes:
    """PNG [C, C], one pixel a cell: white for none of its row, blue for all of it."""
    return _draw_shares(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))


def _draw_shares(shares: NDArray[np.floating[Any]]) -> bytes:
    return _png(np.round(255 + shares[..., None] * (np.array([11, 80, 170]) - 255)).astype(np.uint8))


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """Of [height, width, 3 or 4]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
