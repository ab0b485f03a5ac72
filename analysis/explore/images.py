"""The records of images: all images as one list, and the codes of one of them by token."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actcache.text import visible
from analysis.explore.encoding import shorten, show_row
from analysis.explore.records import ImageCodes, ImageRecord, Images, ShotNames
from analysis.explore.sources import Sources

OWN = ("source_index", "uri", "label", "label_name", "bytes", "store", "content_hash")
"""Columns of images.parquet that `extract` writes; all others are the user's."""


def list_images(sources: Sources) -> Images:
    """The uri and label of every image, and whether it could be read."""
    images, codes = sources.concepts.images, sources.codes
    readable = np.ones(len(images), dtype=np.bool_) if codes is None else codes.valid
    return {
        "uri": [visible(uri) for uri in images["uri"].to_pylist()],
        "label": [visible(label) for label in images["label_name"].to_pylist()],
        "readable": readable.astype(int).tolist(),
    }


def name_images(sources: Sources, images: Iterable[int]) -> ShotNames:
    """The uri and label of some images."""
    table, chosen = sources.concepts.images, list(dict.fromkeys(images))
    place = pa.array(chosen, pa.int64())
    uris, labels = (table[name].take(place).to_pylist() for name in ("uri", "label_name"))
    return {str(image): [visible(uri), visible(label)] for image, uri, label in zip(chosen, uris, labels, strict=True)}


def describe_image(sources: Sources, image: int) -> ImageRecord | None:
    """The record of an image; None without codes. Raises SettingsError for an image out of range."""
    sources.check_image(image)
    codes = sources.codes
    if codes is None:
        return None
    row = sources.concepts.images.slice(image, 1).to_pylist()[0]
    entries = codes.read_rows(image * codes.n_tokens + np.arange(codes.n_tokens))
    token = entries.row - image * codes.n_tokens
    return {
        "image": image,
        "uri": visible(row["uri"]),
        "label": visible(row["label_name"]),
        "readable": int(codes.valid[image]),
        "columns": show_row({name: value for name, value in row.items() if name not in OWN}),
        **describe_codes(sources, token, entries.latent, entries.value, n_tokens=codes.n_tokens, tokens=codes.tokens),
    }


def describe_codes(
    sources: Sources, token: NDArray[np.int64], latent: NDArray[np.int64], value: NDArray[np.floating[Any]],
    *, n_tokens: int, tokens: str,
) -> ImageCodes:  # fmt: skip
    """The entries of one image by token, ascending; CLS is token 0, whether it is encoded or not.

    `maxima` are those of its latents in the whole table, by the latents' numbers, so that heat maps of several images
    can be compared without the columns of the atlas.
    """
    return {
        "n_tokens": n_tokens,
        "tokens": 1 if tokens == "patch" else 0,
        "indptr": np.searchsorted(token, np.arange(n_tokens + 1)).tolist(),
        "latent": latent.tolist(),
        "value": shorten(value.astype(np.float64)),
        "maxima": shorten(sources.maxima[np.unique(latent)]),
    }
