"""What the manifest says of a store: which images failed, and the statistics of the stored values.

In: a sealed store. Out: `StoreSummary`. Promise: manifest, settings and the table of images agree, which is checked
before memory is allocated for the sizes that a store claims.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from actcache.artifacts import MANIFEST_FILE, Artifact, read_seal, read_summary
from actcache.errors import CorruptError
from actcache.store.image_table import check_images_footer
from actcache.store.layout import KNOWN_ARRAYS
from actcache.store.settings import StoreSettings
from actcache.store.shard_files import ARRAYS

_SUMS: tuple[Literal["sum", "sum_squares"], ...] = ("sum", "sum_squares")

_SUM = {"at_least": -1e100, "at_most": 1e100}
"""The square of the largest float32, a billion times, is 1e86."""


@dataclass(frozen=True)
class RecordedStatistics:
    """ChannelStatistics, as the manifest holds them."""

    count: int = field(metadata={"at_least": 0})
    sum: tuple[float, ...] = field(metadata=_SUM)
    sum_squares: tuple[float, ...] = field(metadata=_SUM)
    absmax: float = field(metadata={"at_least": 0, "at_most": 1e40})


@dataclass(frozen=True)
class StoreSummary:
    """Image -> why it could not be read; and hook point -> kind of token -> statistics."""

    failed: Mapping[int, str]
    statistics: Mapping[str, Mapping[str, RecordedStatistics]]


def read_store_summary(artifact: Artifact, settings: StoreSettings) -> StoreSummary:
    """The summary of a sealed store. Raises CorruptError unless it fits the settings and the table of images."""
    summary, layout = read_summary(artifact, StoreSummary), settings.layout
    manifest, kinds = artifact.path / MANIFEST_FILE, layout.statistics_kinds()
    files = read_seal(artifact).get("files")
    listed = files if isinstance(files, dict) else {}
    for hook in settings.hook_points:
        there = summary.statistics.get(str(hook), {})
        lengths = {len(getattr(there[kind], name)) for kind in kinds if kind in there for name in _SUMS}
        if not set(kinds) <= there.keys() or lengths != {layout.d_model}:
            raise CorruptError(
                f"{manifest} lacks the statistics of {hook} by kind ({', '.join(kinds)}), with {layout.d_model} "
                f"channels each. {artifact.remedy}"
            )
        arrays = tuple(array for array in KNOWN_ARRAYS if f"{ARRAYS}/{hook}/{array}/zarr.json" in listed)
        if arrays != layout.arrays():
            raise CorruptError(
                f"{manifest} lists the arrays {', '.join(arrays) or 'none'} of {hook}, but with the prefix "
                f"{str(list(layout.prefix))[:80]} and {layout.n_extra} prompt tokens a store has "
                f"{', '.join(layout.arrays())}. {artifact.remedy}"
            )
    if outside := [image for image in summary.failed if image >= layout.n_images]:
        raise CorruptError(
            f"{manifest} lists image {outside[0]} as failed, but there are {layout.n_images:,} images. "
            f"{artifact.remedy}"
        )
    check_images_footer(artifact, layout.n_images)
    return summary
