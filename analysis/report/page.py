"""What the HTML pages share: templates, bokeh's script inside the page, plots and pictures as text. No network.

In: a template beside this file and its fields. Out: one HTML file. Fields are escaped; HTML that we or bokeh wrote is
marked by `trust`.
"""

import base64
import re
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from actcache.artifacts import write_atomic

BLUE, RED, GREEN, GOLD, PURPLE, GRAY = "#0b6bcb", "#d1435b", "#2a9d5c", "#b07d12", "#7a57a8", "#5b6875"


class Plot(NamedTuple):
    """A plot, one line on how to read it, and its share of the page's width: `small`, `third`, `half` or `whole`."""

    html: Markup
    caption: str
    size: str


class Section(NamedTuple):
    """A part of a page.

    Attributes:
        text: what is shown, for people.
        rows: a table, the first line its head; empty: none.
        more: HTML behind the plots and the table.
    """

    title: str
    text: str
    plots: list[Plot]
    rows: list[list[str]]
    more: Markup = Markup("")


def write_page(out: str | Path, template: str, **fields: Any) -> Path:
    """Fill a template and write it. An existing file is replaced."""
    from bokeh.resources import Resources

    script = Resources(mode="inline", components=["bokeh", "bokeh-gl"]).render()  # 1.2 MB; all of bokeh is 4.5
    page = share_pictures(fill(template, script=trust(script), **fields))
    out = Path(out)
    write_atomic(out, page.encode(), parents=True)
    return out


def fill(template: str, **fields: Any) -> Markup:
    """A template with its fields; text that is no `Markup` is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return trust(environment.get_template(template).render(**fields))


def share_pictures(page: str) -> str:
    """Keep each JPEG once: the images that show it again name the first, and the page's script gives them its source.

    A set of 500 images fills a gallery of 800: the page halves.
    """
    numbers: dict[str, int] = {}

    def share(found: re.Match[str]) -> str:
        picture = found[1]
        if picture in numbers:
            return f'data-copy="{numbers[picture]}"'
        numbers[picture] = len(numbers)
        return f'id="picture-{numbers[picture]}" src="{picture}"'

    return re.sub(r'src="(data:image/jpeg;base64,[^"]*)"', share, page)


def trust(html: str) -> Markup:
    """Mark text that we or bokeh wrote as HTML."""
    return Markup(html)


# ---------------------------------------------------------------------------------------------------------------------
# bokeh


def start_plot(title: str = "", **options: Any) -> Any:
    """An empty bokeh figure as wide as its place."""
    from bokeh.plotting import figure

    plot = figure(
        title=title or None,
        sizing_mode="stretch_width",
        **{"height": 380, "tools": "pan,wheel_zoom,box_zoom,reset,hover", "toolbar_location": "above", **options},
    )
    plot.toolbar.logo = None
    return plot


def finish_plot(plot: Any, caption: str = "", size: str = "half") -> Plot:
    """Put the legend below, where it covers nothing, and make HTML of the figure."""
    from bokeh.embed import components

    if plot.legend:
        plot.add_layout(plot.legend[0], "below")
        plot.legend.label_text_font_size = "11px"
        plot.legend.location = "left"
        plot.legend.ncols = -(-len(plot.legend[0].items) // 2)
        plot.legend.spacing = 8
        plot.legend.padding = 4
        plot.legend.margin = 0
        plot.legend.border_line_color = None
    script, element = components(plot)
    return Plot(trust(script + element), caption, size)


def draw_line(
    plot: Any, points: list[tuple[float, float, float, float]], color: str, title: str, *, dash: str = "solid",
    width: float = 2, alpha: float = 1.0,
) -> None:  # fmt: skip
    """points: (x, y, low, high); a single one is a mark with a bar."""
    if not points:
        return
    x, y, low, high = (list(column) for column in zip(*sorted(points), strict=True))
    if len(x) > 1:
        plot.varea(x, low, high, color=color, fill_alpha=0.12)
        plot.line(x, y, color=color, line_width=width, line_dash=dash, alpha=alpha, legend_label=title, name=title)
    else:
        plot.segment(x, low, x, high, color=color, line_width=width)
    plot.scatter(x, y, color=color, size=4 + width, alpha=alpha, legend_label=title, name=title)


def draw_level(plot: Any, y: float, style: str, title: str, color: str = GRAY) -> None:
    """A line across the plot, within its range; `title` shows under the mouse."""
    source = {"y": [y], "x": ["any"]}
    plot.hspan("y", source=source, line_color=color, line_dash=style, line_width=1.2, name=title)
