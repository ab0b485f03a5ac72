"""A comparison as a section of a page, and write_adaptation_page(): that section as a page of its own. No network.

In: what `compare` found, and the concept tables it was made from, for pictures. Out: accuracies, masking curves in four
settings, predictions under masks, confusion of both models and their difference, counts and overlap, shared and
exclusive concepts with images and heat maps; of two dictionaries the table of the four cells.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache import ArtifactNotFoundError, SchemaError
from analysis.concepts import ConceptTable
from analysis.pictures import draw_matrix
from analysis.report.page import (
    BLUE,
    Plot,
    Section,
    contradictions,
    draw_level,
    draw_line,
    fill,
    finish_plot,
    start_plot,
    write_page,
)
from analysis.report.top_images import Shot, TopShots, frame_of
from analysis.results import Comparison, CountOverlap, Overlap, OverlapMeans

Address = Callable[[int], str]
"""The address at which a latent is shown; "" if it is not."""

N_SHOWN, N_PICTURES = 6, 5
N_GRIDS = 4
MAX_CLASSES = 40
"""Larger confusion matrices nobody can read."""
MAX_LABELS = 16


class Matrix(NamedTuple):
    """A table of numbers, each with a color."""

    title: str
    rows: list[tuple[str, list[tuple[str, str]]]]  # class, then (number, CSS color) a column


class Grid(NamedTuple):
    """Predictions under masks of k latents: a small picture of each setting."""

    k: int
    pictures: list[tuple[str, bytes]]


class Strip(NamedTuple):
    """A latent with the images of each model, and the tokens on which it is above tau."""

    latent: int
    address: str
    tokens: dict[str, int]
    shots: dict[str, list[Shot]]


def write_adaptation_page(
    comparison: Comparison, base: ConceptTable | str | Path, adapted: ConceptTable | str | Path, out: str | Path
) -> Path:
    """Write the page.

    Args:
        comparison: what `compare` returned.
        base, adapted: the tables it was made from, whose pictures are shown.
    """
    tables = {
        name: table if isinstance(table, ConceptTable) else ConceptTable.open(table)
        for name, table in zip(MODELS, (base, adapted), strict=True)
    }
    with contradictions("The comparison"):
        part = draw_comparison(comparison, tables)._replace(notes=comparison.notes())
    return write_page(
        out,
        "adaptation.html.jinja",
        title="A model and its adapted self",
        subtitle=" and ".join(table.path.name for table in tables.values()),
        part=part,
        frame=frame_of(tables["base"]),
    )


def draw_comparison(
    comparison: Comparison, tables: Mapping[str, ConceptTable], *, address: Address = lambda latent: ""
) -> Section:
    """The section of a comparison.

    Args:
        tables: base and adapted, as far as they are at hand; without one its pictures are left out.
        address: where a latent is shown, for links.
    """
    small = len(comparison.classes) <= MAX_CLASSES
    confusion = {name: np.array(counts) for name, counts in comparison.confusion.items()} if small else {}
    method, n_seeds = comparison.prompts["method"], comparison.settings.get("n_seeds", 1)
    more = fill(
        "comparison.html.jinja",
        conclusion=comparison.conclusion.sentence,
        accuracy=comparison.accuracy,
        improvement=say(comparison.improvement),
        interval=comparison.interval,
        curves=draw_settings(comparison),
        grids=_grids(comparison) if small else [],
        confusion=_confusion(confusion, comparison.classes),
        classes=comparison.classes,
        n_labels=MAX_LABELS,
        counts=[draw_counts(comparison)],
        overlap=_overlap(comparison),
        n_top=comparison.settings["n_top"],
        concepts=_concepts(comparison.overlap, tables, address),
        dictionaries=comparison.dictionaries,
        say=say,
        percent=lambda value: "n/a" if value is None else f"{100 * value:.1f} %",
    )
    seeds = f"; mean of {n_seeds} seeds, with other halves and draws" if n_seeds != 1 else ""
    text = (
        f"{method} prompts at {comparison.hook_point}, {len(comparison.classes)} classes. Latents were chosen on "
        f"{comparison.n_chosen:,} images and judged on {comparison.n_judged:,} others"
        f"{seeds}."
    )
    return Section(f"What {method} changed", text, [], [], more)


def find_tables(comparison: Comparison, concepts: ConceptTable, folder: Path) -> dict[str, ConceptTable]:
    """The tables a comparison was made from, of those that are at hand: `concepts`, beside it, or in a folder."""
    tables = {}
    for name in MODELS:
        parent = comparison.parents[name]
        if concepts.artifact.id == parent.id:
            tables[name] = concepts
            continue
        for place in (concepts.path.parent / parent.path, folder / parent.path):
            try:
                table = ConceptTable.open(place)
            except (ArtifactNotFoundError, SchemaError):
                continue
            if table.artifact.id == parent.id:
                tables[name] = table
                break
    return tables


def _overlap(comparison: Comparison) -> list[list[str]]:
    head = ["class", "Jaccard", "rank-biased overlap", "high", "high → low", "low → high", "base only", "adapted only"]
    overlap = comparison.overlap

    def cells(name: str, row: Overlap | OverlapMeans) -> list[str]:
        numbers = (row.jaccard, row.rank_biased_overlap, row.n_high, row.n_high_to_low, row.n_low_to_high)
        lists = (row.base_only, row.adapted_only) if isinstance(row, Overlap) else ((), ())
        return [name, *map(say, numbers), *(_abridge(latents) for latents in lists)]

    return [
        head,
        *(cells(row.class_, row) for row in overlap.classes),
        cells("mean of the classes", overlap.task),
        cells("dataset", overlap.dataset),
    ]


def _abridge(latents: Sequence[int]) -> str:
    return " ".join(map(str, latents[:3])) + (" …" if len(latents) > 3 else "")


def _grids(comparison: Comparison) -> list[Grid]:
    """For a few k, the predictions for each class's images in the four settings, error term kept."""
    rows = [
        (row.k, row)
        for row in comparison.prediction
        if row.keep_error and row.selection == "class" and isinstance(row.k, int)
    ]
    every = sorted({k for k, _ in rows})
    shown = {every[round(i * (len(every) - 1) / max(N_GRIDS - 1, 1))] for i in range(N_GRIDS)} if every else set()
    grids: dict[int, list[tuple[str, bytes]]] = {k: [] for k in sorted(shown)}
    for k, row in rows:
        if k in shown:
            title = f"{row.chosen_by} latents, {row.classified_by} model"
            grids[k].append((title, draw_matrix(np.array(row.counts))))
    return [Grid(k, pictures) for k, pictures in grids.items()]


def _confusion(confusion: dict[str, NDArray[np.int64]], classes: Sequence[str]) -> list[Matrix]:
    """Both models' counts, and how they differ."""
    if not confusion:
        return []
    base, adapted = (confusion[name] for name in MODELS)
    matrices = [
        Matrix(f"{name} model", _paint(counts, counts / np.maximum(counts.sum(1, keepdims=True), 1), classes, "{}"))
        for name, counts in confusion.items()
    ]
    change = adapted - base
    shares = change / max(int(abs(change).max()), 1)
    return [*matrices, Matrix("adapted less base", _paint(change, shares, classes, "{:+}"))]


def _paint(
    counts: NDArray[np.int64], shares: NDArray[np.float64], classes: Sequence[str], form: str
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Numbers on blue where a share is above 0, on red below; nothing for 0."""
    return [
        (
            name,
            [
                (
                    form.format(n) if n else "",
                    f"rgba({'11, 107, 203' if s > 0 else '209, 67, 91'}, {0.75 * abs(s):.2f})",
                )
                for n, s in zip(numbers, of, strict=True)
            ],
        )
        for name, numbers, of in zip(classes, counts.tolist(), shares.tolist(), strict=True)
    ]


def _concepts(overlap: CountOverlap, tables: Mapping[str, ConceptTable], address: Address) -> dict[str, list[Strip]]:
    groups = {
        "In both models' top": ("shared", tuple(MODELS)),
        "Only in the base model's": ("base_only", ("base",)),
        "Only in the adapted model's": ("adapted_only", ("adapted",)),
    }
    shots = TopShots(tables)
    counts = {latent: dict(zip(MODELS, both, strict=True)) for latent, *both in zip(*overlap.scatter, strict=True)}
    return {
        title: [
            Strip(
                latent, address(latent), counts[latent], {name: shots.of(name, latent, N_PICTURES) for name in models}
            )
            for latent in getattr(overlap.dataset, group)[:N_SHOWN]
        ]
        for title, (group, models) in groups.items()
    }


MODELS = {"base": "#c4551d", "adapted": BLUE}


DASHES = {"class": "solid", "dataset": "dotdash", "random": "dashed"}


ERROR = {True: "error term kept", False: "error term left out"}


def draw_settings(comparison: Comparison) -> list[Plot]:
    """Accuracy against k: a panel for each model that judges, with and without the error term."""
    return [
        _draw_setting(comparison, model, keep_error)
        for keep_error in ERROR
        for model in MODELS
        if any((row.classified_by, row.keep_error) == (model, keep_error) for row in comparison.masks)
    ]


def _draw_setting(comparison: Comparison, model: str, keep_error: bool) -> Plot:
    plot = start_plot(
        f"judged with the {model} model, {ERROR[keep_error]}", height=400, x_axis_type="log", x_axis_label="latents k",
        y_axis_label="accuracy", tooltips=[("", "$name"), ("k", "@x"), ("accuracy", "@y{0.000}")],
    )  # fmt: skip
    plot.y_range.start = 0
    rows = [row for row in comparison.masks if (row.classified_by, row.keep_error) == (model, keep_error)]
    draw_level(plot, comparison.accuracy[f"{model} image, {model} text"].accuracy, "solid", "the model itself")
    for row in rows:
        if row.selection == "all":
            draw_level(plot, row.accuracy, "dotted", "all latents")
    plot.xaxis.ticker = sorted({row.k for row in rows if row.selection != "all"})
    for selection in dict.fromkeys(row.selection for row in rows if row.selection != "all"):
        for chosen_by, color in MODELS.items():
            points = [
                (float(row.k), row.accuracy, row.accuracy_low, row.accuracy_high)
                for row in rows
                if (row.selection, row.chosen_by) == (selection, chosen_by)
            ]
            # the base model's line is broad, so that it is seen below another that covers it
            width, alpha = (6, 0.4) if chosen_by == "base" else (2, 1.0)
            title = f"{selection}, {chosen_by}"
            draw_line(plot, points, color, title, dash=DASHES.get(selection, "dotted"), width=width, alpha=alpha)
    return finish_plot(plot)


def draw_counts(comparison: Comparison) -> Plot:
    """Tokens on which each latent is above tau, base against adapted."""
    latents, base, adapted = comparison.overlap.scatter
    data = {"latent": latents, "base": [n + 0.5 for n in base], "adapted": [n + 0.5 for n in adapted]}
    plot = start_plot(
        height=420, x_axis_type="log", y_axis_type="log", x_axis_label="tokens, base model",
        y_axis_label="tokens, adapted model",
        tooltips=[("latent", "@latent"), ("base", "@base{0,0}"), ("adapted", "@adapted{0,0}")],
    )  # fmt: skip
    points = plot.scatter("base", "adapted", source=data, size=5, alpha=0.4, color=BLUE)
    top = max([1, *data["base"], *data["adapted"]])
    plot.line([0.5, top], [0.5, top], color="#5b6875", line_dash="dotted")
    plot.hover.renderers = [points]
    whole = comparison.overlap.dataset
    return finish_plot(
        plot,
        "Each point is a latent: tokens on which it is above τ, over all images. On the dotted line both models use it "
        f"alike. Correlation {say(whole.correlation)}, of logarithms {say(whole.log_correlation)}.",
    )


def say(value: float | None) -> str:
    """A number for people."""
    if value is None:
        return "n/a"
    return f"{value:.2f}" if isinstance(value, float) else f"{value:,}"
