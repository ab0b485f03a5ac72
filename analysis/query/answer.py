"""The answer to a question, as a pyarrow table, and that table as a file."""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from actcache import SettingsError
from actcache.artifacts import write_output
from actcache.text import to_json
from analysis.query.classes import query_class, query_firing, query_selection
from analysis.query.cofiring import list_pairs, query_co_firing, sample_partners
from analysis.query.groups import query_groups
from analysis.query.images import query_image, query_images
from analysis.query.latents import query_counter_examples, query_latent, query_patches
from analysis.query.places import parse_at
from analysis.query.question import RANKS, Question, parse_latents
from saetrain import CodeStore


def answer_question(codes: CodeStore, question: Question) -> pa.Table:
    """The table that answers a question, strongest first.

    Raises SettingsError for values that cannot be read, or that the codes do not have.
    """
    options: dict[str, Any] = {name: getattr(question, name) for name in ("where", "score", "tau")}
    options = {name: value for name, value in options.items() if value is not None} | {"n_top": question.n_top}
    match question:
        case Question(latent=int(latent)):
            queries = {
                "images": query_latent, "patches": query_patches, "counter-examples": query_counter_examples,
                "co-firing": query_co_firing,
            }  # fmt: skip
            return queries[question.show or "images"](codes, latent, **options)
        case Question(sample=int(n_tokens)):
            partners = sample_partners(codes, n_tokens=n_tokens, seed=question.seed or 0, n_partners=question.n_top)
            return list_pairs(partners)
        case Question(image=(first, second)):
            return query_images(codes, first, second, **options)
        case Question(image=(image,)):
            return query_image(codes, image, at=parse_at(question.at) if question.at else None, **options)
        case Question(class_=str(label_name)):
            return query_class(codes, label_name, rank=question.rank or RANKS[0], **options)
        case Question(group=str(group)):
            return query_groups(codes, group, question.versus, **options)
        case Question(fires=None, silent=None):
            return query_selection(codes, **options)
        case _:
            fires, silent = parse_latents(question.fires, "--fires"), parse_latents(question.silent, "--silent")
            return query_firing(codes, fires, silent, **options)


def write_answer(table: pa.Table | list[Mapping[str, object]], out: str | Path) -> Path:
    """Write a table, or a list of rows, as .csv, .parquet or .json, and return the path. A file there is replaced.

    The JSON is a list of rows, with null for a number that does not exist.

    In a .csv, texts that a spreadsheet would run as a formula begin with an apostrophe; numbers are as they are.

    In a .csv, texts that a spreadsheet would run as a formula begin with an apostrophe; numbers are as they are.

    Raises SettingsError for another suffix.
    """
    out = Path(out)
    table = pa.Table.from_pylist(list(map(dict, table))) if isinstance(table, list) else table
    sink = io.BytesIO()
    if out.suffix.lower() == ".csv":
        pyarrow.csv.write_csv(_disarm_formulas(table), sink)
    elif out.suffix.lower() == ".parquet":
        pq.write_table(table, sink)
    elif out.suffix.lower() == ".json":
        sink.write((to_json(table.to_pylist()) + "\n").encode())
    else:
        raise SettingsError(f"--out must end in .csv, .parquet or .json, got {out.name!r}.")
    return write_output(out, sink.getvalue())


FORMULA = r"^([=+\-@\t\r])"
"""How a text begins that spreadsheets run; names and labels may come from somebody else."""


def _disarm_formulas(table: pa.Table) -> pa.Table:
    """Put an apostrophe, which spreadsheets do not show, before such texts, in the names of columns too."""
    columns: list[Any] = []
    for column in table.columns:
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        columns.append(pc.replace_substring_regex(column.cast(kind), FORMULA, r"'\1") if is_text else column)
    return pa.table(columns, names=[re.sub(FORMULA, r"'\1", name) for name in table.column_names])
