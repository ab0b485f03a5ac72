"""The root of a repository of SAEs: README.md with a row for each, and manifest.jsonl with the sha256 of each file.

In: what the repository has of both, which anybody may have written, and the files of one more SAE. Out: the new text of
both. Rows of other SAEs stay. What people wrote around the table stays, too, and front matter that they changed.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import quote

from actcache import CorruptError, SettingsError
from actcache.schema import parse
from analysis.publication.card import NO_LICENSE, front_matter, name_tower
from analysis.publication.markdown import code, draw_rows, escape
from saetrain.interop import PublishedSAE

README, MANIFEST = "README.md", "manifest.jsonl"
BEGIN, END = "<!-- patchsae: table begins -->", "<!-- patchsae: table ends -->"
MAX_BYTES = 1 << 24
"""Largest README or manifest that is read; a line of a manifest takes 200 bytes."""


@dataclass(frozen=True)
class Row:
    """What the table says of an SAE."""

    run_id: str
    hook_point: str
    tower: str
    variant: str
    n_latents: int
    l0: float | None = None
    fvu: float | None = None
    license: str | None = None
    base_model: str | None = None
    saelens: bool = True

    @classmethod
    def of(cls, published: PublishedSAE, base_model: str | None, holds_saelens: bool) -> "Row":
        quality = published.quality.get(published.training.tokens)
        fvu, l0 = (quality["fvu"], quality["l0"]) if quality else (None, None)
        return cls(
            published.run_id, published.hook_point, name_tower(published.tower), published.sae.variant,
            published.sae.n_latents, l0, fvu, published.license, base_model, holds_saelens,
        )  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A line of manifest.jsonl: a file, by its path in the repository. The line of an SAE's config.json has its row."""

    path: str
    bytes: int = field(metadata={"at_least": 0})
    sha256: str
    sae: Row | None = None

    @property
    def folder(self) -> str:
        return self.path.rpartition("/")[0]


def parse_manifest(data: bytes, where: str) -> dict[str, Entry]:
    """Path -> entry. Raises CorruptError for a line that is not one of ours."""
    advice = "Repair the line, or remove the file from the repository; its folders stay as they are."
    entries = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CorruptError(f"{where}, line {number}, is not JSON. {advice}") from error
        entry: Entry = parse(Entry, value, f"{where}, line {number},", advice)
        entries[entry.path] = entry
    return entries


def merge(entries: Mapping[str, Entry], folder: str, files: Iterable[Entry]) -> dict[str, Entry]:
    """The entries with those of one SAE's folder in place of what it had."""
    kept = {path: entry for path, entry in entries.items() if not path.startswith(f"{folder}/")}
    return dict(sorted({**kept, **{entry.path: entry for entry in files}}.items()))


def encode_manifest(entries: Mapping[str, Entry]) -> bytes:
    return b"".join(json.dumps(_without_none(asdict(entry))).encode() + b"\n" for entry in entries.values())


def _without_none(fields: Mapping[str, Any]) -> dict[str, object]:
    return {
        name: _without_none(value) if isinstance(value, dict) else value
        for name, value in fields.items()
        if value is not None
    }


def write_readme(existing: str | None, before: Mapping[str, Entry], after: Mapping[str, Entry], where: str) -> str:
    """README.md of the repository.

    Args:
        existing: the text that is there, if there is one. Only the table in it is replaced; where it has none, one is
            added at the end.
        before, after: the manifest as it was, and as it will be.

    Raises SettingsError if the marks around the table are damaged.
    """
    table = "\n".join([BEGIN, *_draw_table(after), END])
    if existing is None:
        return f"{_head(after)}\n{table}\n"
    n_marks = existing.count(BEGIN), existing.count(END)
    if n_marks == (0, 0):
        return f"{existing.rstrip()}\n\n{table}\n"
    if n_marks != (1, 1) or existing.index(END) < existing.index(BEGIN):
        raise SettingsError(
            f"{where} should have one line {BEGIN!r} and below it one line {END!r}, between which the table is "
            "written. Put them back, or remove both; then a table is added at the end."
        )
    head, rest = existing.split(BEGIN)
    tail = rest.split(END)[1]
    if head.rstrip() == _head(before).rstrip():  # nobody has changed it
        head = f"{_head(after)}\n"
    return f"{head}{table}{tail}"


def _rows(entries: Mapping[str, Entry]) -> dict[str, Row]:
    """Folder -> row."""
    return {entry.folder: entry.sae for entry in entries.values() if entry.sae is not None}


def _head(entries: Mapping[str, Entry]) -> str:
    """Front matter and introduction."""
    rows = _rows(entries).values()
    licenses = {row.license for row in rows}
    license = licenses.pop() if len(licenses) == 1 else None
    base_models = sorted({row.base_model for row in rows if row.base_model})
    lines = [
        *front_matter(license, base_models, all(row.saelens for row in rows)),
        "",
        "# Sparse autoencoders of vision transformers",
        "",
        "Each folder holds one SAE: its card, its weights, everything that is needed to run the tower that it reads, "
        f"and its held-out quality. `{MANIFEST}` has the sha256 of each file.",
        "",
    ]
    return "\n".join(lines)


def _draw_table(entries: Mapping[str, Entry]) -> list[str]:
    head = ["SAE", "hook point", "tower", "variant", "latents", "L0", "FVU", "license"]
    return draw_rows(
        head,
        [
            [f"[{escape(folder)}]({quote(folder)}/README.md)", code(row.hook_point), code(row.tower), code(row.variant),
             f"{row.n_latents:,}", "" if row.l0 is None else f"{row.l0:.1f}",
             "" if row.fvu is None else f"{row.fvu:.4f}", escape(row.license or NO_LICENSE)]
            for folder, row in sorted(_rows(entries).items())
        ],
    )  # fmt: skip
