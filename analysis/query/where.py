"""Which images a question is about: chosen by the columns of images.parquet, by class, or by a latent.

In: codes and a condition. Out: [I] booleans over the images, rows, or pairs.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from actcache import SettingsError
from actcache.store import select_images
from analysis.reduce import Pairs, find_pairs
from saetrain import CodeStore, LatentCodes


def choose_images(codes: CodeStore, where: str | None, flag: str = "--where") -> NDArray[np.bool_]:
    """[I]: true for images that were encoded and for which `where` holds.

    Raises SettingsError for an expression that cannot be parsed, an unknown column, or a condition that no image meets.
    """
    if where is None:
        return codes.valid
    chosen = select_images(codes.images, where, flag=flag) & codes.valid
    if not chosen.any():
        raise SettingsError(f"{flag} {where!r} holds for none of the {codes.n_images:,} images. Relax the condition.")
    return chosen


def describe_images(codes: CodeStore, images: NDArray[np.int64]) -> dict[str, NDArray[np.int64] | pa.ChunkedArray]:
    """The columns that describe images in an answer: image (stored position), uri, label_name."""
    return {
        "image": images,
        "uri": codes.images["uri"].take(images),
        "label_name": codes.images["label_name"].take(images),
    }


def latent_pairs(codes: CodeStore, latent: int, chosen: NDArray[np.bool_] | None = None) -> Pairs:
    """The chosen images [I] on which one latent fires. Only the latent's own entries are read."""
    rows, values = codes.read_latent(latent)
    if chosen is not None and not chosen.all():
        keep = chosen[rows // codes.n_tokens]
        rows, values = rows[keep], values[keep]
    return find_pairs(LatentCodes(np.array([0, len(rows)]), rows.astype(np.uint64), values), codes.n_tokens)


def images_of_class(codes: CodeStore, label_name: str) -> NDArray[np.bool_]:
    """[I]: true for images of the class. Raises SettingsError, which lists the classes, if there are none."""
    in_class = pc.equal(codes.images["label_name"], label_name).to_numpy()
    if label_name == "" or not in_class.any():
        names = sorted(name for name in pc.unique(codes.images["label_name"]).to_pylist() if name)
        known = ", ".join(names[:20]) + (f" and {len(names) - 20:,} more" if len(names) > 20 else "")
        raise SettingsError(
            f"No image has class {label_name!r}. Classes: {known or 'none: the images have no labels'}."
        )
    return np.asarray(in_class, dtype=bool)


def image_rows(codes: CodeStore, images: NDArray[np.int64]) -> NDArray[np.int64]:
    """All rows of some images."""
    return (images[:, None] * codes.n_tokens + np.arange(codes.n_tokens)).ravel()
