"""What the HTML pages share: templates, plots, and everything embedded, so that a page needs no network.

In: a template and its fields. Out: one HTML file. Fields are escaped, unless `trust` marks them as HTML that we or
bokeh wrote.
"""

import base64
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from actcache import CorruptError, PipelineError
from actcache.artifacts import write_output
from actcache.text import visible

_NO_PICTURES = '<script type="application/json" id="pictures">[]</script>'

INK = "#7d8a98"  # legible on the light page and on the dark one
BLUE, RED, GREEN, GOLD, PURPLE, GRAY = "#0b6bcb", "#d1435b", "#2a9d5c", "#b07d12", "#7a57a8", "#5b6875"


class Plot(NamedTuple):
    """A plot, a caption on how to read it, and its share of the page's width: `small`, `third`, `half` or `whole`."""

    html: Markup
    caption: str
    size: str


class Section(NamedTuple):
    """A part of a page.

    Attributes:
        text: a paragraph on what is shown.
        rows: a table, whose first row is the header; none if empty.
        more: HTML that follows the plots and the table.
        notes: what to know of the images, such as how many were left out.
    """

    title: str
    text: str
    plots: list[Plot]
    rows: list[list[str]]
    more: Markup = Markup("")
    notes: Sequence[str] = ()


@contextmanager
def contradictions(file: object) -> Iterator[None]:
    """Turn what drawing raises into one line. The fields of a result have the right types by then, so it means that
    they contradict each other: a curve of an unknown kind, or a setting that the verb writes and the file lacks.
    """
    try:
        yield
    except (LookupError, ValueError, TypeError, ArithmeticError) as error:
        if isinstance(error, PipelineError):
            raise
        what = " ".join(str(error).split())[:200]
        raise CorruptError(
            f"{file} has fields that do not fit each other ({type(error).__name__}: {what}). Run the command that made "
            "it again, with --overwrite."
        ) from error


def write_page(out: str | Path, template: str, **fields: Any) -> Path:
    """Fill a template and write the page. An existing file is replaced."""
    return write_output(out, make_page(template, **fields))


def make_page(template: str, *, components: Sequence[str] = ("bokeh", "bokeh-gl"), **fields: Any) -> bytes:
    """Fill a template: a page with the scripts of its plots.

    Args:
        components: the parts of bokeh that the plots need: together 1.5 MB, of which bokeh-gl, which draws a great many
            points, is 0.2; all of bokeh has 4.5.
    """
    from bokeh.resources import Resources

    script = Resources(mode="inline", components=list(components)).render() if components else ""
    return share_pictures(fill(template, script=trust(script), **fields)).encode()


def fill(template: str, **fields: Any) -> Markup:
    """Fill a template with fields. Text that is not `Markup` is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    environment.filters["visible"] = visible
    environment.filters["anchor"] = lambda title: re.sub(r"\W+", "-", title.lower()).strip("-")
    return trust(environment.get_template(template).render(**fields))


def share_pictures(page: str) -> str:
    """Move each JPEG, once, into the list at the end of the page, from which the page's script draws it.

    A gallery of 800 pictures may come from only 500 images. What stands before the list (text, plots, the list of
    latents) can be read before the pictures have been loaded.
    """
    numbers: dict[str, int] = {}

    def share(match: re.Match[str]) -> str:
        return f'data-picture="{numbers.setdefault(match[1], len(numbers))}"'

    page = re.sub(r'src="data:image/jpeg;base64,([^"]*)"', share, page)
    return page.replace(_NO_PICTURES, _NO_PICTURES.replace("[]", json.dumps(list(numbers))))


def trust(html: str) -> Markup:
    """Mark text that we or bokeh wrote as HTML."""
    return Markup(html)


# ---------------------------------------------------------------------------------------------------------------------
# bokeh


def start_plot(title: str = "", **options: Any) -> Any:
    """An empty bokeh figure that fills the width of its place."""
    from bokeh.plotting import figure

    plot = figure(
        title=title or None,
        sizing_mode="stretch_width",
        **{"height": 380, "tools": "pan,wheel_zoom,box_zoom,reset,hover", "toolbar_location": "above", **options},
    )
    plot.toolbar.logo = None
    # The plot has the page's own background, light or dark.
    plot.background_fill_color = plot.border_fill_color = plot.outline_line_color = None
    if title:
        plot.title.text_color = INK
    for axis in plot.axis:
        axis.axis_label_text_color = axis.major_label_text_color = axis.axis_line_color = INK
        axis.major_tick_line_color = axis.minor_tick_line_color = INK
    plot.grid.grid_line_color = INK
    plot.grid.grid_line_alpha = 0.2
    return plot


def finish_plot(plot: Any, caption: str = "", size: str = "half", *, n_columns: int | None = None) -> Plot:
    """Put the legend below the figure, where it covers nothing, and turn the figure into HTML.

    Args:
        n_columns: of the legend; by default as many as make two rows.
    """
    from bokeh.embed import components

    if plot.legend:
        plot.add_layout(plot.legend[0], "below")
        plot.legend.label_text_font_size = "11px"
        plot.legend.location = "left"
        plot.legend.ncols = n_columns or -(-len(plot.legend[0].items) // 2)
        plot.legend.spacing = plot.legend.padding = 3  # three columns have room on a phone
        plot.legend.glyph_width, plot.legend.label_standoff = 16, 3
        plot.legend.margin = 0
        plot.legend.border_line_color = plot.legend.background_fill_color = None
        plot.legend.label_text_color = INK
    script, element = components(plot)
    return Plot(trust(script + element), caption, size)


def draw_line(
    plot: Any, points: list[tuple[float, float, float, float]], color: str, title: str, *, dash: str = "solid",
    width: float = 2, alpha: float = 1.0,
) -> None:  # fmt: skip
    """Draw a line with a band. points: (x, y, low, high); a single point gets an error bar instead."""
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
    """Draw a horizontal line across the plot. `title` is shown under the mouse."""
    source = {"y": [y], "x": ["any"]}
    plot.hspan("y", source=source, line_color=color, line_dash=style, line_width=1.2, name=title)
