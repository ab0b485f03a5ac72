"""Which images have been seen: an image is known by its content, a hash of its encoded bytes.

In: image tables (the columns `uri` and, in stores made since it exists, `content_hash`), and images that something has
learned from. Out: which images of a table are among them. Names, folders, orders and kinds of sources do not matter;
only where one side has no hash, images are known by their uri, and the answer says so.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from actcache.errors import SettingsError
from actcache.options import JudgingConfig

CONTENT_HASH = "content_hash"
"""The column of the hashes, 32 hex digits; null where an image's bytes were not hashed."""

HASH_BYTES = 16


def hash_content(data: bytes | memoryview) -> str:
    """BLAKE2b of an encoded image, 16 bytes as hex. A photo of 110 kB takes 0.1 ms, and 6 ms to decode."""
    return hashlib.blake2b(data, digest_size=HASH_BYTES).hexdigest()


def pack_hashes(hashes: Sequence[str]) -> bytes:
    """16 bytes for each hash; zeros for "", an image whose bytes were not hashed."""
    return b"".join(bytes.fromhex(text) if text else bytes(HASH_BYTES) for text in hashes)


def unpack_hashes(data: bytes) -> pa.Array:
    """What `pack_hashes` made, as a column of hex digits; zeros become null."""
    n, text = len(data) // HASH_BYTES, data.hex().encode()
    offsets = np.arange(n + 1, dtype=np.int64) * (2 * HASH_BYTES)
    column = pa.LargeStringArray.from_buffers(n, pa.py_buffer(offsets), pa.py_buffer(text)).cast(pa.string())
    known = np.frombuffer(data, np.uint8).reshape(n, HASH_BYTES).any(1)
    return column if known.all() else pc.if_else(pa.array(known), column, pa.scalar(None, pa.string()))


def hashes_of(images: pa.Table) -> Any:
    """The column of the hashes of an image table, null where there is none."""
    if CONTENT_HASH in images.column_names:
        return images[CONTENT_HASH].combine_chunks()
    return pa.nulls(images.num_rows, pa.string())


@dataclass(frozen=True)
class LearnedImages:
    """Images that something has learned from.

    Attributes:
        by: what has learned from them, for people: "run l10".
        content: hashes of those that have one.
        uris: of all of them; None where they are no longer known.
        unhashed: uris of those that have no hash.
        known: False where nobody can tell any more which images these are.
    """

    by: str
    content: pa.Array
    uris: pa.Array | None
    unhashed: pa.Array
    known: bool = True

    @classmethod
    def of(cls, by: str, images: pa.Table, rows: NDArray[np.int64] | NDArray[np.bool_]) -> "LearnedImages":
        """Rows of an image table, as positions or as a mask."""
        chosen = np.flatnonzero(rows) if rows.dtype == bool else rows
        hashes, uris = hashes_of(images).take(chosen), images["uri"].combine_chunks().take(chosen)
        return cls(by, hashes.drop_null(), uris, uris.filter(pc.is_null(hashes)))

    @classmethod
    def listed(cls, by: str, hashes: Sequence[str | None], uris: Sequence[str]) -> "LearnedImages":
        """Images one by one; None for one that was not hashed."""
        table = pa.table({"uri": pa.array(uris, pa.string()), CONTENT_HASH: pa.array(hashes, pa.string())})
        return cls.of(by, table, np.arange(len(table)))

    @classmethod
    def unknown(cls, by: str) -> "LearnedImages":
        """Something has learned from images, but which these are can no longer be told."""
        none = pa.array([], pa.string())
        return cls(by, none, None, none, known=False)

    def together(self, *others: "LearnedImages") -> "LearnedImages":
        """These images and those of the others."""
        parts = (self, *others)
        uris = [part.uris for part in parts]
        return replace(
            self,
            content=pa.concat_arrays([part.content for part in parts]),
            uris=None if None in uris else pa.concat_arrays(uris),
            unhashed=pa.concat_arrays([part.unhashed for part in parts]),
            known=all(part.known for part in parts),
        )

    def find(
        self, images: pa.Table, among: NDArray[np.bool_] | None = None, named: NDArray[np.bool_] | None = None
    ) -> "Seen":
        """Which images of a table are these.

        Args:
            among: [I], the images that matter; by default all.
            named: [I], those that may be known by name where there is no hash; by default all that matter.
        """
        among = np.ones(images.num_rows, dtype=bool) if among is None else among
        named = among if named is None else named
        hashes, uris = hashes_of(images), images["uri"].combine_chunks()
        seen = among & as_mask(pc.is_in(hashes, value_set=self.content))
        no_hash = named & as_mask(pc.is_null(hashes))
        if len(self.unhashed):
            seen |= named & as_mask(pc.is_in(uris, value_set=self.unhashed))
        if self.uris is not None:
            seen |= no_hash & as_mask(pc.is_in(uris, value_set=self.uris))
        by_uri = bool(no_hash.any()) or (len(self.unhashed) > 0 and bool(named.any()))
        unknown = (named.any() and not self.known) or (no_hash.any() and self.uris is None)
        return Seen(seen, (self.by,), "unknown" if unknown else "uri" if by_uri else "content")


CERTAINTY = ("content", "position", "uri", "unknown")
"""How it is known which images were seen, the most certain first."""


@dataclass(frozen=True)
class Seen:
    """Which images have been seen.

    Attributes:
        images: [I].
        by: what has learned from some of them.
        known_by: content; position, in a store of the same images in the same order; uri; or unknown, where it cannot
            be told of some ancestor.
    """

    images: NDArray[np.bool_]
    by: tuple[str, ...] = ()
    known_by: str = "content"

    def __or__(self, other: "Seen") -> "Seen":
        known_by = max(self.known_by, other.known_by, key=CERTAINTY.index)
        return Seen(self.images | other.images, tuple(dict.fromkeys((*self.by, *other.by))), known_by)

    def judge(
        self, candidates: NDArray[np.int64], config: JudgingConfig, what: str
    ) -> tuple[NDArray[np.int64], "SeenImages"]:
        """The images to judge, and what a result says about those that were seen.

        Args:
            candidates: positions of the images that could be judged.
            what: where they come from, for the message.

        Raises:
            SettingsError: all of them were learned from, so nothing is left to judge.
        """
        seen, by = self.images[candidates], ", ".join(self.by)
        if len(candidates) and seen.all() and not config.uses_seen:
            raise SettingsError(
                f"Nothing is left to judge: all {len(candidates):,} images of {what} were learned from ({by}). "
                "Give images that are new to it, or pass --on-seen use to judge these all the same."
            )
        counted = SeenImages(by, int(seen.sum()), len(candidates), config.uses_seen, self.known_by)
        return (candidates if config.uses_seen else candidates[~seen]), counted


@dataclass(frozen=True)
class SeenImages:
    """Images that what is judged has learned from, as results record it.

    Attributes:
        by: what has learned from images: "run l10, prompts maple.prompts".
        n: how many of the images that could be judged were learned from. of: the number of these images.
        used: whether they were judged all the same (`--on-seen use`); otherwise they were left out.
        known_by: as in `Seen`.
    """

    by: str
    n: int
    of: int
    used: bool
    known_by: str

    def lines(self) -> list[str]:
        """What the terminal says; nothing if there is nothing to say."""
        lines = []
        if self.n:
            what = "are judged although" if self.used else "are left out because"
            lines.append(f"{self.n:,} of {self.of:,} images {what} they were learned from ({self.by})")
        if self.known_by == "uri":
            lines.append(f"images were compared by name, because a store has no content hashes ({self.by})")
        if self.known_by == "unknown":
            lines.append(f"which images were learned from is not recorded ({self.by})")
        return lines


def as_mask(column: Any) -> NDArray[np.bool_]:
    return np.array(column.to_numpy(zero_copy_only=False), dtype=bool)
