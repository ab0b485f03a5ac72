"""What the page loads first: facts (site.json), numbers of every latent (atlas.bin) and names (names.json)."""

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache.artifacts import digest
from actcache.text import visible
from analysis.concepts import NAMES_FILE, NOTES, OWN_FILE, SHOWN_QUANTILES
from analysis.explore.records import AbsentRecord, ColumnRecord, NameRecord, Names, SiteRecord
from analysis.explore.sources import Sources
from analysis.naming import read_name_table, read_names, read_origins, read_own_names

SCHEMA = 1


class Column(NamedTuple):
    """How the page shows a column of the atlas."""

    name: str
    title: str
    log: bool = False
    low_is_good: bool = False

    def to_json(self) -> ColumnRecord:
        record: ColumnRecord = {"name": self.name, "title": self.title, "log": self.log}
        if self.low_is_good:
            record["low_is_good"] = True
        return record


COLUMNS = (
    Column("density", "share of tokens", log=True),
    Column("image_frequency", "share of images", log=True),
    Column("mean_activation", "mean activation where it fires", log=True),
    Column("max_activation", "maximum activation", log=True),
    Column("label_entropy", "label entropy of the top images", low_is_good=True),
    Column("label_entropy_all", "label entropy of all images", low_is_good=True),
    Column("monosemanticity", "monosemanticity"),
    Column("coherence", "spatial coherence above chance"),
    Column("nearest_cosine", "cosine with the nearest latent", low_is_good=True),
    Column("alignment", "alignment of the name"),
    Column("clarity", "clarity of the top images"),
    Column("stability", "cosine with the nearest latent of another run"),
    Column("top_class", "most frequent class of the top images"),
    Column("map_x", "map"),
    Column("map_y", "map"),
)
"""All columns that the atlas may have, in their order."""


def list_classes(sources: Sources) -> tuple[list[str], NDArray[np.int64]]:
    """(the names of the classes in the order of their labels, their labels)."""
    names, labels = sources.classes
    return [visible(name) or str(label) for name, label in zip(names, labels.tolist(), strict=True)], labels


def find_columns(sources: Sources, more: Mapping[str, NDArray[Any]]) -> dict[str, Callable[[], NDArray[Any]]]:
    """The columns that are known, in the order of COLUMNS: name -> what reads or computes the values, [F].

    Args:
        more: columns that are computed elsewhere: the map, coherence and stability.
    """
    concepts = sources.concepts
    found: dict[str, Callable[[], NDArray[Any]]] = {
        column.name: partial(_read, sources, column.name)
        for column in COLUMNS
        if column.name in concepts.table.column_names
    }
    if concepts.has("nearest_cosine.npy") and "nearest" not in concepts.left_out:
        found["nearest_cosine"] = lambda: concepts.nearest_cosines[:, 0]
    found |= {name: partial(np.asarray, values) for name, values in _name_scores(sources).items()}
    if list_classes(sources)[0]:
        found["top_class"] = lambda: sources.top_class
    found |= {name: partial(np.asarray, values) for name, values in more.items()}
    return {column.name: found[column.name] for column in COLUMNS if column.name in found}


def _read(sources: Sources, name: str) -> NDArray[Any]:
    return np.asarray(sources.concepts.table[name].to_numpy())


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


def find_absent(sources: Sources, columns: Mapping[str, object], states: Mapping[str, str]) -> list[AbsentRecord]:
    """The colors that are not there.

    Args:
        columns: those that are. states: why each column that is computed elsewhere is not there.
    """
    concepts = sources.concepts
    titles = {column.name: column.title for column in COLUMNS}
    old = "The table was made by an older version, which did not keep it."
    reasons = {
        "top_class": "The images have no labels.",
        "label_entropy": "The images have no labels.",
        "monosemanticity": "Run `analyze` again with --embeddings clip and --overwrite.",
        "nearest_cosine": concepts.left_out.get("nearest", old),
        "alignment": "No latent has a computed name. Run `name` on the table.",
        **states,
    }
    found: list[AbsentRecord] = [
        {"name": name, "title": titles[name], "why": why} for name, why in reasons.items() if name not in columns
    ]
    if "alignment" not in columns and not read_own_names(concepts):
        why = "No latent has a name. Run `name` on the table, or write one on its page."
        found.append({"name": "name", "title": "name", "why": why})
    return found


def describe_site(
    sources: Sources, *, live: bool, block: Mapping[str, int], columns: Mapping[str, object],
    has: Mapping[str, bool], missing: Mapping[str, str], absent: Sequence[AbsentRecord], making: Sequence[str],
    results: Sequence[str],
) -> SiteRecord:  # fmt: skip
    """The facts that the page starts with.

    Args:
        making: the columns that are being made, so the page asks again. results: digests of the files of results.
    """
    concepts, codes = sources.concepts, sources.codes
    numbers = concepts.summary_numbers()
    settings = {} if codes is None else codes.artifact.settings
    return {
        "schema": SCHEMA,
        "live": live,
        "title": visible(f"Concepts of {concepts.path.absolute().name.removesuffix('.concepts')}"),
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
        "absent": list(absent),
        "making": list(making),
        "classes": list_classes(sources)[0],
        "has": dict(has),
        "missing": dict(missing),
        "versions": {"patchsae": _version()},
        "results": list(results),
    }


def _version() -> str:
    try:
        return importlib.metadata.version("patchsae")
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return "unknown"


def encode_columns(columns: Mapping[str, Callable[[], NDArray[Any]]]) -> bytes:
    """The values one column after the other, float32, little-endian; NaN for unknown."""
    return b"".join(values().astype("<f4").tobytes() for values in columns.values())


def describe_names(sources: Sources) -> Names:
    """The latents with a name or a note, and the version of what people wrote."""
    notes = sources.concepts.path / NOTES
    return _describe_names(sources, tuple(_state(notes / name) for name in (NAMES_FILE, OWN_FILE)))


@lru_cache(maxsize=1)
def _describe_names(sources: Sources, states: tuple[object, ...]) -> Names:
    """`states`: of the files that are read; names of 49,152 latents take a third of a second."""
    concepts = sources.concepts
    names, own, origins = read_names(concepts), read_own_names(concepts), read_origins(concepts)
    latents: dict[str, NameRecord] = {}
    for latent in sorted({*names, *own}):
        if 0 <= latent < sources.n_latents:
            mine = own.get(latent, {})
            record = latents[str(latent)] = NameRecord()
            if name := names.get(latent):
                record["name"] = name
            if origin := origins.get(latent):
                record["origin"] = origin
            if note := mine.get("note"):
                record["note"] = note
            if mine.get("name"):
                record["own"] = True
    return {"latents": latents, "version": own_version(own)}


def _state(file: Path) -> tuple[int, ...] | None:
    """What changes when a file is replaced; None if there is none."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def own_version(own: Mapping[int, Mapping[str, str]]) -> str:
    """The version of what people wrote: equal texts have equal versions."""
    return digest({str(latent): dict(own[latent]) for latent in sorted(own)})
