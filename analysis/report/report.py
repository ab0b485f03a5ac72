"""write_report(): a ConceptTable becomes one HTML file that needs nothing else: no network, no images, no codes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from actcache import SettingsError
from analysis.concepts import ConceptTable
from analysis.report.latents import Portrait, make_portraits, missing_parts
from analysis.report.overview import draw_overview, draw_training
from analysis.report.page import make_page, write_page
from analysis.report.sections import draw_sections
from analysis.report.top_images import frame_of

PER_PAGE = 20
"""Latents on one page of the gallery: 320 pictures, which Chromium draws in 0.1 s; 1,000 latents at once took 33 s."""

ORDERS = {
    "mean": "the latent's mean activation over the tokens of the image",
    "max": "the latent's maximum activation on the image",
}
"""What each `--score` of analyze orders top images by."""


class Column(NamedTuple):
    """A column of the list of latents.

    Attributes:
        of: gets the value to sort by; None if a latent has none.
        form: the format of a number, as `format` takes it.
    """

    title: str
    of: Callable[[Portrait], Any]
    form: str = ""
    text: bool = False

    def show(self, value: Any) -> str:
        return "" if value is None else format(value, self.form)


def write_report(concepts: ConceptTable | str | Path, out: str | Path, *, results: Sequence[str | Path] = ()) -> Path:
    """Write the page and return its path. An existing file is replaced.

    The page shows the quality on held-out images, the training curves, plots of all latents, a section for each of
    `results`, and the gallery. The gallery has a list that sorts and searches it. For each latent it shows the name (if
    there is one), top images with heat maps, numbers, a histogram, a position map, classes and nearest latents.

    Args:
        results: result files of any verb that measures, and x.prompts folders.

    Raises:
        SettingsError: `out` does not end in .html, or a result file does not exist.
        SchemaError: a file is not such a result.
    """
    if Path(out).suffix.lower() not in (".html", ".htm"):  # a mistyped name must not replace data
        raise SettingsError(f"{out} does not end in .html. Give the name of the page, e.g. report.html.")
    concepts = concepts if isinstance(concepts, ConceptTable) else ConceptTable.open(concepts)
    sae, source = concepts.sae, concepts.source
    latents = make_portraits(concepts)
    curves = draw_training(concepts.provenance.curves)
    sections = draw_sections(results, concepts)
    return write_page(
        out,
        "report.html.jinja",
        title=f"Concepts of {source.images}",
        subtitle=(
            f"{sae.variant} SAE with {concepts.table.num_rows:,} latents at {sae.hook_point} of {source.model} "
            f"({source.pretrained}), width {sae.d_model or 'unknown'}"
        ),
        cards=_cards(concepts),
        quality=_quality(concepts),
        curves=curves,
        overview=draw_overview(concepts),
        sections=sections,
        contents=[
            "Quality on held-out images",
            *["Training"][: len(curves)],
            "All latents",
            *(part.title for part in sections),
            "Gallery of latents",
        ],
        latents=latents,
        per_page=PER_PAGE,
        n_top=concepts.config.n_top,
        order=ORDERS[concepts.config.score],
        columns=_columns(latents),
        missing=missing_parts(concepts),
        pictures=bool(concepts.artifact.settings.get("pictures")),
        tau=concepts.config.tau,
        frame=frame_of(concepts),
    )


def draw_results(results: Sequence[str | Path], concepts: ConceptTable) -> bytes:
    """A page with a section for each of some results, as `write_report` shows them. Raises as `write_report`.

    Its links lead to the pages of latents of the explorer, in whose `data` folder it lies.
    """
    sections = draw_sections(results, concepts, address="../#/latent/{}".format)
    has_plots = any(part.plots or "data-root-id" in part.more for part in sections)  # bokeh marks its places so
    return make_page(
        "results.html.jinja",
        title=f"Results beside {concepts.path.name}",
        subtitle=f"{concepts.sae.variant} SAE at {concepts.sae.hook_point} of {concepts.source.model}",
        sections=sections,
        contents=[part.title for part in sections],
        components=["bokeh"] if has_plots else [],
        frame=frame_of(concepts),
    )


def _columns(latents: Sequence[Portrait]) -> list[Column]:
    """The columns in which some latent has a value."""

    def number(name: str) -> Callable[[Portrait], Any]:
        return lambda latent: latent.numbers[name]

    columns = [
        Column("latent", lambda latent: latent.latent),
        Column("name", lambda latent: latent.name or None, text=True),
        Column("density", number("density"), ".3%"),
        Column("images", number("image_frequency"), ".2%"),
        Column("mean", number("mean_activation"), ".2f"),
        Column("max", number("max_activation"), ".2f"),
        Column("label entropy", number("label_entropy"), ".2f"),
        Column("label std", number("label_std"), ".2f"),
        Column("monosemanticity", number("monosemanticity"), ".3f"),
        Column("top images", lambda latent: latent.labels or None, text=True),
    ]
    return [column for column in columns if any(column.of(latent) is not None for latent in latents)]


def _cards(concepts: ConceptTable) -> list[dict[str, str]]:
    numbers, recorded = concepts.summary_numbers(), concepts.provenance.quality
    quality = next((concepts.quality[kind] for kind in ("all", "patch", "cls") if kind in concepts.quality), None)
    n_latents = concepts.table.num_rows
    cards = [
        {"name": "images", "value": f"{numbers['n_images']:,}"},
        {"name": "tokens", "value": f"{numbers['n_tokens']:,}"},
        {"name": "latents that fired", "value": f"{numbers['n_alive']:,} of {n_latents:,}"},
    ]
    if quality is not None:  # codes of other programs may not record it
        cards += [
            {"name": "held-out FVU", "value": f"{quality['fvu']:.3f}"},
            {"name": "L0", "value": f"{quality['l0']:.1f}"},
        ]
    if "dead" in recorded:
        cards += [{"name": "dead after training", "value": f"{100 * recorded['dead']:.1f} %"}]
    return cards


def _quality(concepts: ConceptTable) -> list[list[str]]:
    return [
        ["tokens", "FVU", "L0", "cosine"],
        *(
            [kind, f"{quality['fvu']:.4f}", f"{quality['l0']:.1f}", f"{quality['cosine']:.4f}"]
            for kind, quality in concepts.quality.items()
        ),
    ]
