"""The report's section on causes: result files in, plots and tables out. Needs bokeh only, no model.

Of `intervene` the masking curve with its controls, of `attribute` the deletion curves, of `evaluate` the table of
fidelity, of `steer` the table of steerability, of `rules` the rules, of `compare` everything its own page shows.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actcache import SchemaError
from analysis.concepts import ConceptTable
from analysis.report.comparison import draw_comparison, find_tables
from analysis.report.page import Section, draw_level, draw_line, finish_plot, start_plot
from analysis.results import read_result

COLORS = {
    "class": "#0b6bcb", "predicted": "#2a9d5c", "list": "#0b6bcb", "dataset": "#b07d12", "random": "#d1435b",
    "attribution": "#0b6bcb", "activation": "#2a9d5c", "energy": "#7a57a8", "lens": "#b07d12",
}  # fmt: skip
TITLES = {
    "class": "true class (oracle)", "predicted": "predicted class", "list": "the given list",
    "dataset": "dataset", "random": "random, as frequent",
}  # fmt: skip
LEVELS = (("original", "solid", "original"), ("keep", "dashed", "all latents"), ("drop", "dotted", "no latents"))
MODES = {"keep": "only these latents", "drop": "all but these latents"}


def draw_sections(results: Sequence[str | Path], concepts: ConceptTable) -> list[Section]:
    """One section a result file. Raises SchemaError for a file that is no result, or of a kind that is not shown.

    Args:
        concepts: the table that the page is about; of a comparison, a link leads to a latent in its gallery.
    """
    sections = []
    for path in results:
        found = read_result(path)
        if found["kind"] == "comparison":
            tables = find_tables(found, concepts, Path(path).parent)
            anchors = set(concepts.gallery["latent"].to_pylist()) if concepts in tables.values() else set()
            sections.append(draw_comparison(found, tables, anchors=anchors))
        elif found["kind"] in DRAW:
            sections.append(DRAW[found["kind"]](found))
        else:
            raise SchemaError(f"{path} holds {found['kind']}, expected {', '.join(DRAW)} or comparison.")
    return sections


def draw_masks(found: dict[str, Any]) -> Section:
    """Accuracy against k, kept and dropped, with 95 % intervals; the margins over the random control as a table."""
    whole = {r["mode"]: r["accuracy"] for r in found["curve"] if r["selection"] == "all"}
    plots = []
    for mode, title in MODES.items():
        plot = _start(title, "latents k", "zero-shot accuracy")
        plot.y_range.start = 0
        for name, style, level in LEVELS:
            draw_level(plot, whole[name], style, level)
        plot.xaxis.ticker = sorted({r["k"] for r in found["curve"] if r["selection"] != "all"})
        for selection in dict.fromkeys(r["selection"] for r in found["curve"] if r["selection"] != "all"):
            rows = [r for r in found["curve"] if (r["selection"], r["mode"]) == (selection, mode)]
            points = [(r["k"], r["accuracy"], r["accuracy_low"], r["accuracy_high"]) for r in rows]
            draw_line(plot, points, COLORS[selection], TITLES[selection])
        plots.append(finish_plot(plot))
    head = ["selection", "latents", "k", "accuracy minus random", "95 % interval"]
    rows = [
        [TITLES[m["selection"]], m["mode"], str(m["k"]), f"{m['margin']:+.3f}", f"{m['low']:+.3f} to {m['high']:+.3f}"]
        for m in found["margins"]
        if m["selection"] != "dataset"
    ]
    error = "kept" if found["settings"]["keep_error"] else "left out"
    text = (
        f"Zero-shot accuracy on {found['n_judged']:,} images when the classifier sees some of the "
        f"{found['n_latents']:,} latents of {found['run']} only, or all but these ({found['tokens']} tokens of "
        f"{found['hook_point']}, error term {error}). Latents were chosen on {found['n_chosen']:,} other images by how "
        "often they fire. Bands and bars are 95 % intervals. Level lines: original (solid), all latents (dashed), none "
        "(dotted). The oracle's mask knows the true class, so what it keeps tells the answer by itself: the predicted "
        "class's mask is the honest one."
    )
    return Section("Masking latents", text, plots, [head, *rows])


def draw_deletion(found: dict[str, Any]) -> Section:
    """Cosine with the predicted class against the number of deleted latents, by method."""
    plot = _start("deleting latents, the largest first", "1 + latents deleted", "cosine with the predicted class")
    methods = dict.fromkeys(r["method"] for r in found["curve"])
    for method in methods:
        rows = [r for r in found["curve"] if r["method"] == method]
        draw_line(plot, [(1 + r["n"], r["y"], r["low"], r["high"]) for r in rows], COLORS[method], method)
    margins = {m["method"]: m for m in found["margins"]}
    rows = [["method", "area", "minus attribution", "95 % interval"]]
    for method, area in sorted(found["areas"].items(), key=lambda item: item[1]):
        m = margins.get(method)
        more = [f"{m['margin']:+.4f}", f"{m['low']:+.4f} to {m['high']:+.4f}"] if m else ["", ""]
        rows.append([method, f"{area:.4f}", *more])
    text = (
        f"Latents are deleted one after another from {found['n_judged']:,} images, those first that a method thinks "
        "the decision rests on; the faster the cosine falls, the better it knows. Area: mean of the curve, smaller is "
        "better."
    )
    return Section("Which latents decide", text, [finish_plot(plot)], rows)


def show_fidelity(found: dict[str, Any]) -> Section:
    head = ["run", "hook point", "tokens", "activations", "accuracy", "95 % interval", "loss", "same prediction"]
    rows = [
        [
            run["run"], run["hook_point"], run["tokens"], name, f"{v['accuracy']:.3f}",
            f"{v['accuracy_low']:.3f} to {v['accuracy_high']:.3f}", f"{v['loss']:.3f}", f"{v['same_prediction']:.3f}",
        ]
        for run in found["runs"]
        for name, v in run["variants"].items()
    ]  # fmt: skip
    text = "Zero-shot accuracy and loss with the SAE in place of the activations it reads, beside ablations."
    return Section("Fidelity", text, [], [head, *rows])


def show_steering(found: dict[str, Any]) -> Section:
    head = ["what is set", "to", "how many", "steerable", "coverage", "mean S", "mean power"]
    rows = [
        [
            r["kind"], f"{r['strength']:g}", str(r["n"]), f"{r['steerable']:.1%}", str(r["coverage"]),
            f"{r['steerability']:.4f}", f"{r['power']:.4f}",
        ]
        for r in found["summary"]
    ]  # fmt: skip
    text = (
        f"How the probabilities of {found['n_words']:,} words move when one latent, or one dimension of the stream, is "
        "set on every token. Steerable: the squares of the changes add up to more than 0.1."
    )
    return Section("Steering", text, [], [head, *rows])


def show_rules(found: dict[str, Any]) -> Section:
    rows = [["class", "rule", "precision", "fires on images", "recall"]]
    for name, one in found["classes"].items():
        for i, rule in enumerate(one["rules"]):
            right = "" if rule["precision"] is None else f"{rule['precision']:.0%}"
            recall = "" if i or one["recall"] is None else f"{one['recall']:.0%}"
            rows.append([name if not i else "", rule["text"], right, f"{rule['n_fires']:,}", recall])
    what = "CLIP's zero-shot answer" if found["settings"]["explain"] == "zero-shot" else "the label"
    size = found["size"]
    text = (
        f"{size['rules']} rules over {size['latents']} latents for {what}, learned on {found['n_learned']:,} images "
        f"and judged on {found['n_judged']:,}: fidelity {found['fidelity']:.1%}, accuracy {found['accuracy']:.1%} "
        f"({found['accuracy_low']:.1%} to {found['accuracy_high']:.1%}); the largest class alone "
        f"{found['majority']:.1%}. An image takes the class of the most precise rule that fires, {found['default']} "
        "where none does. Precision: images of the class among those the rule fires on; recall: images of the class "
        "that are told right."
    )
    return Section("Rules", text, [], rows)


def _start(title: str, x: str, y: str) -> Any:
    return start_plot(
        title, height=400, x_axis_type="log", x_axis_label=x, y_axis_label=y,
        tooltips=[("", "$name"), ("x", "@x"), ("y", "@y{0.000}")],
    )  # fmt: skip


DRAW = {
    "masks": draw_masks,
    "deletion": draw_deletion,
    "fidelity": show_fidelity,
    "steerability": show_steering,
    "rules": show_rules,
}
