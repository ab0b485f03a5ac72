"""The names of latents, in a concept table's folder but not sealed; names that people give have a file of their own.

    notes/names.parquet   latent, method, name, scores (analysis/naming/naming.py); metadata `naming`: the settings
    notes/own.json        {"907": {"name": "red stripes", "note": "..."}}

Computing names again replaces names.parquet only. What a person wrote is changed by `set_name` alone.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from actcache import CorruptError, SettingsError
from actcache.artifacts import check_parent, open_artifact, read_json, write_atomic, write_json
from actcache.options import check_number
from analysis.concepts import ConceptTable
from saetrain import CodeStore

NOTES = "notes"
NAMES_FILE = "names.parquet"
OWN_FILE = "own.json"
METHODS = ("images", "lens")
"""The most trusted method first: before the last block, a direction that looks like a word need not act like it."""


def read_names(concepts: ConceptTable | str | Path) -> dict[int, str]:
    """The name of each latent: the one a person gave, else that of its top images, else that of its direction."""
    path = _path(concepts)
    names: dict[int, str] = {}
    table = read_name_table(path)
    if table is not None:
        rank = {method: i for i, method in enumerate(METHODS)}
        rows = zip(*(table[column].to_pylist() for column in ("method", "latent", "name")), strict=True)
        ordered = sorted(rows, key=lambda row: -rank.get(row[0], len(METHODS)))
        names = {latent: name for _, latent, name in ordered}  # the most trusted comes last and stays
    return names | {latent: own["name"] for latent, own in read_own_names(path).items() if own.get("name")}


def add_names(table: pa.Table, codes: CodeStore, concepts: ConceptTable | str | Path) -> pa.Table:
    """Add a column `name` after the column `latent` of an answer; a latent without a name gets "".

    A table without latents is returned unchanged. Raises ParentMismatchError if the concepts are of other codes.
    """
    check_parent(open_artifact(_path(concepts), "concepts"), "codes", codes.artifact)
    if "latent" not in table.column_names:
        return table
    names = read_names(concepts)
    column = pa.array([names.get(latent, "") for latent in table["latent"].to_pylist()], pa.string())
    return table.add_column(table.column_names.index("latent") + 1, "name", column)


def read_name_table(concepts: ConceptTable | str | Path) -> pa.Table | None:
    """The content of names.parquet, or None if no names were computed. Raises CorruptError."""
    file = _path(concepts) / NOTES / NAMES_FILE
    if not file.is_file():
        return None
    try:
        return pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise CorruptError(f"{file} cannot be read ({str(error).splitlines()[0]}). Run `name` again.") from error


def write_name_table(concepts: ConceptTable, table: pa.Table, facts: Mapping[str, str]) -> None:
    """Replace names.parquet. facts: how the names were made, which the table keeps as metadata."""
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"naming": json.dumps(facts)}), sink)
    (concepts.path / NOTES).mkdir(exist_ok=True)
    write_atomic(concepts.path / NOTES / NAMES_FILE, sink.getvalue().to_pybytes())


def read_own_names(concepts: ConceptTable | str | Path) -> dict[int, dict[str, str]]:
    """What people wrote: latent -> {"name": ..., "note": ...}, each if there is one. Raises CorruptError."""
    file = _path(concepts) / NOTES / OWN_FILE
    if not file.is_file():
        return {}
    advice = "Repair it by hand, because these names are stored nowhere else."
    content = read_json(file, advice)
    try:
        return {int(latent): {str(key): str(text) for key, text in own.items()} for latent, own in content.items()}
    except (AttributeError, ValueError) as error:
        raise CorruptError(f"{file} is malformed ({error}). {advice}") from error


def set_name(concepts: ConceptTable, latent: int, *, name: str | None = None, note: str | None = None) -> None:
    """Write a person's name for a latent, or a note on it. "" removes what was there; None leaves it unchanged.

    Raises SettingsError for a latent out of range, or a text of more than one line.
    """
    n_latents, latent = concepts.table.num_rows, check_number("latent", latent, int)
    if not 0 <= latent < n_latents:
        raise SettingsError(f"A latent must lie in 0..{n_latents - 1}, got {latent}.")
    own = read_own_names(concepts)
    entry = own.get(latent, {})
    for key, text in (("name", name), ("note", note)):
        if text is None:
            continue
        if "\n" in text:
            raise SettingsError(f"A {key} must be one line, got {text!r}.")
        entry[key] = text.strip()
    kept = {key: text for key, text in entry.items() if text}
    own = {**own, latent: kept}
    (concepts.path / NOTES).mkdir(exist_ok=True)
    write_json(concepts.path / NOTES / OWN_FILE, {str(n): own[n] for n in sorted(own) if own[n]})


def _path(concepts: ConceptTable | str | Path) -> Path:
    return concepts.path if isinstance(concepts, ConceptTable) else open_artifact(concepts, "concepts").path
