"""Pictures of images as the model saw them: small ones in packs, and one at the model's size.

A pack is a list of lengths, then the files one after the other: uint32 n, n times uint32 length (0: no picture), bytes.
"""

import struct
import threading
from collections import OrderedDict
from collections.abc import Sequence

from actcache import ImageSourceError, ParentMismatchError, SettingsError
from analysis.explore.sources import Sources
from analysis.pictures import Pictures, encode_jpeg

N_KEPT = 4096
"""Small pictures that are kept in memory: about 20 MB."""
_GONE = (SettingsError, ParentMismatchError, ImageSourceError)


class PictureShelf:
    """Pictures by image. Several threads may ask."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        codes, places = sources.codes, sources.images
        self._pictures = Pictures(codes, places) if codes is not None and places is not None else None
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def small(self, image: int) -> bytes:
        """A JPEG of at most 160 pixels in width, from the gallery or else from the image; b"" if there is none."""
        self._sources.check_image(image)
        with self._lock:
            if image in self._kept:
                self._kept.move_to_end(image)
                return self._kept[image]
            data = self._sources.concepts.thumbnail(image) or self._make(image)
            self._kept[image] = data
            if len(self._kept) > N_KEPT:
                self._kept.popitem(last=False)
            return data

    def _make(self, image: int) -> bytes:
        if self._pictures is None:
            return b""
        try:
            return self._pictures.thumbnail(image)
        except _GONE:
            return b""

    def whole(self, image: int) -> bytes:
        """A JPEG at the model's size. Raises as `Pictures.see`, and SettingsError without the images."""
        self._sources.check_image(image)
        if self._pictures is None:
            raise SettingsError(self._sources.missing["images"])
        with self._lock:
            return encode_jpeg(self._pictures.see(image))


def pack(pictures: Sequence[bytes]) -> bytes:
    """Some pictures as one file."""
    lengths = [len(picture) for picture in pictures]
    return struct.pack(f"<{1 + len(lengths)}I", len(lengths), *lengths) + b"".join(pictures)
