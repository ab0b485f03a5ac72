"""Pictures: what the model saw of an image, as a small JPEG, heat maps as transparent PNGs, and sheets of both."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from actcache import ImageSourceError, ParentMismatchError, SettingsError
from actcache.artifacts import exists, is_elsewhere, write_output
from actcache.sources import ImageSource, decode_image, reopen_source, resize_image
from actcache.store import NO_IMAGES
from actcache.text import visible
from analysis.lineage import ImagePlaces, source_columns
from saetrain import CodeStore

Picture = Image.Image

THUMBNAIL_PIXELS = 160
CELL, GAP, LINE, MARGIN = 176, 8, 16, 12
FRAME = "#ff8c1a"
"""Color of the frame around chosen patches, which differs from most photographs and from the shade."""

SHEETS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"}, ".jpg": {"format": "JPEG", "quality": 92, "subsampling": 0},
    ".jpeg": {"format": "JPEG", "quality": 92, "subsampling": 0}, ".webp": {"format": "WEBP", "lossless": True},
}  # fmt: skip
"""How a sheet is saved, by the suffix of its file. Text beside pictures needs full color resolution in a JPEG."""


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
        return encode_jpeg(picture)

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


def encode_jpeg(picture: Picture) -> bytes:
    """The bytes of a JPEG of the picture's own size."""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=80, optimize=True)
    return buffer.getvalue()


def draw_heat_map(heat: NDArray[np.floating[Any]], maximum: float) -> bytes:
    """PNG [rows, columns], one pixel per patch: black where the latent is silent, transparent where it is strongest.

    Laid over the image, it darkens everything to which the latent does not respond.
    """
    share = np.clip(heat / max(maximum, 1e-12), 0, 1)
    pixels = np.zeros((*heat.shape, 4), dtype=np.uint8)
    pixels[..., 3] = np.round(215 * (1 - np.sqrt(share)))
    return _png(pixels)


def draw_shot(picture: bytes, heat: bytes, side: int, *, covered: tuple[float, float] = (1.0, 1.0)) -> bytes:
    """JPEG of a picture under a heat map, `side` pixels on its longer side.

    Args:
        picture: a JPEG; b"" if there is none, which gives gray.
        heat: what `draw_heat_map` gives; b"" for the picture alone.
        covered: the share of height and width of the picture over which the patches lie.
    """
    shade = Image.open(io.BytesIO(heat)) if heat else Image.new("RGBA", (1, 1))
    seen = Image.open(io.BytesIO(picture)) if picture else Image.new("RGB", shade.size, "#b0b0b0")
    return encode_jpeg(_lay_over(fit_picture(seen.convert("RGB"), side), shade, covered))


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


# ---------------------------------------------------------------------------------------------------------------------
# Sheets


class SheetCell(NamedTuple):
    """A picture on a sheet.

    Attributes:
        heat: [rows, columns] what is laid over it; None for the picture alone.
        maximum: the value at which the heat map is transparent.
        covered: the share of height and width of the picture over which the patches lie.
        lines: the two lines of text below it.
        frame: (top, left, bottom, right) of a place that gets a frame, as shares of the picture.
    """

    picture: Picture
    heat: NDArray[np.floating[Any]] | None
    maximum: float
    lines: tuple[str, str]
    frame: tuple[float, float, float, float] | None = None
    covered: tuple[float, float] = (1.0, 1.0)


def save_sheet(rows: Sequence[Sequence[SheetCell]], out: str | Path, *, side: int = CELL) -> Path:
    """Write rows of pictures as one picture of the kind that the suffix names. An existing file is replaced.

    Args:
        side: pixels of the longer side of each picture.
    """
    out = Path(out)
    width = 2 * MARGIN + max(map(len, rows)) * (side + GAP) - GAP
    sheet = Image.new("RGB", (width, 2 * MARGIN + len(rows) * (side + 2 * LINE + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, row in enumerate(rows):
        for k, cell in enumerate(row):
            left, top = MARGIN + k * (side + GAP), MARGIN + i * (side + 2 * LINE + GAP)
            picture = fit_picture(cell.picture, side)
            if cell.heat is not None:
                shade = Image.open(io.BytesIO(draw_heat_map(cell.heat, cell.maximum)))
                picture = _lay_over(picture, shade, cell.covered)
            if cell.frame is not None:
                _draw_frame(picture, cell.frame)
            sheet.paste(picture, (left, top))
            for line, text in enumerate(cell.lines):
                shown = _shorten(visible(text), side, draw, font)
                draw.text((left, top + side + 1 + line * LINE), shown, fill="#222222", font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, **SHEETS[out.suffix.lower()])
    return write_output(out, buffer.getvalue())


def fit_picture(picture: Picture, side: int) -> Picture:
    """Resize a picture so that its longer side has `side` pixels."""
    longest = max(picture.size)
    size = (max(1, side * picture.width // longest), max(1, side * picture.height // longest))
    return picture.resize(size, Image.Resampling.NEAREST if longest * 2 <= side else Image.Resampling.BICUBIC)


def _lay_over(picture: Picture, shade: Picture, covered: tuple[float, float]) -> Picture:
    """The picture under the heat map; what no patch covers stays as it is."""
    size = round(picture.width * covered[1]), round(picture.height * covered[0])
    shade = shade.resize(size, Image.Resampling.NEAREST)
    shade.putalpha(shade.getchannel("A").point(lambda alpha: alpha * 0.8))  # the object must still be visible
    shown = picture.convert("RGBA")
    shown.alpha_composite(shade)
    return shown.convert("RGB")


def _draw_frame(picture: Picture, frame: tuple[float, float, float, float]) -> None:
    """Draw a frame just outside of a place, or at the border of the picture."""
    top, left, bottom, right = frame
    width, height = picture.size
    box = (max(left * width - 2, 0), max(top * height - 2, 0),
           min(right * width + 1, width - 1), min(bottom * height + 1, height - 1))  # fmt: skip
    ImageDraw.Draw(picture).rectangle(box, outline=FRAME, width=2)


def _shorten(
    text: str, side: int, draw: ImageDraw.ImageDraw, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont"
) -> str:
    """Cut a text to what fits below a picture."""
    if draw.textlength(text, font) <= side:
        return text
    while text and draw.textlength(text + "…", font) > side:
        text = text[:-1]
    return text + "…"
