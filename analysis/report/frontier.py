"""The plots of a benchmark: what runs and baselines achieve at which L0, and each measure against the width.

A run is a point in the color and shape of its variant. Runs that differ only in their seed are small points around
their mean. Settings of one variant and width are joined, so that the line is what the variant achieves as L0 grows.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from analysis.report.page import (
    BLUE,
    GOLD,
    GREEN,
    INK,
    PURPLE,
    RED,
    Plot,
    finish_plot,
    start_plot,
)
from analysis.results import Benchmark, BenchmarkSubject, BenchmarkValue

STYLES = (
    (BLUE, "circle"), (GREEN, "square"), (RED, "triangle"), (PURPLE, "diamond"), (GOLD, "inverted_triangle"),
    ("#12939a", "hex"), ("#c05299", "star"),
)  # fmt: skip
"""Color and marker of each variant, in the order in which they occur."""
BASELINES = {"pca": ("solid", "PCA, k largest"), "raw": ("dotted", "raw dimensions"), "k-means": ("solid", "k-means")}
MARKERS = {"pca": "cross", "raw": "dash", "k-means": "x"}
FRONTIERS = (("fvu", "log", "FVU (lower is better)"), ("k-sparse accuracy", "linear", "k-sparse probe accuracy"))
"""The measures that are drawn against L0, with the scale and the label of their axis."""
KINDS = (" cls", " patch")
X_SPARE = 1.25
"""Factor by which the axis of L0 goes beyond the first and the last point."""


class Point(NamedTuple):
    """A setting: one run, or the mean over runs that differ only in their seed.

    Attributes:
        low, high: the ends of the 95 % intervals over images, the widest of all seeds.
        spread: standard deviation over seeds.
        members: (x, y) of each seed, if there are several.
    """

    subject: BenchmarkSubject
    name: str
    x: float
    y: float
    low: float | None
    high: float | None
    spread: float | None
    members: Sequence[tuple[float, float]]


def draw_frontiers(result: Benchmark) -> list[Plot]:
    """FVU and k-sparse accuracy against L0, as far as they were measured."""
    known = _index(result)
    styles = choose_styles(result.subjects)

    def l0(subject: BenchmarkSubject) -> float | None:
        value = known.get((subject.name, "l0"))
        return None if value is None else value.value

    plots = []
    for measure, scale, label in FRONTIERS:
        points = gather_points(result.subjects, known, measure, l0)
        points = [point for point in points if point.x > 0 and (scale == "linear" or point.y > 0)]
        if any(point.subject.baseline is None for point in points):
            plots.append(_draw_frontier(result, points, styles, measure, scale, label))
    return plots


def draw_widths(result: Benchmark) -> list[Plot]:
    """A small plot for each measure, of the settings that occur with several numbers of latents."""
    known = _index(result)
    styles = choose_styles(result.subjects)
    measures = [name for name in dict.fromkeys(each.measure for each in result.values) if not name.endswith(KINDS)]
    rising = {value.measure: value.higher_is_better for value in result.values}
    plots = []
    for measure in measures:
        points = gather_points(result.subjects, known, measure, lambda subject: float(subject.n_latents))
        lines = [line for line in _join(points, lambda point: _setting(point.subject, known)) if _n_places(line) > 1]
        if not any(line[0].subject.baseline is None for line in lines):
            continue
        plot = start_plot(
            f"{measure} {'↑' if rising[measure] else '↓'}", height=230, x_axis_type="log", x_axis_label="latents",
            tools="pan,wheel_zoom,reset",
        )  # fmt: skip
        _tick(plot, sorted({point.x for line in lines for point in line}))
        _hover(plot, [_draw_line(plot, line, styles, legend=False) for line in lines], "latents", "0,0", measure)
        plots.append(finish_plot(plot, size="third"))
    return plots


def choose_styles(subjects: Iterable[BenchmarkSubject]) -> dict[str, tuple[str, str]]:
    """Color and marker of each variant."""
    variants = dict.fromkeys(subject.variant for subject in subjects if subject.baseline is None)
    return {variant: STYLES[i % len(STYLES)] for i, variant in enumerate(variants)}


def gather_points(
    subjects: Iterable[BenchmarkSubject], known: Mapping[tuple[str, str], BenchmarkValue], measure: str,
    x_of: Callable[[BenchmarkSubject], float | None],
) -> list[Point]:  # fmt: skip
    """The settings that have both numbers, in the order of the subjects."""
    members: dict[str, list[tuple[BenchmarkSubject, float, BenchmarkValue]]] = {}
    for subject in subjects:
        x, value = x_of(subject), known.get((subject.name, measure))
        if x is not None and value is not None and value.value is not None:
            members.setdefault(subject.group or subject.name, []).append((subject, x, value))
    points = []
    for name, found in members.items():
        y = [value.value for _, _, value in found if value.value is not None]
        mean = sum(y) / len(y)
        lows = [value.low for _, _, value in found if value.low is not None]
        highs = [value.high for _, _, value in found if value.high is not None]
        points.append(
            Point(
                found[0][0], name, sum(x for _, x, _ in found) / len(found), mean,
                min(lows) if lows else None, max(highs) if highs else None,
                math.sqrt(sum((each - mean) ** 2 for each in y) / (len(y) - 1)) if len(y) > 1 else None,
                [(x, value) for (_, x, _), value in zip(found, y, strict=True)] if len(y) > 1 else [],
            )
        )  # fmt: skip
    return points


def _index(result: Benchmark) -> dict[tuple[str, str], BenchmarkValue]:
    return {(value.subject, value.measure): value for value in result.values}


def _draw_frontier(
    result: Benchmark, points: list[Point], styles: Mapping[str, tuple[str, str]], measure: str, scale: str, label: str
) -> Plot:
    plot = start_plot(
        f"{measure} against L0", height=420, x_axis_type="log", y_axis_type=scale, y_axis_label=label,
        x_axis_label="active latents of a token (L0)", tools="pan,wheel_zoom,box_zoom,reset",
    )  # fmt: skip
    clusters = [point for point in points if point.subject.baseline == "k-means"]
    points = [point for point in points if point.subject.baseline != "k-means"]
    first, last = min(point.x for point in points) / X_SPARE, max(point.x for point in points) * X_SPARE
    plot.x_range.start, plot.x_range.end = first, last
    _tick(plot, [2.0**n for n in range(math.ceil(math.log2(first)), math.floor(math.log2(last)) + 1)])
    for point in clusters:  # their L0 is 1, where no SAE stands
        plot.line([first, last], [point.y] * 2, color=INK, line_dash="dashdot", legend_label="k-means (its L0 is 1)")
    x, fvu = cut_curve([(each.n_components, each.fvu) for each in result.pca_curve], first, last)
    if measure == "fvu" and x:
        plot.line(x, fvu, color=INK, line_dash="dashed", legend_label="PCA by rank")
    lines = _join(points, lambda point: (point.subject.baseline, point.subject.variant, point.subject.n_latents))
    # An untrained SAE is told from its run by its open marker, so one entry of the legend does for all variants.
    untrained = next((line for line in lines if line[0].subject.baseline == "untrained"), None)
    found = [
        _draw_line(plot, line, styles, legend=line[0].subject.baseline != "untrained" or line is untrained)
        for line in lines
    ]
    _hover(plot, found, "L0", "0.0", measure)
    if scale == "log":
        heights = [point.y for point in (*points, *clusters)]
        ends = math.floor(math.log10(min(heights))), math.ceil(math.log10(max(heights)))
        plot.yaxis.ticker = [step * 10.0**n for n in range(*ends) for step in (1, 2, 5)] + [10.0 ** ends[1]]
        plot.yaxis.formatter.min_exponent = 4
    return finish_plot(plot, _caption(points, curve=measure == "fvu" and bool(x)), n_columns=2)


def cut_curve(points: Sequence[tuple[float, float]], first: float, last: float) -> tuple[list[float], list[float]]:
    """The x and y of a curve of positive numbers from `first` to `last`, with straight pieces on logarithmic scales."""
    known = [(math.log(x), math.log(y)) for x, y in points if y > 0]
    if len(known) < 2:
        return [], []
    low, high = max(math.log(first), known[0][0]), min(math.log(last), known[-1][0])
    x = sorted({low, high, *(each for each, _ in known if low < each < high)}) if low < high else []
    y = np.interp(x, [each for each, _ in known], [each for _, each in known]).tolist()
    return [math.exp(each) for each in x], [math.exp(each) for each in y]


def _caption(points: Sequence[Point], *, curve: bool) -> str:
    parts = ["A line joins the settings of one variant and width; dashed lines with open markers are untrained SAEs."]
    if any(point.members for point in points):
        parts.append(
            "A marker is the mean over seeds, each of which is a small dot: the thick bar is their standard deviation, "
            "the thin one goes from the lowest to the highest end of their 95 % intervals over images."
        )
    else:
        parts.append("Bars are 95 % intervals over images.")
    if len({point.subject.n_latents for point in points if point.subject.baseline is None}) > 1:
        parts.append("Larger markers have more latents.")
    if curve:
        parts.append("PCA by rank: all tokens share as many components as the axis says.")
    return " ".join(parts)


def _join(points: Iterable[Point], key: Callable[[Point], object]) -> list[list[Point]]:
    """Points with the same key, from left to right."""
    lines: dict[object, list[Point]] = {}
    for point in points:
        lines.setdefault(key(point), []).append(point)
    return [sorted(line, key=lambda point: point.x) for line in lines.values()]


def _setting(subject: BenchmarkSubject, known: Mapping[tuple[str, str], BenchmarkValue]) -> object:
    """What runs have in common that differ in their number of latents. Without a k, it is L0 to the nearest octave."""
    k: float | None = subject.k
    if k is None and (l0 := known.get((subject.name, "l0"))) is not None and l0.value:
        k = round(math.log2(l0.value)) + 0.5  # no k is half a number
    return subject.baseline, subject.variant, k


def _n_places(line: Sequence[Point]) -> int:
    return len({point.x for point in line})


def _draw_line(
    plot: Any, line: Sequence[Point], styles: Mapping[str, tuple[str, str]], *, legend: bool = True
) -> Any:  # fmt: skip
    """Draw the points of a line, and return what the mouse finds."""
    from bokeh.models import ColumnDataSource

    subject = line[0].subject
    trained = subject.baseline is None
    color, marker = styles.get(subject.variant, STYLES[0])
    dash, label = "solid", subject.variant
    if subject.baseline == "untrained":
        dash, label = "dashed", "untrained"
    elif subject.baseline is not None:
        color, marker = INK, MARKERS[subject.baseline]
        dash, label = BASELINES[subject.baseline]
    widest = max(point.subject.n_latents for point in line)
    size = (6 + 0.75 * math.log2(widest / 256)) if widest > 256 else 6.0
    size = 10.0 if subject.baseline in MARKERS else min(size, 14)
    alpha = 1.0 if trained else 0.7
    x, y = [point.x for point in line], [point.y for point in line]
    named = {"legend_label": label} if legend else {}
    if len(line) > 1:
        plot.line(x, y, color=color, line_dash=dash, line_width=2 if trained else 1.4, alpha=alpha, **named)
    for point in line:
        if point.low is not None and point.high is not None:
            plot.segment(point.x, point.low, point.x, point.high, color=color, line_width=1, alpha=alpha)
        if point.spread is not None:
            ends = point.y - point.spread, point.y + point.spread
            plot.segment(point.x, ends[0], point.x, ends[1], color=color, line_width=3.5, alpha=0.5 * alpha)
    members = [pair for point in line for pair in point.members]
    if members and trained:
        plot.scatter([pair[0] for pair in members], [pair[1] for pair in members], color=color, size=3, alpha=0.6)
    source = ColumnDataSource({
        "x": x, "y": y,
        "name": [f"{describe_setting(point.subject)}{f', {len(point.members)} seeds' if point.members else ''}"
                 for point in line],
        "range": [_say_range(point) for point in line],
    })  # fmt: skip
    return plot.scatter(
        "x", "y", source=source, marker=marker, size=size, line_color=color, fill_color=color if trained else None,
        alpha=alpha, line_width=1.5, **named,
    )  # fmt: skip


def describe_setting(subject: BenchmarkSubject) -> str:
    """topk, 1,536 latents, k 16."""
    kind = {None: subject.variant, "untrained": f"untrained {subject.variant}"}.get(
        subject.baseline, BASELINES.get(subject.baseline or "", ("", subject.baseline))[1]
    )
    return f"{kind}, {subject.n_latents:,} latents" + ("" if subject.k is None else f", k {subject.k}")


def _say_range(point: Point) -> str:
    if point.spread is not None:
        return f"± {point.spread:.2g} over seeds"
    if point.low is None or point.high is None:
        return ""
    return f"{point.low:.4g} to {point.high:.4g}"


def _tick(plot: Any, at: Sequence[float]) -> None:
    """Plain numbers at these places of the logarithmic x axis."""
    from bokeh.models import NumeralTickFormatter

    plot.xaxis.ticker = at
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0.[0]")


def _hover(plot: Any, found: list[Any], x: str, form: str, measure: str) -> None:
    from bokeh.models import HoverTool

    tips = [("", "@name"), (x, f"@x{{{form}}}"), (measure, "@y{0.0000} @range")]
    plot.add_tools(HoverTool(renderers=found, tooltips=tips))
