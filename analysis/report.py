"""write_report(): a ConceptTable becomes one HTML file that needs nothing else: no network, no images, no codes."""

import base64
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from actcache import write_atomic
from analysis.concepts import ConceptTable
from analysis.curves import draw_sections
from analysis.gallery import draw_heat_map
from analysis.names import read_names


def write_report(
    concepts: ConceptTable | str | Path, out: str | Path, *, interventions: Sequence[str | Path] = ()
) -> Path:
    """Write the page and return its path. An existing file is replaced.

    Shows: held-out quality, the curves of training, every latent as density against activation, and the gallery of top
    images with heat maps, with names where there are any; before the gallery a section for each of `interventions`.

    Args:
        interventions: result files of `intervene`, `attribute`, `evaluate` and `steer`.

    Raises:
        SettingsError, SchemaError: a file that is no such result.
    """
    concepts = concepts if isinstance(concepts, ConceptTable) else ConceptTable.open(concepts)
    resources, plots, curves = _draw_plots(concepts)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    latents = _gallery(concepts)
    rows, columns = concepts.grid
    sae, source = concepts.artifact.provenance["sae"], concepts.artifact.provenance["source"]
    page = environment.get_template("report.html.jinja").render(
        title=f"Concepts of {source['images']}",
        subtitle=(
            f"{sae['variant']} SAE with {sae['n_latents']:,} latents at {sae['hook_point']} of {source['model']} "
            f"({source['pretrained']}), width {sae['d_model']}"
        ),
        cards=_cards(concepts),
        quality=_quality(concepts),
        resources=_safe(resources),
        plots=_safe(plots),
        curves=_safe(curves),
        sections=[section._replace(plots=_safe(section.plots)) for section in draw_sections(interventions)],
        latents=latents,
        n_shown=len(latents),
        pictures=concepts.artifact.settings["pictures"],
        aspect=f"{columns} / {rows}",
    )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, page.encode())
    return out


def _cards(concepts: ConceptTable) -> list[dict[str, str]]:
    quality, summary = concepts.artifact.provenance["quality"], concepts.summary
    tokens = next(kind for kind in ("all", "patch", "cls") if kind in quality)
    n_latents = concepts.table.num_rows
    return [
        {"name": "images", "value": f"{summary['n_images']:,}"},
        {"name": "tokens", "value": f"{summary['n_tokens']:,}"},
        {"name": "latents that fired", "value": f"{summary['n_alive']:,} of {n_latents:,}"},
        {"name": "held-out FVU", "value": f"{quality[tokens]['fvu']:.3f}"},
        {"name": "L0", "value": f"{quality[tokens]['l0']:.1f}"},
        {"name": "dead after training", "value": f"{100 * quality['dead']:.1f} %"},
    ]


def _quality(concepts: ConceptTable) -> list[dict[str, Any]]:
    quality = concepts.artifact.provenance["quality"]
    return [{"kind": kind, **quality[kind]} for kind in ("all", "cls", "patch") if kind in quality]


def _gallery(concepts: ConceptTable) -> list[dict[str, Any]]:
    """Latents in the order analysis chose, each with its strip of images."""
    gallery, table = concepts.gallery, concepts.table
    uris, labels = concepts.images["uri"].to_pylist(), concepts.images["label_name"].to_pylist()
    pictures = {image: concepts.thumbnail(image) for image in pc.unique(gallery["image"]).to_pylist()}
    strips: dict[int, list[dict[str, Any]]] = {}
    for line in gallery.to_pylist():
        heat = np.array(line["heat"], dtype=np.float32).reshape(concepts.grid)
        maximum = float(table["max_activation"][line["latent"]].as_py())
        strips.setdefault(line["latent"], []).append(
            {
                "uri": uris[line["image"]],
                "label": labels[line["image"]],
                "peak": float(heat.max()),
                "picture": _base64(pictures[line["image"]]),
                "heat": _base64(draw_heat_map(heat, maximum)),
            }
        )
    top_labels, names = _top_labels(concepts, labels), read_names(concepts)
    return [
        {
            "latent": latent,
            "name": names.get(latent, ""),
            "density": table["density"][latent].as_py(),
            "image_frequency": table["image_frequency"][latent].as_py(),
            "max_activation": table["max_activation"][latent].as_py(),
            "entropy": _number(table["label_entropy"][latent]),
            "labels": top_labels.get(latent, ""),
            "images": images,
        }
        for latent, images in strips.items()
    ]


def _top_labels(concepts: ConceptTable, labels: list[str]) -> dict[int, str]:
    """The most frequent labels among each shown latent's top images, e.g. `ship 14, truck 2`."""
    shown = pc.unique(concepts.gallery["latent"])
    top = concepts.top_images.filter(pc.is_in(concepts.top_images["latent"], value_set=shown))
    counts: dict[int, Counter[str]] = {}
    for latent, image in zip(top["latent"].to_pylist(), top["image"].to_pylist(), strict=True):
        if labels[image]:
            counts.setdefault(latent, Counter())[labels[image]] += 1
    return {latent: ", ".join(f"{name} {n}" for name, n in count.most_common(3)) for latent, count in counts.items()}


def _draw_plots(concepts: ConceptTable) -> tuple[str, str, str]:
    """(script to put into the head, scatter and density histogram, curves of training or nothing), by bokeh."""
    from bokeh.embed import components
    from bokeh.layouts import row
    from bokeh.models import ColorBar, ColumnDataSource, HoverTool, LinearColorMapper, OpenURL, TapTool
    from bokeh.plotting import figure
    from bokeh.resources import Resources

    table = concepts.table.filter(pc.greater(concepts.table["n_images"], 0))
    shown = pc.unique(concepts.gallery["latent"])
    entropy = np.nan_to_num(table["label_entropy"].to_numpy(), nan=-1.0)
    mapper = LinearColorMapper(
        palette="Viridis256", low=0, high=float(max(entropy.max(initial=0), 0.1)), low_color="#b8c2cc"
    )
    tooltips = [
        ("latent", "@latent"),
        ("images", "@frequency{0.000%}"),
        ("mean", "@mean{0.000}"),
        ("max", "@maximum{0.00}"),
        ("label entropy", "@entropy{0.00}"),
    ]
    scatter = figure(
        width=660,
        height=440,
        x_axis_type="log",
        y_axis_type="log",
        x_axis_label="share of images it fires on",
        y_axis_label="mean activation where it fires",
        tools="pan,wheel_zoom,box_zoom,reset,tap",
        output_backend="webgl",
    )
    source = ColumnDataSource(_points(table, entropy))
    points = scatter.scatter(
        "frequency", "mean", source=source, size=5, color={"field": "entropy", "transform": mapper}, alpha=0.75
    )
    mask = pc.is_in(table["latent"], value_set=shown).to_numpy(zero_copy_only=False)
    ringed = ColumnDataSource(_points(table.filter(pa.array(mask)), entropy[mask]))
    rings = scatter.scatter(
        "frequency", "mean", source=ringed, size=10, fill_alpha=0, line_color="#d1435b", line_width=1.2
    )
    scatter.add_tools(HoverTool(renderers=[points], tooltips=tooltips))
    taps = scatter.select_one(TapTool)
    taps.renderers = [rings]
    taps.callback = OpenURL(url="#latent-@latent", same_tab=True)
    scatter.add_layout(ColorBar(color_mapper=mapper, title="label entropy"), "right")

    densities = np.log10(concepts.table["density"].to_numpy(zero_copy_only=False) + 1e-9)
    counts, edges = np.histogram(densities[densities > -9], bins=40)
    histogram = figure(
        width=440, height=440, x_axis_label="log10 share of tokens it fires on", y_axis_label="latents", tools=""
    )
    histogram.quad(top=counts, bottom=0, left=edges[:-1], right=edges[1:], color="#4a7fb5", line_color="white")
    for plot in (scatter, histogram):
        plot.toolbar.logo = None
    script, element = components(row(scatter, histogram))
    resources = Resources(mode="inline", components=["bokeh", "bokeh-gl"])  # 1.2 MB; all of bokeh is 4.5
    return str(resources.render()), script + element, _draw_curves(concepts.artifact.provenance.get("curves", {}))


def _draw_curves(curves: dict[str, list[float]]) -> str:
    """Loss, FVU, L0 and the share of dead latents by step; "" without any."""
    from bokeh.embed import components
    from bokeh.layouts import row
    from bokeh.plotting import figure

    if not curves:
        return ""
    plots = []
    for name, title, scale in (
        ("loss", "loss", "log"), ("fvu", "FVU of the batch", "log"), ("l0", "L0", "linear"), ("dead", "dead", "linear"),
    ):  # fmt: skip
        plot = figure(width=275, height=220, title=title, x_axis_label="step", y_axis_type=scale, tools="")
        plot.line(curves["step"], curves[name], color="#4a7fb5", line_width=1.5)
        plot.toolbar.logo = None
        plots.append(plot)
    script, element = components(row(*plots))
    return str(script + element)


def _points(table: pa.Table, entropy: NDArray[np.float64]) -> dict[str, Any]:
    return {
        "latent": table["latent"].to_numpy(),
        "frequency": table["image_frequency"].to_numpy(),
        "mean": table["mean_activation"].to_numpy(),
        "maximum": table["max_activation"].to_numpy().astype(np.float64),
        "entropy": entropy,
    }


def _number(value: pa.Scalar) -> float | None:
    number = float(value.as_py())
    return None if np.isnan(number) else number


def _base64(data: bytes | None) -> str:
    return base64.b64encode(data).decode() if data else ""


def _safe(html: str) -> Any:
    """Mark text that bokeh wrote as HTML."""
    from markupsafe import Markup

    return Markup(html)
