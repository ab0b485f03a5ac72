"""Pictures: what the model saw of an image, as a small JPEG, and heat maps as transparent PNGs."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from actcache import ImageSourceError, ParentMismatchError, SettingsError
from actcache.artifacts import exists, is_elsewhere
from actcache.sources import ImageSource, decode_image, reopen_source, resize_image
from actcache.store import NO_IMAGES
from analysis.lineage import ImagePlaces, source_columns
from saetrain import CodeStore

THUMBNAIL_PIXELS = 160


class Pictures:
    """The images of codes as the model saw them. Each store that the codes were made from has a source of its own."""

    def __init__(self, codes: CodeStore, places: ImagePlaces) -> None:
        self._codes, self._places = codes, places
        self._sources: dict[int, ImageSource] = {}

    def see(self, image: int) -> Image.Image:
        """The part of an image that the model sees, at the model's size. image: stored position.

        Raises:
            SettingsError: the images are not where they were.
            ParentMismatchError: the image is missing, or has another size than the one that was extracted.
            ImageSourceError: the image cannot be decoded.
        """
        uri, n_bytes = (self._codes.images[name][image].as_py() for name in ("uri", "bytes"))
        source = self._source(int(self._places.stores[image]))
        advice = "Give the images that were extracted with --images."
        try:
            data = source.read(uri)
        except ImageSourceError as error:
            raise ParentMismatchError(
                f"{str(error).rstrip('.')}; it could be read when it was extracted. {advice}"
            ) from error
        if n_bytes not in (-1, len(data)):  # -1: the size was not known
            raise ParentMismatchError(
                f"{uri} has {len(data):,} bytes in {source.path}, but the codes were made from a file of {n_bytes:,} "
                f"bytes. {advice}"
            )
        preprocess = self._codes.preprocess
        return resize_image(decode_image(data, name=uri, max_pixels=None, preprocess=preprocess), preprocess)

    def thumbnail(self, image: int) -> bytes:
        """JPEG of what `see` returns, at most 160 pixels wide. Raises as `see`."""
        picture = self.see(image)
        if picture.width > THUMBNAIL_PIXELS:
            picture = picture.resize((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS * picture.height // picture.width))
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=80, optimize=True)
        return buffer.getvalue()

    def _source(self, number: int) -> ImageSource:
        if number not in self._sources:
            name = f"images {number + 1}" if number else "images"
            place = self._places.folders[number]
            if place is None or not exists(place):
                recorded = self._codes.artifact.parent(name).path
                if Path(recorded).name == NO_IMAGES:
                    raise SettingsError(
                        f"{self._codes.path} was made from activations that were imported without their images. Import "
                        "them again and name the images: `import --images`."
                    )
                gone = "lies on other storage" if is_elsewhere(self._codes.path, recorded) else "no longer exists"
                raise SettingsError(f"{place or recorded} {gone}. Give the new path of the images with --images.")
            self._sources[number] = reopen_source(place, source_columns(self._codes))
        return self._sources[number]


def draw_heat_map(heat: NDArray[np.floating[Any]], maximum: float) -> bytes:
    """PNG [rows, columns], one pixel per patch: black where the latent is silent, transparent where it is strongest.

    Laid over the image, it darkens everything to which the latent does not respond.
    """
    share = np.clip(heat / max(maximum, 1e-12), 0, 1)
    pixels = np.zeros((*heat.shape, 4), dtype=np.uint8)
    pixels[..., 3] = np.round(215 * (1 - np.sqrt(share)))
    return _png(pixels)


def draw_position_map(counts: NDArray[np.integer[Any]]) -> bytes:
    """PNG [rows, columns], one pixel per patch: white where a latent never fires, blue where it fires most often."""
    return _draw_shares(counts / max(int(counts.max()), 1))


def draw_matrix(counts: NDArray[np.integer[Any]]) -> bytes:
    """PNG [C, C], one pixel per cell: white for none of its row, blue for all of it."""
    return _draw_shares(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))


def _draw_shares(shares: NDArray[np.floating[Any]]) -> bytes:
    return _png(np.round(255 + shares[..., None] * (np.array([11, 80, 170]) - 255)).astype(np.uint8))


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """pixels: [height, width, 3 or 4]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
