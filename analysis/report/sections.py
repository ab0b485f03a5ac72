"""The report's section for each kind of result: result files in, plots and tables out. Needs bokeh only, no model.

SECTIONS is the table of all kinds: a new kind of result is a record in analysis/results, a function and a line here.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from actcache.artifacts import open_artifact, read_settings, read_summary
from actcache.prompts import ZERO_SHOT, PromptSettings, PromptsSummary
from analysis.concepts import ConceptTable
from analysis.report.comparison import Address, draw_comparison, find_tables
from analysis.report.frontier import draw_frontiers, draw_widths
from analysis.report.page import Section, contradictions, draw_level, draw_line, fill, finish_plot, start_plot
from analysis.report.probing import draw_probing
from analysis.results import (
    BENCHMARK_TABLES,
    Benchmark,
    Comparison,
    Deletion,
    Fidelity,
    Inspection,
    JudgeFacts,
    LearnedRules,
    LocalizedConcepts,
    MaskingCurve,
    Probing,
    Result,
    Row,
    Steerability,
    Steering,
    read_result,
)

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


ANSWERS = {"zero-shot": "Zero-shot answers", "probe": "Answers of a probe", "head": "The classifier's answers"}
EXPLAINED = {
    "zero-shot": "CLIP's zero-shot answer", "probe": "a probe's answer", "head": "the checkpoint's own answer",
}  # fmt: skip


def draw_sections(
    results: Sequence[str | Path], concepts: ConceptTable, *, address: Address | None = None
) -> list[Section]:
    """One section per result file or x.prompts folder.

    Args:
        concepts: the table that the page is about.
        address: where a latent of the table is shown; by default, those of its gallery are on the same page.

    Raises:
        SettingsError, SchemaError, CorruptError: a file is not a result, or is malformed.
    """
    sections, find = [], address or _anchors(concepts)
    for path in map(Path, results):
        if path.is_dir():
            sections.append(show_adaptation(path))
            continue
        result = read_result(path, *SECTIONS)
        with contradictions(path):
            section = SECTIONS[type(result)](result, concepts, path.parent, find)
        sections.append(section._replace(notes=result.notes()))
    return sections


def _anchors(concepts: ConceptTable) -> Address:
    shown = set(concepts.gallery["latent"].to_pylist())
    return lambda latent: f"#latent-{latent}" if latent in shown else ""


def draw_compared(comparison: Comparison, concepts: ConceptTable, folder: Path, address: Address) -> Section:
    tables = find_tables(comparison, concepts, folder)
    is_of_table = concepts in tables.values()
    return draw_comparison(comparison, tables, address=address if is_of_table else lambda latent: "")


def draw_masks(result: MaskingCurve) -> Section:
    """Accuracy against k, kept and dropped, with 95 % intervals; the margins over the random control as a table."""
    judge = result.judged_by
    levels = {row.mode: row.accuracy for row in result.curve if row.selection == "all"}
    masked = [row for row in result.curve if isinstance(row.k, int)]
    plots = []
    for mode, title in MODES.items():
        plot = _start(title, "latents k", judge.name)
        plot.y_range.start = 0
        for name, style, level in LEVELS:
            draw_level(plot, levels[name], style, level)
        plot.xaxis.ticker = sorted({row.k for row in masked})
        for selection in dict.fromkeys(row.selection for row in masked):
            points = [
                (float(row.k), row.accuracy, row.accuracy_low, row.accuracy_high)
                for row in masked
                if (row.selection, row.mode) == (selection, mode)
            ]
            draw_line(plot, points, COLORS[selection], TITLES[selection])
        plots.append(finish_plot(plot))
    head = ["selection", "latents", "k", "accuracy minus random", "95 % interval"]
    rows = [
        [TITLES[m.selection], m.mode, str(m.k), f"{m.margin:+.3f}", f"{m.low:+.3f} to {m.high:+.3f}"]
        for m in result.margins
        if m.selection != "dataset"
    ]
    error = "kept" if result.settings["keep_error"] else "left out"
    text = (
        f"{_accuracy(judge)} on {result.n_judged:,} images when the classifier sees only some of the "
        f"{result.n_latents:,} latents of {result.run}, or all but these ({result.tokens} tokens of "
        f"{result.hook_point}, error term {error}). Latents were chosen on {result.n_chosen:,} other images by how "
        "often they fire. Bands and bars are 95 % intervals. Level lines: original (solid), all latents (dashed), none "
        "(dotted). The oracle's mask knows the true class, so what it keeps gives the answer away: the mask of the "
        f"predicted class is the fair one."
    )
    return Section("Masking latents", text, plots, [head, *rows])


def draw_deletion(result: Deletion) -> Section:
    """Cosine with the predicted class against the number of deleted latents, by method."""
    judge = result.judged_by
    what = "cosine with" if judge.kind == "zero-shot" else "logit of"
    plot = _start("deleting latents, the largest first", "1 + latents deleted", f"{what} the predicted class")
    for method in dict.fromkeys(point.method for point in result.curve):
        points = [(1.0 + p.n, p.y, p.low, p.high) for p in result.curve if p.method == method]
        draw_line(plot, points, COLORS[method], method)
    margins = {m.method: m for m in result.margins}
    rows = [["method", "area", "minus attribution", "95 % interval"]]
    for method, area in sorted(result.areas.items(), key=lambda item: item[1]):
        m = margins.get(method)
        more = [f"{m.margin:+.4f}", f"{m.low:+.4f} to {m.high:+.4f}"] if m else ["", ""]
        rows.append([method, f"{area:.4f}", *more])
    text = (
        f"Latents are deleted from {result.n_judged:,} images one after another, in the order in which a method ranks "
        f"their effect on the decision; the faster the {what.split()[0]} falls, the better the ranking. Area: mean of "
        f"the curve, smaller is better."
    )
    return Section("Which latents decide", text, [finish_plot(plot)], rows)


def show_fidelity(result: Fidelity) -> Section:
    head = ["run", "hook point", "tokens", "activations", "accuracy", "95 % interval", "loss", "same prediction"]
    rows = [
        [
            run.run, run.hook_point, run.tokens, name, f"{v.accuracy:.3f}",
            f"{v.accuracy_low:.3f} to {v.accuracy_high:.3f}", f"{v.loss:.3f}", f"{v.same_prediction:.3f}",
        ]
        for run in result.runs
        for name, v in run.variants.items()
    ]  # fmt: skip
    judge = result.judged_by
    text = f"{_accuracy(judge)} and loss with the SAE in place of the activations it reads, beside ablations."
    return Section("Fidelity", text, [], [head, *rows])


def show_steering(result: Steering) -> Section:
    judge = result.judged_by
    rows = [["class", "change of its probability", "predicted before", "predicted after"]]
    for name, shift in result.shift.items():
        before, after = result.predicted[name]
        rows.append([name, f"{shift:+.4f}", f"{before:,}", f"{after:,}"])
    changes = [
        f"latent {latent} {verb} {value:g}"
        for setting, verb in (("set", "set to"), ("add", "raised by"))
        for latent, value in _values(result.settings[setting])
    ]
    text = (
        f"{ANSWERS[judge.kind]} on {result.n_judged:,} images before and after latents of {result.run} are changed on "
        f"every one of the {result.tokens} tokens ({'; '.join(changes)}). Accuracy goes from "
        f"{result.before.accuracy:.1%} to {result.after.accuracy:.1%}, loss from {result.before.loss:.3f} to "
        f"{result.after.loss:.3f}."
    )
    return Section("Setting latents", text, [], rows)


def _values(setting: object) -> list[tuple[str, float]]:
    return list(setting.items()) if isinstance(setting, Mapping) else []


def show_steerability(result: Steerability) -> Section:
    head = ["what is set", "to", "how many", "steerable", "coverage", "mean S", "mean power"]
    rows = [
        [
            r.kind, f"{r.strength:g}", str(r.n), f"{r.steerable:.1%}", str(r.coverage), f"{r.steerability:.4f}",
            f"{r.power:.4f}",
        ]
        for r in result.summary
    ]  # fmt: skip
    judge = result.judged_by
    words = "words" if judge.kind == "zero-shot" else "classes"
    text = (
        f"How the probabilities of {result.n_words:,} {words} move when one latent, or one dimension of the stream, is "
        "set on every token. A latent is steerable when the squares of the changes add up to more than 0.1."
    )
    return Section("Steering", text, [], [head, *rows])


def show_rules(result: LearnedRules) -> Section:
    rows = [["class", "rule", "precision", "fires on images", "recall"]]
    for name, learned in result.classes.items():
        for i, rule in enumerate(learned.rules):
            precision = "" if rule.precision is None else f"{rule.precision:.0%}"
            recall = "" if i or learned.recall is None else f"{learned.recall:.0%}"
            rows.append([name if not i else "", rule.text, precision, f"{rule.n_fires:,}", recall])
    judge = result.judged_by
    explained = "the label" if result.settings["explain"] == "label" else EXPLAINED[judge.kind]
    text = (
        f"{result.size.rules} rules over {result.size.latents} latents for {explained}, learned on "
        f"{result.n_learned:,} images and judged on {result.n_judged:,}: fidelity {result.fidelity:.1%}, accuracy "
        f"{result.accuracy:.1%} ({result.accuracy_low:.1%} to {result.accuracy_high:.1%}); the largest class alone "
        f"{result.majority:.1%}. An image takes the class of the most precise rule that fires, or {result.default} if "
        "none does. Precision: share of the class among the images that the rule fires on. Recall: share of the "
        f"class's images that are classified correctly."
    )
    return Section("Rules", text, [], rows)


def show_inspection(result: Inspection) -> Section:
    rows = [["run", "latents", "firing", "L0", "FVU", "refit", "pursuit", "gap", "nearest (median)"]]
    for run in result.runs:
        gap = run.gap
        fvus = [f"{value:.4f}" for value in (gap.fvu, gap.fvu_refit, gap.fvu_pursuit, gap.gap)]
        nearest = f"{run.coherence.quantiles[1]:.3f}"
        rows.append([run.run, f"{run.n_latents:,}", f"{run.n_firing:,}", f"{gap.l0:.1f}", *fvus, nearest])
    matched = [
        f"{pair.first} and {pair.second}: mean cosine {pair.mean_cosine:.3f}, above 0.7 {pair.above_70:.0%}, above 0.9 "
        f"{pair.above_90:.0%}"
        + ("" if pair.mean_cosine_shuffled is None else f" ({pair.mean_cosine_shuffled:.3f} by chance)")
        for pair in result.matchings
    ]
    text = (
        "Gap: the FVU that the encoder loses against a pursuit over the same dictionary with as many latents. Refit: "
        "the SAE's latents with the best values. Nearest: largest |cosine| of a latent with another one."
    )
    if matched:
        text += f" Dictionaries matched one to one: {'; '.join(matched)}."
    return Section("Dictionaries", text, [], rows)


def show_localization(result: LocalizedConcepts) -> Section:
    rows = [["concept", "latent", "AP", "chance", "pointing game", "IoU", "AP when chosen", "images"]]
    for row in result.concepts:
        numbers = [f"{value:.3f}" for value in (row.ap, row.chance, row.pointing, row.iou, row.chosen_ap)]
        rows.append([row.concept, str(row.latent), *numbers, f"{row.n_images:,}"])
    text = (
        f"How well latents find the pixels of known concepts, on {result.n_images:,} images with masks. Latent and "
        "threshold were chosen on one half of the images and judged on the other. AP: average precision over pixels; "
        "chance is the AP of a constant."
    )
    return Section("Localization", text, [], rows)


def show_benchmark(result: Benchmark) -> Section:
    """The frontiers; the tables with seeds together, and the differences; each run; each measure against width."""
    parts = [(name, by_tokens) for name in BENCHMARK_TABLES for by_tokens in (False, True)]
    tables, subjects = (
        [_to_cells(rows) for name, part in parts if (rows := result.rows(name, by_tokens=part, by_seeds=by_seeds))]
        for by_seeds in (True, False)
    )
    text = (
        "What the runs are worth beside baselines, judged on images that no run has learned from. An untrained SAE has "
        "its run's configuration and initial weights, PCA and raw dimensions keep the k largest coefficients of a "
        "token, k-means one. In brackets are 95 % intervals over images. Arrows say which direction is better; "
        'differences are paired, and "no difference" stands where 0 lies inside the interval.'
    )
    more = fill(
        "benchmark.html.jinja", tables=tables, subjects=subjects if result.seeds else [],
        differences=_to_cells(result.difference_rows()), widths=draw_widths(result),
    )  # fmt: skip
    return Section("Benchmark", text, draw_frontiers(result), [], more=more)


def _to_cells(rows: Sequence[Row]) -> list[list[str]]:
    """A header and the rows, as strings."""
    return [[*rows[0]], *(["" if cell is None else str(cell) for cell in row.values()] for row in rows)] if rows else []


def show_adaptation(path: Path) -> Section:
    """The accuracy without and with the prompts of an x.prompts folder."""
    artifact = open_artifact(path, "prompts", complete=True)
    summary = read_summary(artifact, PromptsSummary)
    judge = _judge_of_prompts(summary)
    rows = [["classes", judge, "with prompts"]]
    for name, before, after in summary.accuracy.parts():
        rows.append([name, f"{before:.1%}", "" if after is None else f"{after:.1%}"])
    method = read_settings(artifact, PromptSettings).method
    text = f"{judge[0].upper()}{judge[1:]} without and with the prompts of {path.name}."
    return Section(f"Adaptation by {method}", text, [], rows)


def _judge_of_prompts(summary: PromptsSummary) -> str:
    return f"{summary.judge} accuracy" if summary.judge == ZERO_SHOT else f"accuracy by {summary.judge}"


def _accuracy(judge: JudgeFacts) -> str:
    return f"{judge.name[0].upper()}{judge.name[1:]}"


def _start(title: str, x: str, y: str) -> Any:
    return start_plot(
        title, height=400, x_axis_type="log", x_axis_label=x, y_axis_label=y,
        tooltips=[("", "$name"), ("x", "@x"), ("y", "@y{0.000}")],
    )  # fmt: skip


def _alone(draw: Callable[[Any], Section]) -> Callable[[Any, ConceptTable, Path, Address], Section]:
    """A section that needs nothing but the result."""
    return lambda result, *_: draw(result)


SECTIONS: dict[type[Result], Callable[[Any, ConceptTable, Path, Address], Section]] = {
    Fidelity: _alone(show_fidelity),
    MaskingCurve: _alone(draw_masks),
    Steering: _alone(show_steering),
    Deletion: _alone(draw_deletion),
    Steerability: _alone(show_steerability),
    Inspection: _alone(show_inspection),
    LocalizedConcepts: _alone(show_localization),
    Benchmark: _alone(show_benchmark),
    LearnedRules: _alone(show_rules),
    Probing: lambda result, concepts, *_: draw_probing(result, concepts),
    Comparison: draw_compared,
}
"""Every kind of result, with the function that draws its section."""
