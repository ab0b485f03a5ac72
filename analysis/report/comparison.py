"""A comparison as a section of a page, and write_adaptation_page(): that section as a page of its own. No network.

In: what `compare` found, and the concept tables it was made from, for pictures. Out: accuracies, masking curves in four
settings, predictions under masks, confusion of both models and their difference, counts and overlap, shared and
exclusive concepts with images and heat maps; of two dictionaries the table of the four cells.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache import ArtifactNotFoundError, SchemaError
from analysis.concepts import ConceptTable
from analysis.pictures import draw_matrix
from analysis.report.page import BLUE, Plot, Section, draw_level, draw_line, fill, finish_plot, start_plot, write_page
from analysis.report.top_images import Shot, TopShots

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
    anchor: bool
    tokens: dict[str, int]
    shots: dict[str, list[Shot]]


def write_adaptation_page(
    found: Mapping[str, Any], base: ConceptTable | str | Path, adapted: ConceptTable | str | Path, out: str | Path
) -> Path:
    """Write the page.

    Args:
        found: a result of `compare`.
        base, adapted: the tables it was made from, whose pictures are shown.
    """
    tables = {
        name: table if isinstance(table, ConceptTable) else ConceptTable.open(table)
        for name, table in zip(MODELS, (base, adapted), strict=True)
    }
    rows, columns = tables["base"].grid
    return write_page(
        out,
        "adaptation.html.jinja",
        title="A model and its adapted self",
        subtitle=" and ".join(table.path.name for table in tables.values()),
        part=draw_comparison(found, tables),
        aspect=f"{columns} / {rows}",
    )


def draw_comparison(
    found: Mapping[str, Any], tables: Mapping[str, ConceptTable], *, anchors: Collection[int] = ()
) -> Section:
    """What `compare` found.

    Args:
        tables: base and adapted, as far as they are at hand; without one its pictures are left out.
        anchors: latents that the page shows elsewhere, for links.
    """
    small = len(found["classes"]) <= MAX_CLASSES
    confusion = {name: np.array(counts) for name, counts in found.get("confusion", {}).items()} if small else {}
    method, n_seeds = found["prompts"]["method"], found["settings"].get("n_seeds", 1)
    more = fill(
        "comparison.html.jinja",
        conclusion=found["conclusion"]["sentence"],
        accuracy=found["accuracy"],
        improvement=say(found["improvement"]),
        interval=found.get("interval", "95 % over images"),
        curves=draw_settings(found),
        grids=_grids(found) if small else [],
        confusion=_confusion(confusion, found["classes"]),
        classes=found["classes"],
        n_labels=MAX_LABELS,
        counts=[draw_counts(found)],
        overlap=_overlap(found),
        n_top=found["settings"]["n_top"],
        concepts=_concepts(found["overlap"], tables, anchors),
        dictionaries=found.get("dictionaries"),
        say=say,
        percent=lambda value: "n/a" if value is None else f"{100 * value:.1f} %",
    )
    text = (
        f"{method} prompts at {found['hook_point']}, {len(found['classes'])} classes. Latents were chosen on "
        f"{found['n_chosen']:,} images and judged on {found['n_judged']:,} others"
        f"{f'; mean of {n_seeds} seeds, with other halves and draws' if n_seeds > 1 else ''}."
    )
    return Section(f"What {method} changed", text, [], [], more)


def find_tables(found: Mapping[str, Any], concepts: ConceptTable, folder: Path) -> dict[str, ConceptTable]:
    """The tables a comparison was made from, of those that are at hand: `concepts`, beside it, or in a folder."""
    tables = {}
    for name in MODELS:
        parent = found["parents"][name]
        if concepts.artifact.id == parent["id"]:
            tables[name] = concepts
            continue
        for place in (concepts.path.parent / parent["path"], folder / parent["path"]):
            try:
                table = ConceptTable.open(place)
            except (ArtifactNotFoundError, SchemaError):
                continue
            if table.artifact.id == parent["id"]:
                tables[name] = table
                break
    return tables


def _overlap(found: Mapping[str, Any]) -> list[list[str]]:
    numbers = ("jaccard", "rank_biased_overlap", "n_high", "n_high_to_low", "n_low_to_high")
    head = ["class", "Jaccard", "rank-biased overlap", "high", "high → low", "low → high", "base only", "adapted only"]
    whole = found["overlap"]
    rows = [
        *whole["classes"],
        whole["task"] | {"class": "mean of the classes"},
        whole["dataset"] | {"class": "dataset"},
    ]

    def some(latents: list[int]) -> str:
        return " ".join(map(str, latents[:3])) + (" …" if len(latents) > 3 else "")

    return [
        head,
        *(
            [row["class"], *(say(row[n]) for n in numbers), *(some(row.get(f"{m}_only", [])) for m in MODELS)]
            for row in rows
        ),
    ]


def _grids(found: Mapping[str, Any]) -> list[Grid]:
    """For some k, what images of each class are taken for in the four settings, error term kept."""
    rows = [row for row in found.get("prediction", []) if row["keep_error"] and row["selection"] == "class"]
    every = sorted({row["k"] for row in rows})
    kept = {every[round(i * (len(every) - 1) / max(N_GRIDS - 1, 1))] for i in range(N_GRIDS)} if every else set()
    return [
        Grid(
            k,
            [
                (f"{row['chosen_by']} latents, {row['classified_by']} model", draw_matrix(np.array(row["counts"])))
                for row in rows
                if row["k"] == k
            ],
        )
        for k in sorted(kept)
    ]


def _confusion(confusion: dict[str, NDArray[np.int64]], classes: list[str]) -> list[Matrix]:
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
    counts: NDArray[np.int64], shares: NDArray[np.float64], classes: list[str], form: str
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


def _concepts(
    overlap: Mapping[str, Any], tables: Mapping[str, ConceptTable], anchors: Collection[int]
) -> dict[str, list[Strip]]:
    groups = {
        "In both models' top": ("shared", tuple(MODELS)),
        "Only in the base model's": ("base_only", ("base",)),
        "Only in the adapted model's": ("adapted_only", ("adapted",)),
    }
    shots = TopShots(tables)
    counts = {latent: dict(zip(MODELS, both, strict=True)) for latent, *both in zip(*overlap["scatter"], strict=True)}
    return {
        title: [
            Strip(
                latent,
                latent in anchors,
                counts[latent],
                {name: shots.of(name, latent, N_PICTURES) for name in models},
            )
            for latent in overlap["dataset"][group][:N_SHOWN]
        ]
        for title, (group, models) in groups.items()
    }


MODELS = {"base": "#c4551d", "adapted": BLUE}


DASHES = {"class": "solid", "dataset": "dotdash", "random": "dashed"}


ERROR = {True: "error term kept", False: "error term left out"}


def draw_settings(found: Mapping[str, Any]) -> list[Plot]:
    """Accuracy against k: a panel for each model that judges, with and without the error term."""
    return [
        _draw_setting(found, model, keep_error)
        for keep_error in ERROR
        for model in MODELS
        if any((row["classified_by"], row["keep_error"]) == (model, keep_error) for row in found["masks"])
    ]


def _draw_setting(found: Mapping[str, Any], model: str, keep_error: bool) -> Plot:
    plot = start_plot(
        f"judged with the {model} model, {ERROR[keep_error]}", height=400, x_axis_type="log", x_axis_label="latents k",
        y_axis_label="accuracy", tooltips=[("", "$name"), ("k", "@x"), ("accuracy", "@y{0.000}")],
    )  # fmt: skip
    plot.y_range.start = 0
    rows = [row for row in found["masks"] if (row["classified_by"], row["keep_error"]) == (model, keep_error)]
    draw_level(plot, found["accuracy"][f"{model} image, {model} text"]["accuracy"], "solid", "the model itself")
    for row in rows:
        if row["selection"] == "all":
            draw_level(plot, row["accuracy"], "dotted", "all latents")
    plot.xaxis.ticker = sorted({row["k"] for row in rows if row["selection"] != "all"})
    for selection in dict.fromkeys(row["selection"] for row in rows if row["selection"] != "all"):
        for chosen_by, color in MODELS.items():
            points = [
                (row["k"], row["accuracy"], row["accuracy_low"], row["accuracy_high"])
                for row in rows
                if (row["selection"], row["chosen_by"]) == (selection, chosen_by)
            ]
            # the base model's line is broad, so that it is seen below another that covers it
            width, alpha = (6, 0.4) if chosen_by == "base" else (2, 1.0)
            title = f"{selection}, {chosen_by}"
            draw_line(plot, points, color, title, dash=DASHES.get(selection, "dotted"), width=width, alpha=alpha)
    return finish_plot(plot)


def draw_counts(found: Mapping[str, Any]) -> Plot:
    """Tokens on which each latent is above tau, base against adapted."""
    latents, base, adapted = found["overlap"]["scatter"]
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
    whole = found["overlap"]["dataset"]
    return finish_plot(
        plot,
        "Each point is a latent: tokens on which it is above τ, over all images. On the dotted line both models use it "
        f"alike. Correlation {say(whole['correlation'])}, of logarithms {say(whole['log_correlation'])}.",
    )


def say(value: float | None) -> str:
    """A number for people."""
    if value is None:
        return "n/a"
    return f"{value:.2f}" if isinstance(value, float) else f"{value:,}"
