"""The latents of a class or of a selection of images, and the images on which given latents fire."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from actcache import SettingsError
from analysis.config import TAU
from analysis.query.question import RANKS
from analysis.query.where import choose_images, describe_images, image_rows, images_of_class, latent_pairs
from analysis.reduce import fold_pieces, join_columns
from saetrain import CodeStore


def query_firing(
    codes: CodeStore, fires: Sequence[int], silent: Sequence[int] = (), *, n_top: int = 10, where: str | None = None
) -> pa.Table:
    """Images on which all of `fires` fire and none of `silent`: image, uri, label_name, and a peak for each latent.

    Images are ordered by the weakest of their peaks, largest first; without `fires`, they are in stored order.

    Raises SettingsError for a latent that is out of range or named twice, for no latent, or for an empty selection.
    """
    latents = [*fires, *silent]
    if not latents or len(set(latents)) != len(latents):
        raise SettingsError(f"--fires and --silent must name at least one latent, and each only once, got {latents}.")
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
    return pa.table(describe_images(codes, top) | {f"peak_{latent}": peaks[k, top] for k, latent in enumerate(fires)})


def query_class(
    codes: CodeStore,
    label_name: str,
    *,
    rank: str = RANKS[0],
    n_top: int = 10,
    tau: float = TAU,
    where: str | None = None,
) -> pa.Table:
    """The latents of a class, compared with the images of all other classes.

    Args:
        rank: `distinctive` puts the largest difference of the shares of images first; `frequent` puts the latents
            first that fire on most tokens of the class, as `query_selection` does, and reads the class alone.
        where: both the class and the others are taken from these images only.

    Returns:
        latent, n_tokens, n_images, image_share (see `query_selection`), and for `distinctive` other_share (the share of
        the images of other classes), difference (image_share - other_share) and lift (image_share / other_share; null
        where the latent fires on no image of another class).

    Raises SettingsError for an unknown rank, or a class without images.
    """
    if rank not in RANKS:
        raise SettingsError(f"--rank must be {' or '.join(RANKS)}, got {rank!r}.")
    selected = choose_images(codes, where)
    chosen = images_of_class(codes, label_name) & selected
    if not chosen.any():
        raise SettingsError(
            f"--where {where!r} holds for no encoded image of class {label_name!r}. Relax the condition."
        )
    if rank == "frequent":
        return _latents_of(codes, chosen, n_top, tau)
    labeled = pc.not_equal(codes.images["label_name"], "").to_numpy()
    return _distinct_latents(codes, chosen, selected & labeled & ~chosen, n_top, tau)


def query_selection(codes: CodeStore, where: str, *, n_top: int = 10, tau: float = TAU) -> pa.Table:
    """The strongest latents of the images for which `where` holds. Only the entries of these images are read.

    Latents are ordered by PatchSAE's a_c[s] (equation 5): latent, n_tokens (above tau),
    n_images (with such a token), image_share (of the selected images).

    Raises SettingsError as `choose_images` does.
    """
    return _latents_of(codes, choose_images(codes, where), n_top, tau)


class _Counts(NamedTuple):
    """Counts of some latents, sorted by latent."""

    latent: NDArray[np.int64]
    n_tokens: NDArray[np.int64]
    n_images: NDArray[np.int64]


def _latents_of(codes: CodeStore, chosen: NDArray[np.bool_], n_top: int, tau: float) -> pa.Table:
    counts, n_images = _count(codes, chosen, tau), int(chosen.sum())
    order = np.lexsort((counts.latent, -counts.n_tokens))[:n_top]
    return pa.table(
        {
            "latent": counts.latent[order],
            "n_tokens": counts.n_tokens[order],
            "n_images": counts.n_images[order],
            "image_share": counts.n_images[order] / n_images,
        }
    )


def _distinct_latents(
    codes: CodeStore, chosen: NDArray[np.bool_], others: NDArray[np.bool_], n_top: int, tau: float
) -> pa.Table:
    counts = _count(codes, chosen, tau)
    share, other_share = counts.n_images / chosen.sum(), np.zeros(len(counts.latent))
    if others.any():
        beside = _count(codes, others, tau)
        place = np.searchsorted(beside.latent, counts.latent).clip(max=max(len(beside.latent) - 1, 0))
        if len(beside.latent):
            same = beside.latent[place] == counts.latent
            other_share[same] = beside.n_images[place[same]] / others.sum()
    order = np.lexsort((counts.latent, -counts.n_tokens, other_share - share))[:n_top]
    lift = share[order] / np.where(other_share[order] > 0, other_share[order], np.nan)
    columns = {
        "latent": counts.latent[order], "n_tokens": counts.n_tokens[order], "n_images": counts.n_images[order],
        "image_share": share[order], "other_share": other_share[order], "difference": (share - other_share)[order],
        "lift": pa.array(lift, mask=np.isnan(lift)),
    }  # fmt: skip
    return pa.table(columns)


def _count(codes: CodeStore, chosen: NDArray[np.bool_], tau: float) -> _Counts:
    """Counts of the latents that fire on some images. Only the entries of these images are read."""
    images = np.flatnonzero(chosen)
    cuts = np.searchsorted(images, np.cumsum(codes.shard_sizes)[:-1])
    pieces = [piece for piece in np.split(images, cuts) if len(piece)]
    counts: _Counts = fold_pieces(codes, partial(_count_latents, tau=tau), _add_counts, pieces)
    return counts


def _count_latents(codes: CodeStore, images: NDArray[np.int64], *, tau: float) -> _Counts:
    entries = codes.read_rows(image_rows(codes, images))
    above = entries.value > np.float32(tau)
    image, latent = entries.row[above] // codes.n_tokens, entries.latent[above]
    pair, n_tokens = np.unique(image * codes.n_latents + latent, return_counts=True)
    return _add_counts([_Counts(pair % codes.n_latents, n_tokens, np.ones_like(n_tokens))])


def _add_counts(parts: Sequence[_Counts]) -> _Counts:
    latent, n_tokens, n_images = join_columns(parts)
    latents, group = np.unique(latent, return_inverse=True)
    sums = (np.bincount(group, weights, len(latents)).astype(np.int64) for weights in (n_tokens, n_images))
    return _Counts(latents, *sums)
