"""The answer to a question, as a pyarrow table, and that table as a file."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from actcache import SettingsError
from actcache.artifacts import write_output
from analysis.query.classes import query_class, query_firing, query_selection
from analysis.query.cofiring import query_co_firing, sample_partners
from analysis.query.groups import query_groups
from analysis.query.images import At, query_image, query_images
from analysis.query.latents import query_counter_examples, query_latent, query_patches
from analysis.query.question import Question, parse_latents
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
            return partners.sort_by([("jaccard", "descending"), ("n_tokens", "descending"), ("latent", "ascending")])
        case Question(image=(first, second)):
            return query_images(codes, first, second, **options)
        case Question(image=(image,)):
            return query_image(codes, image, at=parse_at(question.at) if question.at else None, **options)
        case Question(class_=str(label_name)):
            return query_class(codes, label_name, **options)
        case Question(group=str(group)):
            return query_groups(codes, group, question.versus, **options)
        case Question(fires=None, silent=None):
            return query_selection(codes, **options)
        case _:
            fires, silent = parse_latents(question.fires, "--fires"), parse_latents(question.silent, "--silent")
            return query_firing(codes, fires, silent, **options)


def parse_at(text: str) -> At:
    """`3,4` or `0:3,2:5` as `query_image` takes it; a range ends before its second number. Raises SettingsError."""
    try:
        row, column = (_parse_axis(part) for part in text.split(","))
    except ValueError as error:
        raise SettingsError(f"--at must be ROW,COLUMN or ROW:ROW,COLUMN:COLUMN, got {text!r}.") from error
    return row, column


def _parse_axis(text: str) -> int | slice:
    start, colon, stop = text.partition(":")
    if not colon:
        return int(text)
    return slice(int(start) if start.strip() else None, int(stop) if stop.strip() else None)


def write_answer(table: pa.Table | list[Mapping[str, object]], out: str | Path) -> Path:
    """Write a table, or a list of rows, as .csv or .parquet and return its path. An existing file is replaced.

    Raises SettingsError for another suffix.
    """
    out = Path(out)
    table = pa.Table.from_pylist(table) if isinstance(table, list) else table
    sink = io.BytesIO()
    if out.suffix.lower() == ".csv":
        pyarrow.csv.write_csv(table, sink)
    elif out.suffix.lower() == ".parquet":
        pq.write_table(table, sink)
    else:
        raise SettingsError(f"--out must end in .csv or .parquet, got {out.name!r}.")
    return write_output(out, sink.getvalue())
