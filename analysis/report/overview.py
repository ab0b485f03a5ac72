"""The report's plots of all latents and of training. In: a ConceptTable. Out: plots, each with a caption."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from analysis.concepts import EMBEDDINGS_FILE, ConceptTable
from analysis.report.page import GRAY, INK, Plot, finish_plot, start_plot

N_BINS = 40
BAR = "#4a7fb5"


def draw_overview(concepts: ConceptTable) -> list[Plot]:
    """Frequency against strength, and the distributions of density, label entropy and monosemanticity."""
    return [draw_scatter(concepts), draw_density(concepts), *draw_entropy(concepts), *draw_monosemanticity(concepts)]


def draw_scatter(concepts: ConceptTable) -> Plot:
    """Every latent that fired. A click on a latent that is in the gallery leads there."""
    from bokeh.models import ColorBar, ColumnDataSource, HoverTool, LinearColorMapper, OpenURL, TapTool

    table = concepts.table.filter(pc.greater(concepts.table["n_images"], 0))
    entropy = np.nan_to_num(table["label_entropy"].to_numpy(), nan=-1.0)
    top = float(max(entropy.max(initial=0), 0.1))
    mapper = LinearColorMapper(palette="Viridis256", low=0, high=top, low_color="#b8c2cc")
    plot = start_plot(
        height=440,
        x_axis_type="log",
        y_axis_type="log",
        x_axis_label="share of images on which it fires",
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
    in_gallery = ColumnDataSource(_points(table.filter(shown), entropy[shown.to_numpy(zero_copy_only=False)]))
    rings = plot.scatter(
        "frequency", "mean", source=in_gallery, size=10, fill_alpha=0, line_color="#d1435b", line_width=1.2
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
    plot.add_layout(
        ColorBar(
            color_mapper=mapper,
            title="label entropy",
            width=14,
            background_fill_color=None,
            title_text_color=INK,
            major_label_text_color=INK,
        ),
        "right",
    )
    return finish_plot(
        plot,
        "Each point is a latent. Points to the right fire on more images; higher points fire more strongly. The top "
        "images of a dark point share a label; those of a gray point have none. A latent with a ring is in the gallery "
        "below: click it to go there.",
        "whole",
    )


def draw_density(concepts: ConceptTable) -> Plot:
    density = concepts.table["density"].to_numpy()
    silent = int((density == 0).sum())
    plot = _histogram(np.log10(density[density > 0]), "share of tokens on which it fires (log10)")
    return finish_plot(
        plot,
        "How often latents fire. A good dictionary has one peak and few latents at the far right, which fire on nearly "
        f"every token and carry what all images share. {silent:,} of {len(density):,} latents fire on none of these "
        "images and are not in the plot.",
        "third",
    )


def draw_entropy(concepts: ConceptTable) -> list[Plot]:
    """The distribution of label entropy; no plot if fewer than two labels occur."""
    entropy = concepts.table["label_entropy"].to_numpy()
    entropy = entropy[np.isfinite(entropy)]
    labels = pc.unique(concepts.images["label"].filter(pc.greater_equal(concepts.images["label"], 0)))
    if not len(entropy) or len(labels) < 2:
        return []
    n_top = concepts.config.n_top
    most = float(np.log(min(len(labels), n_top)))
    plot = _histogram(
        entropy, "label entropy of the top images", extent=(0, max(most, float(entropy.max()))), level=most
    )
    return [
        finish_plot(
            plot,
            f"Latents at the left are specific: 0 means that all top images have the same label. {most:.2f} (dashed) "
            f"is the entropy of {n_top} top images spread evenly over {len(labels):,} labels. A latent can be a "
            "clear concept without belonging to one class.",
            "third",
        )
    ]


def draw_monosemanticity(concepts: ConceptTable) -> list[Plot]:
    """The distribution of monosemanticity; no plot if it was not computed."""
    if "monosemanticity" not in concepts.table.column_names:
        return []
    scores = concepts.table["monosemanticity"].to_numpy()
    scores = scores[np.isfinite(scores)]
    if not len(scores):
        return []
    chance = mean_likeness(concepts)
    plot = _histogram(scores, "monosemanticity", level=chance)
    dashed = "" if chance is None else f" The dashed line, {chance:.2f}, is what random images would score."
    text = (
        "Latents at the right are good: the images on which they fire look alike to the image encoder (1: identical)."
    )
    return [finish_plot(plot, text + dashed, "third")]


def mean_likeness(concepts: ConceptTable) -> float | None:
    """The mean cosine of two images, which is the monosemanticity to expect by chance; None if it is not known."""
    if (
        not (concepts.path / EMBEDDINGS_FILE).is_file()
        or concepts.summary_numbers()["n_images"] != concepts.images.num_rows
    ):
        return None
    embeddings = concepts.image_embeddings
    n, total = len(embeddings), embeddings.sum(axis=0, dtype=np.float64)
    return float((total @ total - n) / (n * (n - 1))) if n > 1 else None


def draw_training(curves: Mapping[str, Sequence[float]]) -> list[Plot]:
    """Loss, FVU, L0 and the share of dead latents by training step; no plots if no curves were recorded."""
    from bokeh.models import NumeralTickFormatter

    names = ("step", "loss", "fvu", "l0", "dead")
    if not curves or len({len(curves.get(name, ())) for name in names}) != 1:
        return []
    plots = []
    for name, title, scale, caption in (
        ("loss", "loss", "log", "It should fall, then level off."),
        ("fvu", "FVU of the batch", "log", "The share of variance that is not explained. Lower is better."),
        ("l0", "L0", "linear", "Active latents per token."),
        ("dead", "dead", "linear", "The share of latents that have not fired for a long time. Lower is better."),
    ):
        plot = start_plot(title, height=220, x_axis_label="step", y_axis_type=scale, tools="", toolbar_location=None)
        plot.line(curves["step"], curves[name], color=BAR, line_width=1.5)
        plot.xaxis.ticker.desired_num_ticks = 4
        if scale == "linear":  # bokeh would show a constant 0 between -1 and 1
            plot.y_range.start, plot.y_range.end = 0, 1.1 * max(curves[name], default=0) or 0.1
        if name == "dead":
            plot.yaxis.formatter = NumeralTickFormatter(format="0.0%")
        plots.append(finish_plot(plot, caption, "small"))
    return plots


def _histogram(
    values: NDArray[np.floating[Any]], label: str, *, extent: tuple[float, float] | None = None,
    level: float | None = None,
) -> Any:  # fmt: skip
    """A histogram of latents by some number; `level` is the place of a dashed line."""
    from bokeh.models import Span

    counts, edges = np.histogram(values, bins=N_BINS, range=extent)
    plot = start_plot(
        height=280, x_axis_label=label, y_axis_label="latents", tools="hover", toolbar_location=None,
        tooltips=[("from", "@left{0.000}"), ("to", "@right{0.000}"), ("latents", "@top")],
    )  # fmt: skip
    plot.y_range.start = 0
    plot.quad(top=counts, bottom=0, left=edges[:-1], right=edges[1:], color=BAR, line_color=None)
    if level is not None:
        plot.add_layout(Span(location=level, dimension="height", line_color=GRAY, line_dash="dashed", line_width=1.5))
    return plot


def _points(table: pa.Table, entropy: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
    columns = {"frequency": "image_frequency", "mean": "mean_activation", "maximum": "max_activation"}
    numbers = {name: table[column].to_numpy().astype(np.float32) for name, column in columns.items()}
    return {"latent": table["latent"].to_numpy().astype(np.int32), "entropy": entropy.astype(np.float32), **numbers}
