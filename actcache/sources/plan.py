"""plan_images(): a listing becomes the rows of images.parquet in their stored order.

A plan depends on names, sizes, seed, limit and excluded images; no pixels are read.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actcache.artifacts import digest
from actcache.errors import ImageSourceError
from actcache.options import check_number

log = logging.getLogger(__name__)

IMAGES_SCHEMA = pa.schema(
    [
        ("source_index", pa.int64()),  # position in the sorted listing
        ("uri", pa.string()),  # name of the image within its source, with /
        ("label", pa.int32()),  # class index, or -1
        ("label_name", pa.string()),  # name of the class, or ""
        ("bytes", pa.int64()),  # size of the encoded image, or -1 if unknown
    ]
)
"""The columns of every plan. `mask` (string, or "") and the user's own columns may follow."""


@dataclass(frozen=True)
class ImagePlan:
    """The images in their stored order. `rows_id` identifies both: plans with equal ids join row by row.

    Attributes:
        left_out: how many files and folders of the source were left out, by kind.
        notes: sentences that the user should read before the work begins, about columns or what is left out.
        columns: the columns `path` and `label` that the user chose, where they are not the usual choice.
    """

    table: pa.Table
    rows_id: str
    seed: int
    left_out: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def n_images(self) -> int:
        return int(self.table.num_rows)

    def rename_classes(self, texts: Mapping[str, str]) -> "ImagePlan":
        """The same images in the same order, with other names for some classes; their numbers stay."""
        names = self.table["label_name"]
        known = pc.index_in(names, value_set=pa.array(list(texts), pa.string()))
        renamed = pc.coalesce(pa.array(list(texts.values()), pa.string()).take(known.combine_chunks()), names)
        place = self.table.column_names.index("label_name")
        return replace(self, table=self.table.set_column(place, "label_name", renamed).combine_chunks())

    @property
    def classes(self) -> list[str]:
        """The sorted names of the classes."""
        return sorted(set(pc.unique(self.table["label_name"]).to_pylist()) - {""})


def announce(notes: Sequence[str]) -> None:
    """Show notes before the work begins. Names in them come from somebody else, so control characters are escaped."""
    for note in notes:
        log.warning("%s", "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in note))


def plan_images(
    listing: pa.Table,
    *,
    limit: int | None = None,
    seed: int = 0,
    exclude: Collection[str] = (),
    left_out: Mapping[str, int] | None = None,
    notes: tuple[str, ...] = (),
    columns: Mapping[str, str] | None = None,
) -> ImagePlan:
    """Put a source's images in a seeded random order (source order is often class order).

    Args:
        listing: in source order: uri, label, label_name, bytes, and any further columns, which are kept.
        limit: keep only the first `limit` images of that order, which is a random sample.
        exclude: uris to leave out, because another store has them.
        left_out, notes, columns: see `ImagePlan`.

    Raises:
        ImageSourceError: nothing is left.
        SettingsError: `limit` is below 1 or `seed` below 0.
    """
    limit = None if limit is None else check_number("limit", limit, int, at_least=1)
    seed = check_number("seed", seed, int, at_least=0)
    identity: dict[str, object] = {"seed": seed, "limit": limit}
    listing = listing.add_column(0, "source_index", pa.array(np.arange(listing.num_rows, dtype=np.int64)))
    if exclude:
        excluded = pc.is_in(listing["uri"], value_set=pa.array(exclude, pa.string()))
        elsewhere, listing = listing["uri"].filter(excluded), listing.filter(pc.invert(excluded))
        if not listing.num_rows:
            raise ImageSourceError(
                f"All {len(elsewhere):,} images are already in other stores. Nothing is left to extract."
            )
        if len(elsewhere):
            identity["exclude"] = digest(sorted(elsewhere.to_pylist()))
    identity["images"] = list(zip(listing["uri"].to_pylist(), listing["bytes"].to_pylist(), strict=True))
    order = np.random.Generator(np.random.Philox(seed)).permutation(listing.num_rows)[:limit]
    first = [listing[field.name].cast(field.type) for field in IMAGES_SCHEMA]
    names = [name for name in listing.column_names if name not in IMAGES_SCHEMA.names]
    table = pa.table([*first, *(listing[name] for name in names)], names=[*IMAGES_SCHEMA.names, *names])
    return ImagePlan(
        table.take(pa.array(order)).combine_chunks(), digest(identity), seed, left_out or {}, notes, columns or {}
    )
