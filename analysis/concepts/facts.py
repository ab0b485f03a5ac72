"""What is said of single latents wherever they are shown: their classes, and what they do on each kind of token.

In: a ConceptTable; one of an older version may lack some columns. Out: typed rows, read for one latent at a time.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.concepts.table import ConceptTable

SHOWN_QUANTILES = {
    "10 %": "q10_activation", "median": "q50_activation", "90 %": "q90_activation", "99 %": "q99_activation",
}  # fmt: skip
"""The quantiles of a latent's activation, as they are titled, and their columns."""


class ClassShare(NamedTuple):
    """A class: the latent's tokens above tau in its images, their share of all such tokens, and the images with one."""

    name: str
    n_tokens: int
    share: float
    n_images: int


class Kind(NamedTuple):
    """What a latent does on one kind of token, `cls` or `patch`."""

    name: str
    density: float
    mean: float
    maximum: float


def class_shares(concepts: ConceptTable, latent: int) -> list[ClassShare]:
    """The classes on which a latent is above tau, largest share first."""
    order = [("n_tokens", "descending"), ("label", "ascending")]
    rows = concepts.rows_of("class_counts", latent).sort_by(order).to_pylist()
    total = sum(row["n_tokens"] for row in rows)
    return [
        ClassShare(row["label_name"] or str(row["label"]), row["n_tokens"], row["n_tokens"] / total, row["n_images"])
        for row in rows
    ]


def top_labels(concepts: ConceptTable, latent: int) -> Counter[str]:
    """How often each label occurs among a latent's top images."""
    labels = concepts.images["label_name"].take(concepts.rows_of("top_images", latent)["image"]).to_pylist()
    return Counter(label for label in labels if label)


def token_kinds(concepts: ConceptTable, row: Mapping[str, Any]) -> list[Kind]:
    """CLS and patches, if both were encoded. row: the latent's row of the table."""
    kinds = ("cls", "patch")
    if "cls_density" not in row or not all(kind in concepts.quality for kind in kinds):
        return []
    numbers = ("density", "mean_activation", "max_activation")
    return [Kind(kind, *(row[f"{kind}_{number}"] for number in numbers)) for kind in kinds]


def finite(value: Any) -> float | None:
    """The value, or None if it is missing or NaN."""
    return None if value is None or np.isnan(value) else value


def choose_bins(counts: NDArray[np.int64]) -> slice:
    """The bins from the first to the last that any latent of counts [n, B] uses, so that all share one axis."""
    used = np.flatnonzero(counts.any(axis=0))
    return slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, counts.shape[1])
