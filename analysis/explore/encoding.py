"""How records become bytes: compact JSON, numbers with four significant digits, and shots, the images under heat maps.

Text of others (labels, uris, columns) passes through `visible`, so a page shows a mark that turns the direction of
writing instead of obeying it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from actcache.text import visible
from analysis.concepts import ConceptTable, finite
from analysis.explore.records import Shot
from saetrain import CodeStore

SIGNIFICANT = 4


def encode(record: object) -> bytes:
    """Compact, strict JSON, in ASCII, which holds any text."""
    return json.dumps(record, allow_nan=False, separators=(",", ":")).encode()


def shorten(values: NDArray[Any] | Iterable[float]) -> list[float]:
    """The values with four significant digits, whole ones without a point."""
    return [_plain(value) for value in (values.tolist() if isinstance(values, np.ndarray) else values)]


def short(value: float | None) -> float | None:
    """One value as `shorten` does it; None for one that is missing or does not exist."""
    return None if finite(value) is None else _plain(value)


def _plain(value: float | None) -> Any:
    rounded = float(f"{value:.{SIGNIFICANT}g}")
    return int(rounded) if rounded.is_integer() else rounded


def show_row(row: Mapping[str, Any]) -> dict[str, str | bool | int | float | None]:
    """The user's columns of an image, as JSON knows them."""
    return {visible(name): _show(value) for name, value in row.items()}


def _show(value: Any) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    return finite(value) if isinstance(value, float) else visible(value)[:2000]


def make_shots(
    images: Sequence[int], scores: Mapping[int, float], rows: NDArray[np.int64], values: NDArray[np.floating[Any]],
    *, n_tokens: int, has_cls: bool,
) -> list[Shot]:  # fmt: skip
    """Shots of a latent on some images, in their order.

    Args:
        scores: of the images on which it fires. rows: ascending rows of the latent's entries. values: their values.
        has_cls: whether CLS was encoded.
    """
    shots: list[Shot] = []
    for image in images:
        start, stop = np.searchsorted(rows, [image * n_tokens, (image + 1) * n_tokens])
        token, value = rows[start:stop] - image * n_tokens, values[start:stop].astype(np.float64)
        on_patch = token > 0
        cls = float(value[~on_patch].sum())
        shots.append(
            {
                "image": int(image),
                "score": _plain(scores.get(int(image), 0.0)),
                "peak": _plain(value.max(initial=0)),
                "cls": _plain(cls) if has_cls else None,
                "at": (token[on_patch] - 1).tolist(),
                "heat": shorten(value[on_patch]),
            }
        )
    return shots


def kept_shots(concepts: ConceptTable, latent: int, n: int) -> list[Shot]:
    """The top images that a table keeps: with the heat maps of the gallery, or else the strongest patch alone."""
    gallery = concepts.gallery
    kept = gallery.filter(pc.equal(gallery["latent"], latent)).to_pylist()
    heats = {line["image"]: np.array(line["heat"], dtype=np.float64) for line in kept}
    shots: list[Shot] = []
    for line in concepts.rows_of("top_images", latent).sort_by("rank").slice(0, n).to_pylist():
        heat, patch = heats.get(line["image"]), line.get("peak_patch")
        if heat is None:  # the patch is the token's number; CLS and what is not known are no patch
            peak = line.get("peak") or 0.0
            at = [patch - 1] if patch is not None and patch > 0 and peak else []
            values = np.full(len(at), peak)
        else:
            at = np.flatnonzero(heat).tolist()
            values = heat[at]
            peak = float(heat.max(initial=0))
        shots.append(
            {"image": line["image"], "score": _plain(line.get("score") or 0.0), "peak": _plain(peak), "cls": None,
             "at": at, "heat": shorten(values)}
        )  # fmt: skip
    return shots


def top_shots(concepts: ConceptTable, codes: CodeStore | None, latent: int, n: int) -> list[Shot]:
    """The top images of a latent in a table. Of the codes only these images are read; without codes: `kept_shots`."""
    if codes is None:
        return kept_shots(concepts, latent, n)
    top = concepts.rows_of("top_images", latent).sort_by("rank").slice(0, n)
    images = top["image"].to_pylist()
    rows = [np.arange(image * codes.n_tokens, (image + 1) * codes.n_tokens) for image in sorted(images)]
    entries = codes.read_rows(np.concatenate(rows)) if rows else codes.read_rows(np.empty(0, dtype=np.int64))
    mine = entries.latent == latent
    scores = dict(zip(images, top["score"].to_pylist(), strict=True)) if "score" in top.column_names else {}
    return make_shots(
        images, scores, entries.row[mine], entries.value[mine], n_tokens=codes.n_tokens, has_cls=codes.tokens != "patch"
    )
