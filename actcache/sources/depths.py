"""Images of more than 8 bits: which of their values are black and white, as far as their file says so.

In: an image whose header Pillow has read, and later its pixels. Out: 8 bits. A file says it with the sBIT chunk of a
PNG, the maximum of a PGM, the precision of a JPEG 2000, or the tags BitsPerSample, Min- and MaxSampleValue (SMin-,
SMaxSampleValue) of a TIFF. An image that does not say it is refused, since every guess would make some images black.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

UNUSED_BITS = 2
"""A 16-bit image without declared bits is refused if its values leave this many of the highest bits unused: as 16 bits
it would have less than a quarter of the brightness. Cameras and scanners store 10, 12 or 14 bits in this way."""

_BITS, _PHOTOMETRIC, _MIN, _MAX, _FORMAT, _SMIN, _SMAX = 258, 262, 280, 281, 339, 340, 341  # numbers of TIFF tags
_ADVICE = "Convert it to 8 bits"


@dataclass(frozen=True)
class Depth:
    """What the header says about the samples.

    Attributes:
        mode: Pillow's mode, e.g. `I;16`, `F` or `RGB`.
        bits: number of bits that are used of each sample; None if the file does not say it.
        black, white: values of black and white; None if the file does not say them.
        full: the decoder has already scaled the samples to their full range.
        inverted: the lowest value is white.
        unsigned: 32-bit samples have no sign, although Pillow's mode `I` has one.
        cut: the samples have 16 bits, of which Pillow keeps the upper 8.
    """

    mode: str
    bits: int | None = None
    black: float | None = None
    white: float | None = None
    full: bool = False
    inverted: bool = False
    unsigned: bool = False
    cut: bool = False

    @property
    def is_deep(self) -> bool:
        return self.mode[0] in "IF"


@dataclass(frozen=True)
class Levels:
    """The values of black and white. `shift`: whole bits to drop, if that is all there is to do."""

    black: float
    white: float
    shift: int | None = None


def read_depth(image: Any, data: bytes) -> Depth:
    """Read the depth from the header, before the pixels are loaded. Raises ValueError for signed samples of 8 bits."""
    raw = str(image.tile[0][3]) if image.tile else ""
    cut = image.format in ("PNG", "TIFF") and ";16" in raw and image.mode[0] not in "IF"
    depth = Depth(image.mode, cut=cut)
    if image.format == "PNG" and (depth.is_deep or depth.cut):
        return Depth(image.mode, bits=_significant_bits(data), cut=depth.cut)
    if image.format in ("PPM", "JPEG2000"):
        return Depth(image.mode, full=image.mode[0] == "I")
    return _read_tags(image, depth) if image.format == "TIFF" else depth


def _read_tags(image: Any, depth: Depth) -> Depth:
    tags = image.tag_v2
    bits, kind = _first(tags, _BITS, 1), _first(tags, _FORMAT, 1)
    if not depth.is_deep:
        if kind == 2:
            raise ValueError("its samples are signed numbers of 8 bits. Convert it to unsigned ones")
        declared = _first(tags, _MAX, None)
        return Depth(depth.mode, bits=int(declared).bit_length() if declared else None, cut=depth.cut)
    black, white = _first(tags, _SMIN, None), _first(tags, _SMAX, None)
    if white is None:
        black, white = _first(tags, _MIN, None), _first(tags, _MAX, None)
    return Depth(
        depth.mode,
        bits=int(bits) if bits < 16 else None,
        black=None if white is None else float(black or 0),
        white=None if white is None else float(white),
        inverted=_first(tags, _PHOTOMETRIC, 1) == 0,
        unsigned=kind == 1 and bits == 32,
    )


def _first(tags: Any, number: int, missing: Any) -> Any:
    """The value of a tag, or the first one of several."""
    value = tags.get(number, missing)
    if isinstance(value, (tuple, list)):
        value = value[0] if value else missing
    return value


def _significant_bits(data: bytes) -> int | None:
    """The largest number in the sBIT chunk of a PNG that comes before its pixels; None if there is no such chunk."""
    at = 8
    while at + 8 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if kind == b"sBIT" and size and at + 8 + size <= len(data):
            bits = max(data[at + 8 : at + 8 + min(size, 3)])  # the fourth is that of alpha
            return bits if 1 <= bits <= 16 else None
        if kind == b"IDAT":
            break
        at += size + 12
    return None


def find_levels(image: "Image.Image", depth: Depth) -> Levels | None:
    """Black and white of the whole loaded image; None if it has 8 bits.

    Raises:
        ValueError: the file does not say them, or holds values beyond them.
    """
    if depth.cut:
        _check_cut(image, depth)
    if not depth.is_deep:
        return None
    values = _samples(image, depth)
    low, high = float(values.min()), float(values.max())
    if depth.white is not None and depth.black is not None:
        if not (depth.black <= low and high <= depth.white and depth.black < depth.white < float("inf")):
            raise ValueError(
                f"its values go from {low:g} to {high:g}, but it calls {depth.black:g} black and {depth.white:g} "
                f"white. {_ADVICE}, or correct its tags"
            )
        bits = int(min(depth.white, 1 << 32)).bit_length()
        whole = values.dtype.kind in "iu" and bits >= 8 and (depth.black, depth.white) == (0, (1 << bits) - 1)
        return Levels(depth.black, depth.white, shift=bits - 8 if whole else None)
    if depth.full:
        return Levels(0, 65535, shift=8)
    if not depth.mode.startswith("I;16"):
        raise ValueError(
            f"its pixels are numbers of mode {depth.mode} from {low:g} to {high:g}, and it does not say which of them "
            f"are black and white. {_ADVICE}, or set SMinSampleValue and SMaxSampleValue in the TIFF"
        )
    used = int(high).bit_length()
    if depth.bits is None and 0 < used <= 16 - UNUSED_BITS:
        raise ValueError(
            f"it has 16 bits per pixel (mode {depth.mode}) of which its values use {used}, and it does not say which "
            f"value is white. {_ADVICE}, or declare the bits (sBIT in a PNG, MaxSampleValue in a TIFF)"
        )
    # The PNG standard wants samples of fewer bits stretched to 16, but many programs store them as they are.
    bits = 16 if depth.bits is None or used > depth.bits else depth.bits
    return Levels(0, (1 << bits) - 1, shift=bits - 8 if bits >= 8 else None)


def _check_cut(image: "Image.Image", depth: Depth) -> None:
    extrema = image.getextrema()
    bands = list(zip(image.getbands(), extrema, strict=True)) if isinstance(extrema[0], tuple) else []
    high = max((int(band[1]) for name, band in bands if name != "A"), default=255)
    used = 8 + high.bit_length()
    declared = depth.bits or 16 - UNUSED_BITS
    if declared < 16 and used <= max(declared, 8):
        raise ValueError(
            f"it has 16 bits per sample of which its values use at most {used}, and only the upper 8 can be read in "
            f"mode {depth.mode}, so that it would be nearly black. {_ADVICE}"
        )


def _samples(image: "Image.Image", depth: Depth) -> NDArray[Any]:
    values = np.asarray(image)
    return values.view(np.uint32) if depth.unsigned and values.dtype == np.int32 else values


def reduce_depth(image: "Image.Image", depth: Depth, levels: Levels) -> "Image.Image":
    """Scale an image, or a part of it, to 8 bits of gray."""
    from PIL import Image

    values = _samples(image, depth)
    if levels.shift is not None:
        gray = (values >> levels.shift).astype(np.uint8)
    else:
        scaled = (values.astype(np.float64) - levels.black) * (255 / (levels.white - levels.black))
        gray = np.round(scaled).astype(np.uint8)
    return Image.fromarray(255 - gray if depth.inverted else gray)
