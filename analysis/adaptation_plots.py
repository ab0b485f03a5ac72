"""The plots of a comparison: masking curves in the four settings, and the two models' counts. Needs bokeh only."""

from collections.abc import Mapping
from typing import Any

from analysis.page import BLUE, Plot, draw_level, draw_line, finish_plot, start_plot

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
