"""The latents of one image, of a region of it, or of two images that are compared."""

import os
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from actcache import SettingsError
from analysis.heat_maps import check_patches
from analysis.query.places import At, choose_patches
from analysis.query.where import image_rows
from analysis.reduce import tokens_per_image
from saetrain import CodeStore


def query_image(codes: CodeStore, image: int | str, *, at: At | None = None, n_top: int = 10) -> pa.Table:
    """The strongest latents of an image, a patch or a region: latent, score (mean over these tokens), peak, n_tokens.

    Args:
        image: stored position, uri, or path of the image file; see `find_image`.
        at: (row, column) of a patch, or a slice of each for a region; all tokens if None.

    Raises SettingsError for an unknown image, or a patch outside the grid.
    """
    position = find_image(codes, image)
    rows = image_rows(codes, np.array([position])) if at is None else position * codes.n_tokens + find_tokens(codes, at)
    entries = codes.read_rows(rows)
    sums = sum_latents(entries.latent, entries.value)
    n_tokens = tokens_per_image(codes) if at is None else len(rows)
    order = np.lexsort((sums.latent, -sums.total))[:n_top]
    return pa.table(
        {
            "latent": sums.latent[order],
            "score": sums.total[order] / n_tokens,
            "peak": sums.peak[order],
            "n_tokens": sums.n_tokens[order],
        }
    )


def query_images(codes: CodeStore, image: int | str, other: int | str, *, n_top: int = 10) -> pa.Table:
    """The shared and exclusive latents of two images (PatchSAE's covariate shift): latent, kind, score_1, score_2.

    The `n_top` strongest latents of each are compared; a score is the mean over the image's tokens. `kind` is
    `shared`, `only 1` or `only 2`; an exclusive latent may still fire on the other image, but too weakly to be among
    its strongest.

    Raises SettingsError for an unknown image, or for the same image twice.
    """
    positions = [find_image(codes, image), find_image(codes, other)]
    if positions[0] == positions[1]:
        raise SettingsError(f"--image names image {positions[0]} twice. Name two different images.")
    scores = np.zeros((2, codes.n_latents))
    for k, position in enumerate(positions):
        entries = codes.read_rows(image_rows(codes, np.array([position])))
        sums = sum_latents(entries.latent, entries.value)
        scores[k, sums.latent] = sums.total / tokens_per_image(codes)
    inside = np.zeros((2, codes.n_latents), dtype=bool)
    for k in range(2):
        strongest = np.argsort(-scores[k], kind="stable")[:n_top]
        inside[k, strongest[scores[k, strongest] > 0]] = True
    kinds = [("shared", inside[0] & inside[1]), ("only 1", inside[0] & ~inside[1]), ("only 2", inside[1] & ~inside[0])]
    parts = []
    for kind, in_kind in kinds:
        latents = np.flatnonzero(in_kind)
        latents = latents[np.lexsort((latents, -scores[:, latents].sum(0)))]
        columns = {"latent": latents, "kind": pa.array([kind] * len(latents), pa.string())}
        parts.append(pa.table(columns | {"score_1": scores[0, latents], "score_2": scores[1, latents]}))
    return pa.concat_tables(parts)


class LatentSums(NamedTuple):
    """What each latent does on some tokens, by latent, ascending."""

    latent: NDArray[np.int64]
    total: NDArray[np.float64]
    peak: NDArray[np.float64]
    n_tokens: NDArray[np.int64]


def sum_latents(latents: NDArray[np.integer[Any]], values: NDArray[np.floating[Any]]) -> LatentSums:
    """What each latent does on the tokens of some entries [nnz]."""
    latent, group = np.unique(latents, return_inverse=True)
    value = values.astype(np.float64)
    peak = np.zeros(len(latent))
    np.maximum.at(peak, group, value)
    return LatentSums(
        latent,
        np.bincount(group, value, len(latent)).astype(np.float64),
        peak,
        np.bincount(group, minlength=len(latent)),
    )


def find_image(codes: CodeStore, image: int | str) -> int:
    """The stored position of an image that is given by position, by uri, or by the path of its file.

    A path names the image whose uri it ends with, by whole folders: photos/cat/1.png ends with cat/1.png. The end of a
    uri will do if only one image has it.

    Raises SettingsError if it is none of these, or if several images end so.
    """
    text, uris = str(image), codes.images["uri"]
    position = pc.index(uris, text).as_py()
    if position >= 0:
        return int(position)
    if text.isascii() and text.isdigit() and int(text) < codes.n_images:
        return int(text)
    parts = os.path.normpath(text).split(os.sep)
    for length in range(len(parts), 0, -1):  # the longest end of the path that is a uri
        position = pc.index(uris, "/".join(parts[-length:])).as_py()
        if position >= 0:
            return int(position)
    same = np.flatnonzero(pc.ends_with(uris, "/" + "/".join(parts)).to_numpy(zero_copy_only=False))
    if len(same) == 1:
        return int(same[0])
    if len(same):
        some = ", ".join(uris[i].as_py() for i in same[:3].tolist())
        raise SettingsError(f"--image {text} is the end of {len(same):,} uris ({some}). Give more of its path.")
    raise SettingsError(
        f"--image {text} is neither a position in 0..{codes.n_images - 1} nor the uri or path of a stored image "
        f"(e.g. {uris[0].as_py()})."
    )


def find_tokens(codes: CodeStore, at: At) -> NDArray[np.int64]:
    """The tokens of a patch or a region, ascending. Raises SettingsError outside the grid, or for an empty region."""
    check_patches(codes)
    rows, columns = (np.array(axis) for axis in choose_patches(codes.grid, at))
    return np.asarray(1 + rows[:, None] * codes.grid[1] + columns).ravel()
