"""What lies beside the seal: names and notes of people, and places of this machine. They carry their own checksums.

A JSON file has the digest of its other fields as `digest`, and a Parquet file that of its columns in its metadata, so
neither can be out of step with its checksum when a writer is killed. Files without one were written by an older
version or by a person; they must be readable.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from actcache.artifacts import (
    PLACES_FILE,
    Artifact,
    crc32c,
    digest,
    encode_json,
    is_remote,
    open_plain,
    read_json,
    read_signed,
)
from actcache.errors import CorruptError
from actcache.store.image_table import table_errors

NOTES, OWN_NAMES = "notes", "notes/own.json"
DIGEST = b"digest"
"""Key of a table's own digest in its metadata."""

_REMEDIES: Mapping[str, str] = {
    PLACES_FILE: "delete it: parents are then looked for by their relative paths",
    f"{NOTES}/names.parquet": "run `patchsae name` again",
    OWN_NAMES: "repair it by hand, because these names are stored nowhere else, and remove its field digest",
}


@dataclass(frozen=True)
class Problem:
    """A file that differs from what was written. `shard`: the shard it belongs to, or None."""

    file: str
    what: str
    shard: int | None = None

    def __str__(self) -> str:
        """One line, whatever characters the file name contains."""
        text = f"{self.file}: {self.what}"
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def sign_table(table: pa.Table) -> pa.Table:
    """The table with the digest of its columns in its metadata."""
    return table.replace_schema_metadata({**(table.schema.metadata or {}), DIGEST: _digest_columns(table)})


def read_signed_table(path: Path, advice: str) -> pa.Table:
    """A Parquet file, compared with the digest in its metadata if it has one. Raises CorruptError."""
    with table_errors(path, advice), open_plain(path) as file:
        table = pq.ParquetFile(file, pre_buffer=False).read(use_threads=False)
        recorded = (table.schema.metadata or {}).get(DIGEST)
        if recorded is not None and recorded.decode() != _digest_columns(table):
            raise ValueError("its columns differ from what was written")
    return table


def _digest_columns(table: pa.Table) -> str:
    """Hash of names, types and values: of the texts of a column joined by zero bytes, or of its numbers as bytes."""
    columns = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            data = "\0".join("" if text is None else text for text in column.to_pylist()).encode()
        else:
            data = column.to_numpy(zero_copy_only=False).tobytes()
        columns[name] = [str(column.type), len(column), crc32c(data)]
    return digest({"metadata": _other_metadata(table), "columns": columns})


def _other_metadata(table: pa.Table) -> dict[str, str]:
    metadata = table.schema.metadata or {}
    return {
        key.decode(errors="replace"): value.decode(errors="replace") for key, value in metadata.items() if key != DIGEST
    }


def check_beside(path: Path) -> tuple[list[Problem], int, int]:
    """(problems, number of files, bytes) of what lies beside an artifact's seal."""
    if is_remote(path):
        return [], 0, 0
    names = [PLACES_FILE, *(f"{NOTES}/{file.name}" for file in sorted((path / NOTES).glob("*")))]
    problems, n_files, n_bytes = [], 0, 0
    for name in names:
        file = path / name
        if not file.is_symlink() and not file.is_file():
            continue
        n_files, n_bytes = n_files + 1, n_bytes + file.lstat().st_size
        try:
            if name.endswith(".parquet"):
                read_signed_table(file, "")
            elif name.endswith(".json"):
                content = read_json(file, "")
                if name == OWN_NAMES and (
                    strange := [key for key in content if key != "digest" and not key.isdecimal()]
                ):
                    raise CorruptError(f"{file} names {strange[0][:40]!r}, expected numbers of latents.")
                if (isinstance(content, dict) and "digest" in content) or name == PLACES_FILE:
                    read_signed(file, "")
                    problems += check_spelling(path, name, None)
        except CorruptError as error:
            problems.append(Problem(name, str(error).removeprefix(f"{file} ").strip()))
    return problems, n_files, n_bytes


def check_spelling(path: Path, name: str, shard: int | None) -> list[Problem]:
    """Find changed bytes that do not change a JSON file's meaning, such as a space; its digest covers the meaning."""
    try:
        with open_plain(path / name) as file:
            data = file.read()
        value = json.loads(data)
        same = not isinstance(value, dict) or encode_json(value) == data
    except (OSError, ValueError, RecursionError):
        return []  # the reader reports it
    return [] if same else [Problem(name, "differs from what was written", shard)]


def remedies(artifact: Artifact, problems: Sequence[Problem]) -> tuple[str, ...]:
    """How the damaged files are made again, each way once: which verb writes which file."""
    command = artifact.remedy.replace("`", "`patchsae ", 1)
    ways = [_REMEDIES.get(problem.file, command) for problem in problems]
    return tuple(dict.fromkeys(way[0].lower() + way[1:].rstrip(".") for way in ways))
