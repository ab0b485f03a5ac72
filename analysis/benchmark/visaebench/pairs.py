"""Sums over (latent, image) pairs, from codes that are sorted by latent, and columns of chosen latents.

Memory depends on latents and classes, and on the images only through the columns that a metric asks for.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.benchmark.visaebench.images import ProtocolImages
from analysis.reduce import cut_blocks, join_columns, split_rows
from saetrain import CodeStore, LatentCodes

LEAST_ACTIVE, LARGEST_SHARE, LEAST_SPREAD = 5, 0.9, 1e-10
"""A pair has a Moran's I if it has at least so many active patches, at most this share of all, and so much spread."""


class PatchPairs(NamedTuple):
    """Latents and the images on whose patches they fire, sorted by latent, then image."""

    latent: NDArray[np.int32]
    image: NDArray[np.int64]  # stored position
    n_active: NDArray[np.int64]  # patches
    peak: NDArray[np.float32]  # largest value of a patch
    spread: NDArray[np.float64]  # sum over all patches of the squared deviation from their mean

    def localized(self, n_patches: int) -> NDArray[np.bool_]:
        """Which pairs have a Moran's I."""
        few = self.n_active <= int(LARGEST_SHARE * n_patches)
        return (self.n_active >= LEAST_ACTIVE) & few & (self.spread > LEAST_SPREAD)


class PatchEntries(NamedTuple):
    """Entries of patches, sorted by latent, then row, and the pairs that they make up."""

    latent: NDArray[np.int32]
    image: NDArray[Any]
    patch: NDArray[Any]  # 0 to P - 1
    value: NDArray[np.float16]
    start: NDArray[np.int64]  # the first entry of each pair

    def sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum over each pair of one number per entry."""
        return np.add.reduceat(values, self.start)

    def pair(self) -> NDArray[np.int64]:
        """The number of the pair of each entry."""
        return np.repeat(np.arange(len(self.start)), self.counts())

    def counts(self) -> NDArray[np.int64]:
        """The number of entries of each pair."""
        return np.diff(np.append(self.start, len(self.latent)))


def cut_patches(entries: LatentCodes, n_tokens: int) -> Iterator[PatchEntries]:
    """The entries of patches, in blocks of whole latents."""
    for block in cut_blocks(entries):
        image, token = split_rows(block.row, n_tokens)
        counts = np.diff(block.indptr)
        latent = np.repeat(np.arange(block.first, block.first + len(counts), dtype=np.int32), counts)
        value = block.value
        if not (patches := token > 0).all():
            image, token, latent, value = image[patches], token[patches], latent[patches], value[patches]
        if len(latent):
            new = np.flatnonzero((latent[1:] != latent[:-1]) | (image[1:] != image[:-1])) + 1
            yield PatchEntries(latent, image, token - token.dtype.type(1), value, np.concatenate([[0], new]))


def find_patch_pairs(entries: LatentCodes, n_tokens: int) -> PatchPairs | None:
    """The pairs of some latents; None where none of them fires on a patch."""
    parts = []
    for part in cut_patches(entries, n_tokens):
        value = part.value.astype(np.float64)
        spread = part.sums(value * value) - part.sums(value) ** 2 / (n_tokens - 1)
        # the bits of positive float16 are ordered as their values
        peak = np.maximum.reduceat(part.value.view(np.uint16), part.start).view(np.float16).astype(np.float32)
        image = part.image[part.start].astype(np.int64)
        parts.append(PatchPairs(part.latent[part.start], image, part.counts(), peak, spread))
    return join_columns(parts) if parts else None


def select_latents(entries: LatentCodes, latents: NDArray[np.int64]) -> LatentCodes:
    """The entries of some latents, ascending. The first of them has number 0 in what is returned."""
    start = entries.latent_indptr[latents]
    count = entries.latent_indptr[latents + 1] - start
    indptr = np.concatenate([[0], np.cumsum(count)])
    entry = np.repeat(start - indptr[:-1], count) + np.arange(indptr[-1])
    return LatentCodes(indptr, entries.row[entry], entries.latent_value[entry])


@dataclass(frozen=True)
class Totals:
    """Sums over the images of a protocol of c, the largest value of a latent on an image's patches.

    Attributes:
        counts: [C] images of each class. sums, squares: [C, F] of c and c^2 over these.
        largest: [F] of c over all images; smallest: [F], 0 unless the latent fires on all.
        n_localized: [F] images on which the latent has a Moran's I.
    """

    counts: NDArray[np.int64]
    sums: NDArray[np.float64]
    squares: NDArray[np.float64]
    largest: NDArray[np.float32]
    smallest: NDArray[np.float32]
    n_localized: NDArray[np.int64]

    @property
    def alive(self) -> NDArray[np.bool_]:
        return self.largest > 0


def sum_pairs(codes: CodeStore, images: ProtocolImages, classes: NDArray[np.int64], n_classes: int) -> Totals:
    """One pass over the codes.

    Args:
        classes: [N] class of each image, counted from 0; -1 leaves an image out of the sums by class only.
    """
    n_latents, n_patches = codes.n_latents, codes.n_tokens - 1
    sums, squares = np.zeros(n_classes * n_latents), np.zeros(n_classes * n_latents)
    largest, smallest = np.zeros(n_latents, np.float32), np.full(n_latents, np.inf, np.float32)
    n_fired, n_localized = np.zeros(n_latents, np.int64), np.zeros(n_latents, np.int64)
    for shard in range(codes.n_shards):
        pairs = find_patch_pairs(codes.read_by_latent(shard), codes.n_tokens)
        if pairs is None:
            continue
        place = images.place[pairs.image]
        latent, peak = pairs.latent[place >= 0], pairs.peak[place >= 0]
        localized = pairs.localized(n_patches)[place >= 0]
        place = place[place >= 0]
        np.maximum.at(largest, latent, peak)
        np.minimum.at(smallest, latent, peak)
        n_fired += np.bincount(latent, minlength=n_latents)
        n_localized += np.bincount(latent[localized], minlength=n_latents)
        of = classes[place]
        key = (of * n_latents + latent)[of >= 0]
        value = peak[of >= 0].astype(np.float64)
        np.add.at(sums, key, value)
        np.add.at(squares, key, value * value)
    smallest[n_fired < len(images)] = 0
    shape = (n_classes, n_latents)
    return Totals(
        np.bincount(classes[classes >= 0], minlength=n_classes), sums.reshape(shape), squares.reshape(shape), largest,
        smallest, n_localized,
    )  # fmt: skip


class Columns:
    """c of some latents on some images: `values` [M, k] float32, a column per latent in the order given.

    Args:
        places: the numbers of the images among those of the protocol, ascending.
    """

    def __init__(self, latents: NDArray[np.int64], places: NDArray[np.int64], n_latents: int, n_images: int) -> None:
        self.latents = latents
        self.values = np.zeros((len(places), len(latents)), np.float32)
        self._column, self._row = np.full(n_latents, -1), np.full(n_images, -1)
        self._column[latents], self._row[places] = np.arange(len(latents)), np.arange(len(places))

    def add(self, latent: NDArray[np.int64], place: NDArray[np.int64], c: NDArray[np.float32]) -> None:
        row, column = self._row[place], self._column[latent]
        wanted = (row >= 0) & (column >= 0)
        self.values[row[wanted], column[wanted]] = c[wanted]


Take = Callable[[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]], None]
"""Called with latents, numbers of images and c of pairs, sorted by latent, then image; images ascend from call to
call."""


def read_pairs(codes: CodeStore, images: ProtocolImages, takers: Sequence[tuple[NDArray[np.int64], Take]]) -> None:
    """A second pass over the codes, over some latents only.

    Args:
        takers: (the latents, what is called with their pairs; it is called with those of other takers, too).
    """
    if not takers:
        return
    wanted = np.unique(np.concatenate([latents for latents, _ in takers])).astype(np.int64)
    if not len(wanted):
        return
    for shard in range(codes.n_shards):
        pairs = find_patch_pairs(select_latents(codes.read_by_latent(shard), wanted), codes.n_tokens)
        if pairs is None:
            continue
        place = images.place[pairs.image]
        known = place >= 0
        for _, take in takers:
            take(wanted[pairs.latent[known]], place[known], pairs.peak[known])
