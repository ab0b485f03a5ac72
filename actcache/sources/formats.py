"""Which files are images: the formats that are decoded, the suffixes of their names, and the folders that are skipped.

Every source uses this list, so a folder, a table and a tar accept the same files. It holds the raster formats whose
decoders neither start a program (EPS starts ghostscript), nor open other files, nor recognize a file by its name alone.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM")
"""Pillow's names of the formats, in the order in which they are tried."""

SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".jpe", ".jfif", ".gif", ".tif", ".tiff", ".bmp", ".avif", ".jp2", ".j2k",
    ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
"""How the names of images end, in lower case. A file is decoded by its content, whatever its suffix."""

SYSTEM_NAMES = frozenset({
    "@eadir", "#recycle", "#snapshot", "@recycle", "$recycle.bin", "recycler", "lost+found",
    "system volume information", "__macosx", "__pycache__", "thumbs.db", "desktop.ini",
})  # fmt: skip
"""Folders and files that operating systems and disk stations put beside images, in lower case."""


def is_image(name: str) -> bool:
    """Whether a file name is that of an image."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def is_system_name(name: str) -> bool:
    """Whether a folder or file belongs to the operating system rather than to the data."""
    return name.lower() in SYSTEM_NAMES


def open_image(data: bytes, formats: tuple[str, ...] = FORMATS) -> "ImageFile":
    """Read the header of an image; the pixels are read by its `load`.

    `PIL.Image.open` is not used, because it warns about and refuses large images in its own words and by a setting of
    the whole process.

    Raises:
        ValueError: the data is not in one of these formats. Whatever a decoder raises for a damaged header.
    """
    import io

    from PIL import (  # noqa: F401  (each module registers its format when it is imported)
        AvifImagePlugin,
        BmpImagePlugin,
        GifImagePlugin,
        Image,
        Jpeg2KImagePlugin,
        JpegImagePlugin,
        PngImagePlugin,
        PpmImagePlugin,
        TiffImagePlugin,
        WebPImagePlugin,
    )

    reasons = []
    for name in formats:
        factory, accept = Image.OPEN[name]
        accepted = accept(data[:16]) if accept else False
        if isinstance(accepted, str):  # the format is known, but this Pillow was built without its decoder
            reasons.append(accepted)
        elif accepted:
            return factory(io.BytesIO(data), "")
    what = reasons[0] if reasons else f"it is not an image in a known format ({', '.join(formats)})"
    raise ValueError(what)
