"""Pixel masks beside images: which pixels, as the model saw them, carry which concept.

In: codes, the PNG masks that lie beside the images, and a legend that says what their numbers mean. Out: `PixelMasks`.
Memory: one byte per pixel of every image with a mask.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actcache import ArtifactNotFoundError, ImageFolder, ParentMismatchError, SettingsError
from actcache.artifacts import find_parent, open_artifact
from actcache.progress import Progress
from actcache.sources import ImageSource, read_table, reopen_source, resize_mask
from actcache.store import find_origin, records
from analysis.heat_maps import check_patches
from analysis.lineage import find_images, source_columns
from analysis.query import choose_images
from saetrain import CodeStore

NO_CONCEPT = (0, 255)
"""Without a legend these numbers mean background and void."""


@dataclass(frozen=True)
class PixelMasks:
    """The pixel masks of some images.

    Attributes:
        names: the C concepts.
        images: [M] stored positions, ascending.
        numbers: [M, H, W] uint8, cropped to what the model's patches cover.
        carriers: which numbers carry a concept, [M, 256, C], or [1, 256, C] if they mean the same in all images.
    """

    names: tuple[str, ...]
    images: NDArray[np.int64]
    numbers: NDArray[np.uint8]
    carriers: NDArray[np.bool_]

    def pixels(self, which: NDArray[np.int64], concept: int) -> NDArray[np.bool_]:
        """[n, H, W]: the pixels of masks `which` (0..M-1) that carry a concept."""
        carries = np.broadcast_to(self.carriers, (len(self.images), *self.carriers.shape[1:]))
        return np.stack([carries[i, :, concept][self.numbers[i]] for i in which.tolist()])

    def coverage(self, grid: tuple[int, int]) -> NDArray[np.float32]:
        """[M, P, C]: the share of each patch's pixels that carries a concept."""
        patches = self._patches(grid)
        n_patches, n_pixels = patches.shape[1:]
        shares = np.empty((len(self.images), n_patches, len(self.names)), dtype=np.float32)
        first = np.arange(n_patches)[:, None] * 256
        for i, patch in enumerate(patches):
            counts = np.bincount((patch + first).ravel(), minlength=256 * n_patches).reshape(n_patches, 256)
            shares[i] = counts @ self.carriers[i % len(self.carriers)].astype(np.float64) / n_pixels
        return shares

    def centers(self, grid: tuple[int, int]) -> NDArray[np.bool_]:
        """[M, P, C]: whether the pixel in the middle of each patch carries a concept."""
        high, wide = self.numbers.shape[1] // grid[0], self.numbers.shape[2] // grid[1]
        middle = self.numbers[:, high // 2 : high * grid[0] : high, wide // 2 : wide * grid[1] : wide]
        middle = middle.reshape(len(self.images), -1)
        carries = np.broadcast_to(self.carriers, (len(self.images), *self.carriers.shape[1:]))
        return np.asarray(carries[np.arange(len(self.images))[:, None], middle])

    def take(self, which: NDArray[np.int64]) -> "PixelMasks":
        """The masks of some of the images."""
        carriers = self.carriers if len(self.carriers) == 1 else self.carriers[which]
        return replace(self, images=self.images[which], numbers=self.numbers[which], carriers=carriers)

    def digest(self) -> str:
        """16 hex digits of the content, for the identity of what is made from these masks."""
        content = hashlib.sha256("\n".join(self.names).encode())
        for array in (self.images, self.numbers, self.carriers):
            content.update(np.ascontiguousarray(array).data)
        return content.hexdigest()[:16]

    def _patches(self, grid: tuple[int, int]) -> NDArray[np.int64]:
        """[M, P, pixels of a patch]."""
        high, wide = self.numbers.shape[1] // grid[0], self.numbers.shape[2] // grid[1]
        seen = self.numbers[:, : high * grid[0], : wide * grid[1]].reshape(-1, grid[0], high, grid[1], wide)
        return seen.transpose(0, 1, 3, 2, 4).reshape(len(seen), grid[0] * grid[1], -1).astype(np.int64)


def read_masks(
    codes: CodeStore,
    *,
    masks: str | Path | None = None,
    legend: str | Path | None = None,
    images: str | Path | None = None,
    store: str | Path | None = None,
    where: str | None = None,
    within: NDArray[np.int64] | None = None,
    on_progress: Progress | None = None,
) -> PixelMasks:
    """Read the pixel masks of all images that have one.

    Args:
        masks: the folder of the masks; by default the one that `extract --masks` recorded, or the source's own.
        legend: CSV or Parquet file that explains the numbers. It has columns `number` and `name`; or `uri` and one
            column per concept, listing the numbers that carry the concept in that image. Without a legend every number
            but 0 and 255 is a concept.
        images, store: where the images or the activation store lie, if they have moved.
        where, within: read only the images that meet a condition, or only those at these stored positions.

    Raises:
        SettingsError: no masks, a legend of another form, masks of several sizes, codes of CLS only, or one folder for
            the masks of several stores whose images share names.
        ImageSourceError: a mask that cannot be read. ParentMismatchError: another store.
    """
    check_patches(codes)
    chosen = np.flatnonzero(choose_images(codes, where))
    if within is not None:
        chosen = np.intersect1d(chosen, within)
    uris, preprocess = codes.images["uri"].take(chosen).to_pylist(), codes.preprocess
    places = find_images(codes, images=images, store=store)
    stores = places.stores[chosen]
    sources = {n: _find_source(codes, masks, places.folders[n], store, n) for n in sorted(set(stores.tolist()))}
    if masks or images:
        _check_names(uris, "--masks or --images")
    high, wide = (round(share * side) for share, side in zip(codes.covered, preprocess.size, strict=True))
    by_image: dict[int, NDArray[np.uint8]] = {}
    for done, (image, uri, n) in enumerate(zip(chosen.tolist(), uris, stores.tolist(), strict=True), start=1):
        mask = sources[n].read_mask(uri)
        if mask is not None:
            by_image[image] = resize_mask(mask, preprocess)[:high, :wide]
        if on_progress:
            on_progress(done, len(uris))
    if not by_image:
        raise SettingsError(f"None of the {len(uris):,} images has a mask. Give the folder of the masks with --masks.")
    numbers, positions = np.stack(list(by_image.values())), np.array(list(by_image))
    if legend is None:
        present = [number for number in np.unique(numbers).tolist() if number not in NO_CONCEPT]
        names, carriers = tuple(map(str, present)), _carriers_of_numbers(present)
    else:
        names, carriers = _read_legend(Path(legend), codes.images["uri"].take(positions).to_pylist())
    if not names:
        raise SettingsError(
            "The masks hold only 0 (background) and 255 (void), so they show no concept. Name these in a --legend."
        )
    return PixelMasks(names, positions, numbers, carriers)


def _find_source(
    codes: CodeStore, masks: str | Path | None, folder: Path | None, store: str | Path | None, number: int
) -> ImageSource:
    """The reader of the masks of one store's images. The images may be missing if a folder of masks is given.

    Args:
        folder: where the images are, if they could be found.
    """
    if masks is None:
        name = f"store {number + 1}" if number else "store"
        try:
            artifact = open_artifact(find_parent(codes.artifact, name, None if number else store), "acts")
        except (ArtifactNotFoundError, ParentMismatchError):
            if store is not None:
                raise
        else:
            masks = find_origin(artifact, "masks") if records(artifact, "masks") else None
    if folder is not None:
        return reopen_source(folder, source_columns(codes), masks=masks)
    if masks is None:
        raise SettingsError("Neither the masks nor the images are where they were. Give --masks, --images or --store.")
    return ImageFolder(masks, masks=masks)


def _check_names(uris: list[str], what: str) -> None:
    """Raise SettingsError for equal names: codes of several stores may hold two images of one name."""
    if len(set(uris)) < len(uris):
        raise SettingsError(
            f"Images of several stores share names, so {what} cannot tell their masks apart. "
            'Select one store with --where "store == 0".'
        )


def _carriers_of_numbers(numbers: list[int]) -> NDArray[np.bool_]:
    carriers = np.zeros((1, 256, len(numbers)), dtype=bool)
    carriers[0, numbers, np.arange(len(numbers))] = True
    return carriers


def _read_legend(path: Path, uris: list[str]) -> tuple[tuple[str, ...], NDArray[np.bool_]]:
    """(concepts, carriers). Raises SettingsError, and ImageSourceError for a file that cannot be read."""
    if path.suffix.lower() not in (".csv", ".tsv", ".parquet"):
        raise SettingsError(f"--legend must be a .csv, .tsv or .parquet file, got {path.name!r}.")
    table = read_table(path)
    names = table.column_names
    if "number" in names and "name" in names:
        numbers: list[Any] = table["number"].to_pylist()
        if not all(isinstance(number, int) and 0 <= number <= 255 for number in numbers):
            raise SettingsError(
                f"{path.name} has a number that is not an integer in 0..255. Mask files hold 8-bit numbers."
            )
        if len(set(numbers)) != len(numbers):
            raise SettingsError(f"{path.name} lists a number twice. Expected one row per number.")
        return tuple(map(str, table["name"].to_pylist())), _carriers_of_numbers(numbers)
    concepts = tuple(name for name in names if pa.types.is_list(table.schema.field(name).type))
    if "uri" not in names or not concepts:
        raise SettingsError(
            f"{path.name} is not a legend. Expected columns number and name, or uri and a list of numbers per concept; "
            f"its columns are {', '.join(names)}."
        )
    _check_names(uris, path.name)
    row_of = {uri: row for row, uri in enumerate(table["uri"].to_pylist())}
    missing = [uri for uri in uris if uri not in row_of]
    if missing:
        raise SettingsError(
            f"{path.name} has no row for {len(missing):,} images with a mask, such as {missing[0]}. "
            "Add these rows, or select other images with --where."
        )
    rows = pa.array([row_of[uri] for uri in uris])
    carriers = np.zeros((len(uris), 256, len(concepts)), dtype=bool)
    for c, name in enumerate(concepts):
        for i, listed in enumerate(table[name].take(rows).to_pylist()):
            carriers[i, listed or [], c] = True
    return concepts, carriers
