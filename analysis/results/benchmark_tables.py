"""The tables of a benchmark as text: Markdown and LaTeX to paste into a paper, and CSV with the numbers themselves."""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

from actcache import SettingsError
from actcache.artifacts import write_output
from analysis.results.benchmark import BENCHMARK_TABLES, Benchmark
from analysis.results.typesetting import TextTable, to_latex, to_markdown

FORMATS = (".csv", ".md", ".tex")
CONDITIONS = ("l0",)
"""Measures that say under which condition a subject stands; none is best."""
COLUMNS = (
    "table", "subject", "minus", "measure", "better", "value", "low", "high", "spread", "n_seeds", "verdict", "variant",
    "n_latents", "k", "seed", "baseline",
)  # fmt: skip
FORMULA = re.compile(r"^(?=[=+\-@\t\r])")
"""Before a text that a spreadsheet would run; names of folders may come from somebody else."""


def write_tables(result: Benchmark, path: str | Path) -> Path:
    """Write the tables of a benchmark as .csv, .md or .tex, and return the path. A file there is replaced."""
    path = Path(path)
    return write_output(path, format_tables(result, path.suffix.lower().removeprefix(".")).encode())


def format_tables(result: Benchmark, form: str) -> str:
    """The tables of a benchmark as text.

    Runs that differ only in their seed share a row, with mean ± standard deviation; other rows have 95 % intervals. The
    best value of a column is bold if its paired difference to the next best is not `no difference`. The CSV holds every
    number of every subject instead, one in each row, and then the differences and the seeds.

    Args:
        form: md, tex (for booktabs) or csv.

    Raises:
        SettingsError: another form.
    """
    if form == "md":
        return to_markdown(list_tables(result))
    if form == "tex":
        return to_latex(list_tables(result))
    if form == "csv":
        return _to_csv(result)
    raise SettingsError(f"Tables are written as {', '.join(FORMATS)}, got {form!r}.")


def list_tables(result: Benchmark) -> list[TextTable]:
    """Each table that has rows, seeds together; then the differences."""
    tables = []
    for name, title in BENCHMARK_TABLES.items():
        for by_tokens in (False, True):
            rows = result.rows(name, by_tokens=by_tokens, by_seeds=True)
            part = (f"{name}-by-token", f"{title}: CLS and patches apart") if by_tokens else (name, title)
            tables.append(TextTable(*part, rows, _find_best(result, name) if rows else frozenset()))
    tables.append(TextTable("differences", "Paired differences", result.difference_rows()))
    return [table for table in tables if table.rows]


def _find_best(result: Benchmark, table: str) -> frozenset[tuple[str, str]]:
    """(row, column) of the values that are better than the next best one, as the paired difference says."""
    means = {(each.group, each.measure): each.mean for each in result.seeds}
    verdicts = {(each.first, each.second, each.measure): each.verdict for each in result.differences}
    labels = result.labels()
    best = set()
    for measure in result.measures(table):
        if measure.split()[0] in CONDITIONS:
            continue
        rises = next(each.higher_is_better for each in result.values if each.measure == measure)
        numbers = {each.subject: each.value for each in result.values if each.measure == measure}
        found = [(means.get((name, measure), numbers.get(name)), name) for name in labels]
        ranked = sorted(((value, name) for value, name in found if value is not None), reverse=rises)
        if len(ranked) < 2:
            continue
        first, second = ranked[0][1], ranked[1][1]
        verdict = verdicts.get((first, second, measure)) or verdicts.get((second, first, measure))
        if verdict in ("better", "worse"):
            best.add((labels[first], f"{measure} {'↑' if rises else '↓'}"))
    return frozenset(best)


def _to_csv(result: Benchmark) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in _list_numbers(result):
        writer.writerow({name: FORMULA.sub("'", cell) if isinstance(cell, str) else cell for name, cell in row.items()})
    return text.getvalue()


def _list_numbers(result: Benchmark) -> Iterator[dict[str, str | float | None]]:
    better = {each.measure: "higher" if each.higher_is_better else "lower" for each in result.values}
    subjects = {each.name: each for each in result.subjects}
    for value in result.values:
        of = subjects[value.subject]
        yield {
            "table": value.table, "subject": value.subject, "measure": value.measure, "better": better[value.measure],
            "value": value.value, "low": value.low, "high": value.high, "variant": of.variant,
            "n_latents": of.n_latents, "k": of.k, "seed": of.seed, "baseline": of.baseline,
        }  # fmt: skip
    for d in result.differences:
        yield {
            "table": "differences", "subject": d.first, "minus": d.second, "measure": d.measure,
            "better": better[d.measure], "value": d.difference, "low": d.low, "high": d.high, "verdict": d.verdict,
        }  # fmt: skip
    for each in result.seeds:
        yield {
            "table": "seeds", "subject": each.group, "measure": each.measure, "better": better[each.measure],
            "value": each.mean, "spread": each.spread, "n_seeds": each.n_seeds,
        }  # fmt: skip
    for point in result.pca_curve:
        yield {
            "table": "pca by rank", "subject": f"{point.n_components} components", "measure": "fvu", "better": "lower",
            "value": point.fvu, "low": point.low, "high": point.high,
        }  # fmt: skip
