"""write_adaptation_page(): a comparison becomes one HTML file without network.

In: what `compare` found, and the two concept tables for pictures. Out: accuracies, masking curves, scatter of counts,
overlap by class, shared and exclusive concepts with images, confusion matrices.
"""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import pyarrow.compute as pc

from actcache import write_atomic
from analysis.concepts import ConceptTable

N_SHOWN, N_PICTURES = 6, 6
COLORS = {"base": "#c4551d", "adapted": "#0b6bcb"}
MAX_CLASSES = 40
"""Larger confusion matrices nobody can read."""


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
        for name, table in (("base", base), ("adapted", adapted))
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    whole = found["overlap"]["dataset"]
    numbers = ("jaccard", "rank_biased_overlap", "n_high", "n_high_to_low", "n_low_to_high")
    rows = [*found["overlap"]["classes"], found["overlap"]["task"] | {"class": "mean of the classes"}]
    rows = [{"class": row["class"], **{n: _say(row[n]) for n in numbers}} for row in rows]
    rows.append({"class": "dataset", **{n: _say(whole[n]) for n in numbers}})
    resources, curves, scatter = _draw(found)
    small = len(found["classes"]) <= MAX_CLASSES
    page = environment.get_template("adaptation.html.jinja").render(
        title=f"What {found['prompts']['method']} changed",
        subtitle=f"{found['hook_point']}, {len(found['classes'])} classes, latents chosen on {found['n_chosen']:,} "
        f"images, judged on {found['n_judged']:,}",
        conclusion=found["conclusion"]["sentence"], accuracy=found["accuracy"], improvement=_say(found["improvement"]),
        keep_error=True, rows=rows, correlation=_say(whole["correlation"]),
        log_correlation=_say(whole["log_correlation"]), classes=found["classes"],
        concepts={
            "shared": [_picture(tables["base"], n) for n in whole["shared"][:N_SHOWN]],
            "only of the base model": [_picture(tables["base"], n) for n in whole["base_only"][:N_SHOWN]],
            "only of the adapted model": [_picture(tables["adapted"], n) for n in whole["adapted_only"][:N_SHOWN]],
        },
        confusion=found["confusion"] if small else {}, resources=_safe(resources), curves=_safe(curves),
        scatter=_safe(scatter),
    )  # fmt: skip
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, page.encode())
    return out


def _picture(concepts: ConceptTable, latent: int) -> dict[str, Any]:
    """A latent's strongest images, as far as they were kept."""
    rows = concepts.top_images.filter(pc.equal(concepts.top_images["latent"], latent)).sort_by("rank")
    kept = [concepts.thumbnail(image) for image in rows["image"].to_pylist()[: 3 * N_PICTURES]]
    return {"number": latent, "pictures": [base64.b64encode(data).decode() for data in kept if data][:N_PICTURES]}


def _draw(found: Mapping[str, Any]) -> tuple[str, str, str]:
    """(script for the head, masking curves, scatter), by bokeh."""
    from bokeh.embed import components
    from bokeh.layouts import row
    from bokeh.models import HoverTool
    from bokeh.plotting import figure
    from bokeh.resources import Resources

    panels = []
    for model in COLORS:
        plot = figure(
            width=520, height=320, x_axis_type="log", title=f"judged with the {model} model", toolbar_location=None
        )
        plot.xaxis.axis_label, plot.yaxis.axis_label = "latents a class", "accuracy"
        for chosen_by, color in COLORS.items():
            for selection, dash in (("class", "solid"), ("random", "dashed")):
                line = sorted(
                    (r["k"], r["accuracy"], r["accuracy_low"], r["accuracy_high"])
                    for r in found["masks"]
                    if (r["classified_by"], r["chosen_by"], r["selection"]) == (model, chosen_by, selection)
                    and r["keep_error"]
                )
                if line:
                    k, mean, low, high = zip(*line, strict=True)
                    plot.varea(x=k, y1=low, y2=high, color=color, alpha=0.08)
                    plot.scatter(k, mean, color=color, size=5)
                    plot.line(
                        k, mean, color=color, line_dash=dash, line_width=2, legend_label=f"{chosen_by}, {selection}"
                    )
        plot.legend.location = "top_left"
        plot.legend.background_fill_alpha = 0.6
        panels.append(plot)
    latents, base, adapted = found["overlap"]["scatter"]
    data = {"latent": latents, "base": [n + 0.5 for n in base], "adapted": [n + 0.5 for n in adapted]}
    points = figure(width=520, height=420, x_axis_type="log", y_axis_type="log", toolbar_location=None)
    points.xaxis.axis_label, points.yaxis.axis_label = "tokens, base model", "tokens, adapted model"
    points.scatter("base", "adapted", source=data, size=5, alpha=0.4, color="#0b6bcb")
    top = max([1, *data["base"], *data["adapted"]])
    points.line([0.5, top], [0.5, top], color="#5b6875", line_dash="dotted")
    points.add_tools(HoverTool(tooltips=[("latent", "@latent"), ("base", "@base"), ("adapted", "@adapted")]))
    script, (first, second) = components((row(*panels), points))
    return Resources(mode="inline", components=["bokeh"]).render() + script, first, second


def _say(value: float | None) -> str:
    if value is None or value != value:
        return "n/a"
    return f"{value:.2f}" if isinstance(value, float) else f"{value}"


def _safe(html: str) -> Any:
    """Mark text that bokeh wrote as HTML."""
    import markupsafe

    return markupsafe.Markup(html)
