"""The report's plots of all latents at once, and of training. In: a ConceptTable. Out: plots with a line under each."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from analysis.concepts import EMBEDDINGS_FILE, ConceptTable
from analysis.report.page import GRAY, Plot, finish_plot, start_plot

N_BINS = 40
BAR = "#4a7fb5"


def draw_overview(concepts: ConceptTable) -> list[Plot]:
    """Frequency against strength, and the distributions of density, label entropy and monosemanticity."""
    return [draw_scatter(concepts), draw_density(concepts), *draw_entropy(concepts), *draw_monosemanticity(concepts)]


def draw_scatter(concepts: ConceptTable) -> Plot:
    """Every latent that fired; a click on one that is in the gallery goes there."""
    from bokeh.models import ColorBar, ColumnDataSource, HoverTool, LinearColorMapper, OpenURL, TapTool

    table = concepts.table.filter(pc.greater(concepts.table["n_images"], 0))
    entropy = np.nan_to_num(table["label_entropy"].to_numpy(), nan=-1.0)
    top = float(max(entropy.max(initial=0), 0.1))
    mapper = LinearColorMapper(palette="Viridis256", low=0, high=top, low_color="#b8c2cc")
    plot = start_plot(
        height=440,
        x_axis_type="log",
        y_axis_type="log",
        x_axis_label="share of images it fires on",
        y_axis_label="mean activation where it fires",
        tools="pan,wheel_zoom,box_zoom,reset,tap",
        output_backend="webgl",
    )
    points = plot.scatter(
        "frequency",
        "mean",
        source=ColumnDataSource(_points(table, entropy)),
        size=5,
        color={"field": "entropy", "transform": mapper},
        alpha=0.75,
    )
    shown = pc.is_in(table["latent"], value_set=pc.unique(concepts.gallery["latent"]))
    ringed = ColumnDataSource(_points(table.filter(shown), entropy[shown.to_numpy(zero_copy_only=False)]))
    rings = plot.scatter(
        "frequency", "mean", source=ringed, size=10, fill_alpha=0, line_color="#d1435b", line_width=1.2
    )
    tooltips = [
        ("latent", "@latent"),
        ("images", "@frequency{0.000%}"),
        ("mean", "@mean{0.000}"),
        ("max", "@maximum{0.00}"),
        ("label entropy", "@entropy{0.00}"),
    ]
    plot.add_tools(HoverTool(renderers=[points], tooltips=tooltips))
    taps = plot.select_one(TapTool)
    taps.renderers = [rings]
    taps.callback = OpenURL(url="#latent-@latent", same_tab=True)
    plot.add_layout(ColorBar(color_mapper=mapper, title="label entropy", width=14), "right")
    return finish_plot(
        plot,
        "Each point is a latent. Right: on more images; up: stronger; dark: its top images share a label, gray: none "
        "has one. A ring: it is in the gallery below; click it to go there.",
        "whole",
    )


def draw_density(concepts: ConceptTable) -> Plot:
    density = concepts.table["density"].to_numpy()
    silent = int((density == 0).sum())
    plot = _histogram(np.log10(density[density > 0]), "log10 share of tokens it fires on")
    return finish_plot(
        plot,
        "How often latents fire. Good: one hill, with few at the right (on nearly every token: they carry what all "
        f"images share). Silent on all of these images, and not in the plot: {silent:,} of {len(density):,}.",
        "third",
    )


def draw_entropy(concepts: ConceptTable) -> list[Plot]:
    """Nothing where no image has a label."""
    entropy = concepts.table["label_entropy"].to_numpy()
    entropy = entropy[np.isfinite(entropy)]
    labels = pc.unique(concepts.images["label"].filter(pc.greater_equal(concepts.images["label"], 0)))
    if not len(entropy) or len(labels) < 2:
        return []
    n_top = concepts.artifact.settings["n_top"]
    most = float(np.log(min(len(labels), n_top)))
    plot = _histogram(
        entropy, "label entropy of the top images", extent=(0, max(most, float(entropy.max()))), level=most
    )
    return [
        finish_plot(
            plot,
            f"Left is specific: 0 means that the top images have one label; {most:.2f} (dashed) is what {n_top} top "
            f"images spread evenly over {len(labels):,} labels would have. A latent may be a clean concept without "
            "serving one class.",
            "third",
        )
    ]


def draw_monosemanticity(concepts: ConceptTable) -> list[Plot]:
    """Nothing where it was not computed."""
    if "monosemanticity" not in concepts.table.column_names:
        return []
    scores = concepts.table["monosemanticity"].to_numpy()
    scores = scores[np.isfinite(scores)]
    if not len(scores):
        return []
    chance = mean_likeness(concepts)
    plot = _histogram(scores, "monosemanticity", level=chance)
    dashed = "" if chance is None else f" Dashed, {chance:.2f}: images taken at random."
    text = "Right is good: the images a latent fires on look alike to the image encoder (1: the same)."
    return [finish_plot(plot, text + dashed, "third")]


def mean_likeness(concepts: ConceptTable) -> float | None:
    """Mean cosine of two images of the store, what monosemanticity is by chance; None where it is not known."""
    file = concepts.path / EMBEDDINGS_FILE
    if not file.is_file() or concepts.summary["n_images"] != concepts.images.num_rows:
        return None
    embeddings = np.load(file, mmap_mode="r", allow_pickle=False)
    n, total = len(embeddings), embeddings.sum(axis=0, dtype=np.float64)
    return float((total @ total - n) / (n * (n - 1))) if n > 1 else None


def draw_training(curves: Mapping[str, Sequence[float]]) -> list[Plot]:
    """Loss, FVU, L0 and the share of dead latents by step; nothing without any."""
    from bokeh.models import NumeralTickFormatter

    if not curves:
        return []
    plots = []
    for name, title, scale, caption in (
        ("loss", "loss", "log", "Good: it falls, then flattens."),
        ("fvu", "FVU of the batch", "log", "Share of the variance that is not explained: lower is better."),
        ("l0", "L0", "linear", "Active latents a token."),
        ("dead", "dead", "linear", "Share of latents silent for long: lower is better."),
    ):
        plot = start_plot(title, height=220, x_axis_label="step", y_axis_type=scale, tools="", toolbar_location=None)
        plot.line(curves["step"], curves[name], color=BAR, line_width=1.5)
        plot.xaxis.ticker.desired_num_ticks = 4
        if name == "dead":
            plot.yaxis.formatter = NumeralTickFormatter(format="0.0%")
        plots.append(finish_plot(plot, caption, "small"))
    return plots


def _histogram(
    values: NDArray[np.floating[Any]], label: str, *, extent: tuple[float, float] | None = None,
    level: float | None = None,
) -> Any:  # fmt: skip
    """Latents by a number; `level` is a dashed line across."""
    from bokeh.models import Span

    counts, edges = np.histogram(values, bins=N_BINS, range=extent)
    plot = start_plot(
        height=280, x_axis_label=label, y_axis_label="latents", tools="hover", toolbar_location=None,
        tooltips=[("from", "@left{0.000}"), ("to", "@right{0.000}"), ("latents", "@top")],
    )  # fmt: skip
    plot.y_range.start = 0
    plot.quad(top=counts, bottom=0, left=edges[:-1], right=edges[1:], color=BAR, line_color="white")
    if level is not None:
        plot.add_layout(Span(location=level, dimension="height", line_color=GRAY, line_dash="dashed", line_width=1.5))
    return plot


def _points(table: pa.Table, entropy: NDArray[np.float64]) -> dict[str, Any]:
    columns = {"frequency": "image_frequency", "mean": "mean_activation", "maximum": "max_activation"}
    numbers = {name: table[column].to_numpy().astype(np.float32) for name, column in columns.items()}  # half the page
    return {"latent": table["latent"].to_numpy().astype(np.int32), "entropy": entropy.astype(np.float32), **numbers}
