"""A k-sparse probe as a section of a page: the curve with its controls, and the chosen latents with links."""

from markupsafe import Markup

from analysis.concepts import ConceptTable
from analysis.report.page import BLUE, GRAY, RED, Section, draw_level, draw_line, fill, finish_plot, start_plot
from analysis.results import Probing, say_difference

COLORS = {"chosen": BLUE, "random": RED, "shuffled": GRAY}
TITLES = {"chosen": "chosen latents", "random": "random, as frequent", "shuffled": "shuffled labels"}
MEASURES = {"accuracy": "accuracy", "r2": "R²"}
N_SHOWN = 32


def draw_probing(result: Probing, concepts: ConceptTable) -> Section:
    """The section. Latents are linked where the page's own table is of the same codes."""
    measure = MEASURES[result.measure]
    plot = start_plot(
        f"{measure} of {result.column} by latents", height=400, x_axis_type="log", x_axis_label="latents k",
        y_axis_label=measure, tooltips=[("", "$name"), ("k", "@x"), (measure, "@y{0.000}")],
    )  # fmt: skip
    raw = result.raw
    if raw is not None and raw.score is not None:
        draw_level(plot, raw.score, "solid", "raw activations")
    draw_level(plot, result.chance, "dotted", "a constant answer")
    plot.xaxis.ticker = sorted({point.k for point in result.curve})
    for selection in dict.fromkeys(point.selection for point in result.curve):
        points = [
            (float(point.k), point.score, point.low, point.high)
            for point in result.curve
            if point.selection == selection
            if point.score is not None and point.low is not None and point.high is not None
        ]
        draw_line(
            plot, points, COLORS[selection], TITLES[selection], dash="solid" if selection == "chosen" else "dashed"
        )
    rows = [["k", "minus", "difference", "95 % interval"]]
    for each in result.differences:
        interval = "n/a" if each.low is None or each.high is None else f"{each.low:+.3f} to {each.high:+.3f}"
        rows.append(
            [str(each.k), "raw activations" if each.to == "raw" else TITLES[each.to], say_difference(each), interval]
        )
    level = f"Level lines: raw activations (solid, {raw.features}), " if raw is not None else "Level line: "
    by = "F over the classes" if result.classes is not None else "correlation"
    text = (
        f"How well linear probes on k latents predict {result.column} on {result.n_judged:,} images. Latents were "
        f"ranked (by {by}) and penalties chosen on {result.n_chosen:,} other images. Bands are "
        f"95 % intervals. {level}a constant answer (dotted)."
    )
    more = fill("probing.html.jinja", rows=_list_latents(result, concepts))
    return Section(f"Probing {result.column}", text, [finish_plot(plot)], rows, more)


def _list_latents(result: Probing, concepts: ConceptTable) -> list[list[str]]:
    own = concepts.artifact.parents["codes"].id == result.parents["codes"].id
    shown = set(concepts.gallery["latent"].to_pylist()) if own else set()
    classes = result.classes is not None
    rows = [["latent", "name", "F" if classes else "r", "fires on images", "in the probe on k", "weight"]]
    rows[0] += ["for"] if classes else []
    for each in result.latents[:N_SHOWN]:
        number = str(each.latent)
        link = Markup('<a href="#latent-{0}">{0}</a>').format(number) if each.latent in shown else number
        ranking = "∞" if each.ranking is None else f"{each.ranking:.3g}"
        rows.append([link, each.name, ranking, f"{each.images:.1%}", str(each.k), f"{each.weight:+.3g}"])
        rows[-1] += [] if each.class_ is None else [each.class_]
    return rows
