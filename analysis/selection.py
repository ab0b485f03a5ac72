"""Which images: by the columns of images.parquet, and by which latents fire on them.

In: codes and a condition. Out: a mask over the images, or a pyarrow table of images or of latents, strongest first.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from actcache import SettingsError, select_images
from analysis.concepts import TAU
from analysis.join import fold_pieces
from analysis.pairs import Pairs, find_pairs
from saetrain import CodeStore, LatentCodes


def choose_images(codes: CodeStore, where: str | None, flag: str = "--where") -> NDArray[np.bool_]:
    """[I]: true for images that were encoded and for which `where` holds.

    Raises SettingsError for an expression that cannot be read, a column that is not there, or no image at all.
    """
    if where is None:
        return codes.valid
    chosen = select_images(codes.images, where, flag=flag) & codes.valid
    if not chosen.any():
        raise SettingsError(f"{flag} {where!r} holds for none of the {codes.n_images:,} images. Loosen it.")
    return chosen


def show_images(codes: CodeStore, images: NDArray[np.int64]) -> dict[str, Any]:
    """The columns that name images in an answer: image (stored position), uri, label_name."""
    return {
        "image": images,
        "uri": codes.images["uri"].take(images),
        "label_name": codes.images["label_name"].take(images),
    }


def latent_pairs(codes: CodeStore, latent: int, chosen: NDArray[np.bool_] | None = None) -> Pairs:
    """The images one latent fires on, of those chosen [I], reading only its own entries."""
    rows, values = codes.read_latent(latent)
    if chosen is not None and not chosen.all():
        keep = chosen[rows // codes.n_tokens]
        rows, values = rows[keep], values[keep]
    return find_pairs(LatentCodes(np.array([0, len(rows)]), rows.astype(np.uint64), values), codes.n_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Images by latents


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


# ---------------------------------------------------------------------------------------------------------------------
# Latents of images


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


def images_of_class(codes: CodeStore, label_name: str) -> NDArray[np.bool_]:
    """[I]. Raises SettingsError for a class that has no images, listing those that have."""
    mine = pc.equal(codes.images["label_name"], label_name).to_numpy()
    if label_name == "" or not mine.any():
        names = sorted(name for name in pc.unique(codes.images["label_name"]).to_pylist() if name)
        known = ", ".join(names[:20]) + (f" and {len(names) - 20:,} more" if len(names) > 20 else "")
        raise SettingsError(
            f"No image has class {label_name!r}. Classes: {known or 'none: the images have no labels'}."
        )
    return np.asarray(mine, dtype=bool)


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


def image_rows(codes: CodeStore, images: NDArray[np.int64]) -> NDArray[np.int64]:
    """All rows of some images."""
    return (images[:, None] * codes.n_tokens + np.arange(codes.n_tokens)).ravel()
