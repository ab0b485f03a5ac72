"""Latents of a class, of a selection of images, or of images on which given latents fire."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actcache import SettingsError
from analysis.query.where import choose_images, image_rows, images_of_class, latent_pairs, show_images
from analysis.reduce import TAU, fold_pieces
from saetrain import CodeStore


def query_firing(
    codes: CodeStore, fires: Sequence[int], silent: Sequence[int] = (), *, n_top: int = 10, where: str | None = None
) -> pa.Table:
    """Images on which all of `fires` fire and none of `silent` does: image, uri, label_name, and a peak a latent.

    Strongest first: by the weakest of its peaks. Without `fires`, in stored order.

    Raises SettingsError for a latent out of range, given twice or in both lists, no latent, or an empty selection.
    """
    named = [*fires, *silent]
    if not named or len(set(named)) != len(named):
        raise SettingsError(f"--fires and --silent must name different latents, at least one, got {named}.")
    chosen = choose_images(codes, where).copy()
    peaks = np.zeros((len(fires), codes.n_images), dtype=np.float32)
    for k, latent in enumerate(fires):
        pairs = latent_pairs(codes, latent)
        peaks[k, pairs.image] = pairs.peak
        chosen &= peaks[k] > 0
    for latent in silent:
        pairs = latent_pairs(codes, latent)
        chosen[pairs.image[pairs.peak > 0]] = False
    images = np.flatnonzero(chosen)
    weakest = peaks[:, images].min(0) if len(fires) else np.zeros(len(images))
    top = images[np.lexsort((images, -weakest))[:n_top]]
    return pa.table(show_images(codes, top) | {f"peak_{latent}": peaks[k, top] for k, latent in enumerate(fires)})


def query_class(
    codes: CodeStore, label_name: str, *, n_top: int = 10, tau: float = TAU, where: str | None = None
) -> pa.Table:
    """Strongest latents of a class; see `query_selection`. Raises SettingsError for a class without images."""
    mine = images_of_class(codes, label_name) & choose_images(codes, where)
    if not mine.any():
        raise SettingsError(f"No image of class {label_name!r} is encoded and fits --where {where!r}. Loosen it.")
    return _latents_of(codes, mine, n_top, tau)


def query_selection(codes: CodeStore, where: str, *, n_top: int = 10, tau: float = TAU) -> pa.Table:
    """Strongest latents of the images for which `where` holds, reading only their entries.

    Ordered by PatchSAE's a_c[s] (equation 5): latent, n_tokens (above tau), n_images (with such a token), image_share.

    Raises SettingsError as `choose_images`.
    """
    return _latents_of(codes, choose_images(codes, where), n_top, tau)


class _Counts(NamedTuple):
    """Sorted by latent."""

    latent: NDArray[np.int64]
    n_tokens: NDArray[np.int64]
    n_images: NDArray[np.int64]


def _latents_of(codes: CodeStore, chosen: NDArray[np.bool_], n_top: int, tau: float) -> pa.Table:
    images = np.flatnonzero(chosen)
    cuts = np.searchsorted(images, np.cumsum(codes.shard_sizes)[:-1])
    pieces = [piece for piece in np.split(images, cuts) if len(piece)]
    counts: _Counts = fold_pieces(codes, partial(_count_latents, tau=tau), _add_counts, pieces)
    order = np.lexsort((counts.latent, -counts.n_tokens))[:n_top]
    return pa.table(
        {
            "latent": counts.latent[order],
            "n_tokens": counts.n_tokens[order],
            "n_images": counts.n_images[order],
            "image_share": counts.n_images[order] / len(images),
        }
    )


def _count_latents(codes: CodeStore, images: NDArray[np.int64], *, tau: float) -> _Counts:
    found = codes.read_rows(image_rows(codes, images))
    above = found.value > np.float32(tau)
    image, latent = found.row[above] // codes.n_tokens, found.latent[above]
    pair, n_tokens = np.unique(image * codes.n_latents + latent, return_counts=True)
    return _add_counts([_Counts(pair % codes.n_latents, n_tokens, np.ones_like(n_tokens))])


def _add_counts(parts: Sequence[_Counts]) -> _Counts:
    latent, n_tokens, n_images = (np.concatenate(column) for column in zip(*parts, strict=True))
    found, group = np.unique(latent, return_inverse=True)
    n_tokens, n_images = (np.bincount(group, weights, len(found)).astype(np.int64) for weights in (n_tokens, n_images))
    return _Counts(found, n_tokens, n_images)
