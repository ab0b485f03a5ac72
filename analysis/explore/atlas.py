"""What the page loads first: facts (site.json), numbers of every latent (atlas.bin) and names (names.json)."""

import importlib.metadata
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache.artifacts import digest
from actcache.text import visible
from analysis.concepts import SHOWN_QUANTILES
from analysis.explore.sources import Sources
from analysis.naming import read_name_table, read_names, read_origins, read_own_names

SCHEMA = 1


class Column(NamedTuple):
    """How the page shows a column of the atlas."""

    name: str
    title: str
    log: bool = False
    low_is_good: bool = False

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in self._asdict().items() if name != "low_is_good" or value}


COLUMNS = (
    Column("density", "share of tokens", log=True),
    Column("image_frequency", "share of images", log=True),
    Column("mean_activation", "mean activation where it fires", log=True),
    Column("max_activation", "maximum activation", log=True),
    Column("label_entropy", "label entropy of the top images", low_is_good=True),
    Column("label_entropy_all", "label entropy of all images", low_is_good=True),
    Column("monosemanticity", "monosemanticity"),
    Column("nearest_cosine", "cosine with the nearest latent", low_is_good=True),
    Column("alignment", "alignment of the name"),
    Column("clarity", "clarity of the top images"),
    Column("stability", "cosine with the nearest latent of another run"),
    Column("top_class", "top class"),
    Column("map_x", "map"),
    Column("map_y", "map"),
)
"""All columns that the atlas may have, in their order."""


def list_classes(sources: Sources) -> tuple[list[str], NDArray[np.int64]]:
    """(the names of the classes in the order of their labels, their labels)."""
    images = sources.concepts.images
    labels, first = np.unique(np.asarray(images["label"]), return_index=True)
    first = first[labels >= 0]
    labels = labels[labels >= 0].astype(np.int64)
    names = images["label_name"].take(first).to_pylist()
    return [visible(name) or str(label) for name, label in zip(names, labels.tolist(), strict=True)], labels


def make_columns(sources: Sources, more: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    """The columns that are known, [F] float32 with NaN for unknown, in the order of COLUMNS.

    Args:
        more: columns that are computed elsewhere, such as the map.
    """
    concepts = sources.concepts
    found: dict[str, NDArray[Any]] = {
        column.name: concepts.table[column.name].to_numpy()
        for column in COLUMNS
        if column.name in concepts.table.column_names
    }
    if concepts.has("nearest_cosine.npy") and "nearest" not in concepts.left_out:
        cosines = concepts.nearest_cosines
        if cosines.shape[1]:
            found["nearest_cosine"] = cosines[:, 0]
    found |= _name_scores(sources)
    if list_classes(sources)[0]:
        found["top_class"] = _top_classes(sources)
    found |= more
    return {column.name: np.asarray(found[column.name], dtype=np.float32) for column in COLUMNS if column.name in found}


def _name_scores(sources: Sources) -> dict[str, NDArray[Any]]:
    """Alignment and clarity of the names; the method that `read_names` trusts most comes first."""
    table = read_name_table(sources.concepts)
    columns: dict[str, NDArray[Any]] = {}
    for name in ("alignment", "clarity"):
        if table is None or name not in table.column_names:
            continue
        values = np.full(sources.n_latents, np.nan)
        of_images = np.array(table["method"].to_pylist()) == "images"
        for mine in (~of_images, of_images):
            score = np.asarray(table[name].to_numpy(), dtype=np.float64)
            known = mine & np.isfinite(score)
            values[table["latent"].to_numpy()[known]] = score[known]
        if np.isfinite(values).any():
            columns[name] = values
    return columns


def _top_classes(sources: Sources) -> NDArray[np.float32]:
    """[F]: the place in `list_classes` of the class with most tokens above tau, of equal ones the first; -1: none."""
    counts = sources.concepts.class_counts
    latent, n_tokens, label = (np.asarray(counts[name].to_numpy()) for name in ("latent", "n_tokens", "label"))
    order = np.lexsort((label, latent)) if len(latent) else np.empty(0, np.int64)
    latent, n_tokens, label = latent[order], n_tokens[order], label[order]
    top = np.full(sources.n_latents, -1, dtype=np.float32)
    start = np.flatnonzero(np.diff(latent, prepend=-1))
    if not len(start):
        return top
    most = np.repeat(np.maximum.reduceat(n_tokens, start), np.diff(np.append(start, len(latent))))
    best = np.flatnonzero(n_tokens == most)
    latents, first = np.unique(latent[best], return_index=True)
    top[latents] = np.searchsorted(list_classes(sources)[1], label[best[first]])
    return top


def describe_site(
    sources: Sources, *, live: bool, block: Mapping[str, int], columns: Mapping[str, object],
    has: Mapping[str, bool], missing: Mapping[str, str],
) -> dict[str, Any]:  # fmt: skip
    """The facts that the page starts with."""
    concepts, codes = sources.concepts, sources.codes
    numbers = concepts.summary_numbers()
    settings = {} if codes is None else codes.artifact.settings
    return {
        "schema": SCHEMA,
        "live": live,
        "title": visible(f"Concepts of {concepts.source.images}"),
        "concepts_id": concepts.artifact.id,
        "codes_id": concepts.artifact.parent("codes").id,
        "run_id": None if sources.run is None else sources.run.run_id,
        "model": visible(f"{concepts.source.model} ({concepts.source.pretrained})"),
        "hook_point": visible(concepts.sae.hook_point),
        "tokens": str(settings.get("tokens", "all")),
        "variant": visible(concepts.sae.variant),
        "n_latents": sources.n_latents,
        "n_alive": numbers["n_alive"],
        "n_images": sources.n_images,
        "n_tokens": numbers["n_tokens"],
        "grid": list(concepts.grid),
        "covered": list(concepts.covered),
        "score": concepts.config.score,
        "tau": concepts.config.tau,
        "quantiles": list(SHOWN_QUANTILES),
        "block": dict(block),
        "columns": [column.to_json() for column in COLUMNS if column.name in columns],
        "classes": list_classes(sources)[0],
        "has": dict(has),
        "missing": dict(missing),
        "versions": {"patchsae": _version()},
    }


def _version() -> str:
    try:
        return importlib.metadata.version("patchsae")
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return "unknown"


def encode_columns(columns: Mapping[str, NDArray[np.float32]]) -> bytes:
    """The columns one after the other, little-endian."""
    return b"".join(values.astype("<f4").tobytes() for values in columns.values())


def describe_names(sources: Sources) -> dict[str, Any]:
    """The latents with a name or a note, and the version of what people wrote."""
    names, own = read_names(sources.concepts), read_own_names(sources.concepts)
    origins = read_origins(sources.concepts)
    latents = {
        str(latent): {
            "name": names.get(latent, ""),
            "origin": origins.get(latent, ""),
            "own": bool(own.get(latent, {}).get("name")),
            "note": own.get(latent, {}).get("note", ""),
        }
        for latent in sorted({*names, *own})
        if 0 <= latent < sources.n_latents
    }
    return {"latents": latents, "version": own_version(own)}


def own_version(own: Mapping[int, Mapping[str, str]]) -> str:
    """The version of what people wrote: equal texts have equal versions."""
    return digest({str(latent): dict(own[latent]) for latent in sorted(own)})
