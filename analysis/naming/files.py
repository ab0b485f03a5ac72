"""The names of latents, in a concept table's folder but not sealed; names that people give have a file of their own.

    notes/names.parquet   latent, method, name, scores (analysis/naming/naming.py); metadata `naming`: the settings
    notes/own.json        {"907": {"name": "red stripes", "note": "..."}}

Computing names again replaces names.parquet only. What a person wrote is changed by `set_name` alone.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from actcache import PipelineError, SettingsError
from actcache.artifacts import (
    OutputLock,
    check_parent,
    digest,
    encode_table,
    make_folders,
    open_artifact,
    read_json,
    read_signed,
    remove_remnants,
    storage_errors,
    write_atomic,
    write_json,
)
from actcache.options import check_number
from actcache.schema import parse
from actcache.store import read_signed_table, sign_table, table_errors
from analysis.concepts import NAMES_FILE, NOTES, OWN_FILE, ConceptTable, find_codes
from saetrain import CodeStore, Run

WAIT_S = 10
_COLUMNS = {"latent": pa.int64(), "method": pa.string(), "name": pa.string()}
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


def read_origins(concepts: ConceptTable | str | Path) -> dict[int, str]:
    """Where the name of each latent comes from, in words; of a computed one also its alignment."""
    table, own = read_name_table(concepts), read_own_names(concepts)
    rows = [] if table is None else table.to_pylist()
    words = {"images": "from its top images", "lens": "from its direction"}
    origins = {
        row["latent"]: f"{words.get(row['method'], row['method'])}, alignment {row['alignment']:.2f}"
        for method in reversed(METHODS)
        for row in rows
        if row["method"] == method
    }
    return origins | {latent: "by hand" for latent, entry in own.items() if entry.get("name")}


def find_names(codes: CodeStore, concepts: ConceptTable | str | Path | None = None) -> dict[int, str]:
    """The names of the latents of codes: those of a concept table, by default of all tables that lie beside the codes.

    Names of people come before computed ones, whichever table they are in. A table beside the codes that was made from
    other codes, or cannot be read, gives none.

    Raises ParentMismatchError if the given concepts are of other codes.
    """
    if concepts is not None:
        check_parent(open_artifact(_path(concepts), "concepts"), "codes", codes.artifact)
        return read_names(concepts)
    computed: dict[int, str] = {}
    own: dict[int, str] = {}
    for path in sorted({*codes.path.absolute().parent.glob("*.concepts")}):
        try:
            check_parent(open_artifact(path, "concepts"), "codes", codes.artifact)
            computed |= read_names(path)
            own |= {latent: entry["name"] for latent, entry in read_own_names(path).items() if entry.get("name")}
        except PipelineError:
            continue
    return computed | own


def find_names_of(run: Run | None, concepts: ConceptTable | str | Path | None = None) -> dict[int, str]:
    """The names of the latents of a run: those of a concept table, by default of the tables that lie near the run.

    A table near the run counts if the codes that it was made from are there, and the run made them.

    Args:
        run: None for an SAE that is no run, whose latents have no names.

    Raises ParentMismatchError if the given concepts are of another run, SettingsError if there is no run.
    """
    if concepts is not None:
        if run is None:
            raise SettingsError("--concepts gives the names of a run's latents, and this SAE is no run. Leave it out.")
        codes = find_codes(concepts if isinstance(concepts, ConceptTable) else ConceptTable.open(concepts))
        if codes is None:
            raise SettingsError(f"The codes that {_path(concepts)} was made from are not there. Move them back.")
        check_parent(codes.artifact, "run", run.artifact)
        return read_names(concepts)
    names: dict[int, str] = {}
    folder = run.path.absolute().parent if run is not None else None
    for path in sorted({*folder.glob("*.concepts"), *folder.parent.glob("*.concepts")}) if folder else ():
        try:
            codes = find_codes(ConceptTable.open(path))
            if codes is not None and run is not None and codes.artifact.parent("run").id == run.run_id:
                names |= find_names(codes, path)
        except PipelineError:
            continue
    return names


def add_names(
    table: pa.Table, codes: CodeStore, concepts: ConceptTable | str | Path | Mapping[int, str] | None = None
) -> pa.Table:
    """Add a column `name` after the column `latent` of an answer, and `partner_name` after `partner`.

    A latent without a name gets "". A table without latents is returned unchanged, and so is every table if no
    concepts were given and there are no names beside the codes.

    Args:
        concepts: the table that holds the names, or what `find_names` returned; see there for None.

    Raises ParentMismatchError if the concepts are of other codes.
    """
    names = concepts if isinstance(concepts, Mapping) else find_names(codes, concepts)
    if not names and (concepts is None or isinstance(concepts, Mapping)):
        return table
    for column, new in (("latent", "name"), ("partner", "partner_name")):
        if column in table.column_names:
            texts = pa.array([names.get(latent, "") for latent in table[column].to_pylist()], pa.string())
            table = table.add_column(table.column_names.index(column) + 1, new, texts)
    return table


def read_name_table(concepts: ConceptTable | str | Path) -> pa.Table | None:
    """The content of names.parquet, or None if no names were computed. Raises CorruptError."""
    file = _path(concepts) / NOTES / NAMES_FILE
    if not file.is_file():
        return None
    table = read_signed_table(file, "Run `name` again.")
    with table_errors(file, "Run `name` again."):
        for column, kind in _COLUMNS.items():
            if column not in table.column_names or table[column].null_count:
                raise ValueError(f"it has no column {column}, or nulls in it")
            table[column].cast(kind)
    return table


def write_name_table(concepts: ConceptTable, table: pa.Table, facts: Mapping[str, str]) -> None:
    """Replace names.parquet. facts: how the names were made, which the table keeps as metadata."""
    write_beside_seal(concepts, NAMES_FILE, table.replace_schema_metadata({"naming": json.dumps(facts)}))


def write_beside_seal(concepts: ConceptTable, name: str, table: pa.Table) -> None:
    """Write a table into the folder of notes, with a digest of its columns. A file there is replaced."""
    data = encode_table(sign_table(table))
    with _lock_notes(concepts):
        write_atomic(concepts.path / NOTES / name, data)


@contextmanager
def _lock_notes(concepts: ConceptTable) -> Iterator[None]:
    """Let one process at a time change the notes, each of which takes milliseconds."""
    remove_remnants(concepts.path)
    with OutputLock(concepts.path) as lock:
        lock.acquire(WAIT_S)
        with storage_errors(concepts.path):
            make_folders(concepts.path / NOTES, within=concepts.path)
        yield


@dataclass(frozen=True)
class _OwnNames:
    """Latent -> what a person wrote on it."""

    names: Mapping[int, Mapping[str, str]]


def read_own_names(concepts: ConceptTable | str | Path) -> dict[int, dict[str, str]]:
    """What people wrote: latent -> {"name": ..., "note": ...}, each if there is one. Raises CorruptError."""
    file = _path(concepts) / NOTES / OWN_FILE
    if not file.is_file():
        return {}
    advice = "Repair it by hand, because these names are stored nowhere else, and remove its field digest."
    content = read_json(file, advice)
    if isinstance(content, dict) and "digest" in content:  # absent where an older version or a person wrote it
        content = read_signed(file, advice)
    own = parse(_OwnNames, {"names": content}, file, advice)
    return {latent: dict(texts) for latent, texts in own.names.items()}


def set_name(concepts: ConceptTable, latent: int, *, name: str | None = None, note: str | None = None) -> None:
    """Write a person's name for a latent, or a note on it. "" removes what was there; None leaves it unchanged.

    Raises SettingsError for a latent out of range, or a text of more than one line.
    """
    change_own(concepts, latent, name=name, note=note)


def change_own(
    concepts: ConceptTable, latent: int, *, name: str | None = None, note: str | None = None,
    before: Mapping[str, str] | None = None,
) -> bool:  # fmt: skip
    """What `set_name` does, unless somebody else has changed the latent's texts in between.

    Args:
        before: the texts that the caller knows; None writes in any case.

    Returns:
        False, and nothing is written, where the latent has other texts than these.
    """
    n_latents, latent = concepts.table.num_rows, check_number("latent", latent, int)
    if not 0 <= latent < n_latents:
        raise SettingsError(f"A latent must lie in 0..{n_latents - 1}, got {latent}.")
    given = {key: text.strip() for key, text in (("name", name), ("note", note)) if text is not None}
    for key, text in given.items():
        if "\n" in text:
            raise SettingsError(f"A {key} must be one line, got {text!r}.")
    with _lock_notes(concepts):
        own = read_own_names(concepts)
        if before is not None and own.get(latent, {}) != before:
            return False
        own[latent] = {key: text for key, text in {**own.get(latent, {}), **given}.items() if text}
        content = {str(n): own[n] for n in sorted(own) if own[n]}
        write_json(concepts.path / NOTES / OWN_FILE, {**content, "digest": digest(content)})
    return True


def _path(concepts: ConceptTable | str | Path) -> Path:
    return concepts.path if isinstance(concepts, ConceptTable) else open_artifact(concepts, "concepts").path
