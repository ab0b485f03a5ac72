"""Which images: by the columns of images.parquet, and by which latents fire on them.

In: codes and a condition. Out: a mask over the images, or a pyarrow table of images or of latents, strongest first.
"""

from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from actcache import SettingsError
from actcache.store import select_images
from analysis.reduce import Pairs, find_pairs
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


# ---------------------------------------------------------------------------------------------------------------------
# Latents of images


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


def image_rows(codes: CodeStore, images: NDArray[np.int64]) -> NDArray[np.int64]:
    """All rows of some images."""
    return (images[:, None] * codes.n_tokens + np.arange(codes.n_tokens)).ravel()
