"""The pages Adaptation and Results and the map of the atlas in a real browser: of a server, and of a site of files."""

import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import bokeh
import numpy as np
import pytest
from explorer import NAMELESS, PALE, open_page, open_tab, serving, wait_until

from actcache import SettingsError
from actcache.options import JudgingConfig
from analysis import AnalyzeConfig, ConceptTable, analyze, inspect_dictionaries
from analysis.explore.data import Data
from analysis.explore.maps import read_map
from analysis.explore.site import write_site
from analysis.explore.sources import Sources, open_sources

pytestmark = pytest.mark.slow

PAGES = (("#/adaptation", "Adaptation"), ("#/results", "Results"), ("#/atlas?view=map", "Atlas"))


class Shown(NamedTuple):
    sources: Sources
    server: str
    site: str


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def shown(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    """A table with a comparison, a masking curve, rules and two runs inspected; its site, which makes the map."""
    folder = Path(shutil.copytree(golden, tmp_path_factory.mktemp("shown") / "pipeline"))
    runs = [folder / "run", folder / "runs" / "variantrelu"]
    inspect_dictionaries(
        runs, folder / "a.acts", folder / "inspection.json", n_tokens=20, judging=JudgingConfig(on_seen="use")
    )
    results = [folder / name for name in ("intervene.json", "rules.json", "inspection.json")]
    options: dict[str, Any] = {"compare": folder / "compare.json", "results": results}
    write_site(folder / "a.concepts", folder / "host" / "deep" / "site", **options)
    sources = open_sources(folder / "a.concepts", **options)
    host = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder / "host"))
    thread = threading.Thread(target=host.serve_forever, daemon=True)
    thread.start()
    try:
        with serving(sources) as client:
            yield Shown(sources, client.address, f"http://127.0.0.1:{host.server_port}/deep/site/")
    finally:
        host.shutdown()
        host.server_close()
        thread.join(20)


@pytest.fixture(params=["server", "site"])
def page(request: pytest.FixtureRequest, shown: Shown, browser: Any) -> Iterator[Any]:
    yield from open_tab(browser, getattr(shown, request.param))


# ---------------------------------------------------------------------------------------------------------------------
# Adaptation


def test_the_adaptation_shows_the_top_images_of_both_models(page: Any, shown: Shown) -> None:
    record = json.loads(Data(shown.sources).answer("comparison.json").body)
    open_page(page, "#/adaptation", "Adaptation")
    assert page.locator(".conclusion").inner_text() == record["conclusion"]
    assert page.locator(".facts dd").all_inner_texts() == [text for _, text in record["facts"]]
    pairs = page.locator("section.pair")
    titles = [int(re.findall(r"\d+", text)[0]) for text in pairs.locator("h3 a").all_inner_texts()]
    assert titles == [row["latent"] for row in record["latents"]]
    assert len(titles) > 5
    folder = shown.sources.concepts.path.parent
    for side, name in enumerate(("a.concepts", "adapted.concepts")):
        table = ConceptTable.open(folder / name)
        row = record["latents"][0]
        part = pairs.first.locator(".columns > div").nth(side)
        links = part.locator("li a").evaluate_all("all => all.map(a => a.getAttribute('href'))")
        images = table.rows_of("top_images", row["latent"]).sort_by("rank")["image"].to_pylist()
        assert [int(re.findall(r"image/(\d+)", link)[0]) for link in links] == images[: len(links)]
        n_tokens = row[f"{('base', 'adapted')[side]}_tokens"]
        assert part.locator("h4").inner_text().startswith(f"{('base', 'adapted')[side]} model: {n_tokens:,} token")
    assert page.locator(".shots img").evaluate_all("all => all.every(i => !i.complete || i.naturalWidth > 0)")
    page.locator(".shots canvas").first.wait_for()
    page.keyboard.press("h")
    page.wait_for_url("**heat=off**")
    page.locator(".shots canvas").first.wait_for(state="detached")
    pairs.first.locator("h3 a").click()
    page.get_by_role("heading", level=1, name=re.compile(f"^Latent {titles[0]}")).wait_for()


def test_a_model_whose_table_is_gone_is_named(golden: Path, browser: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(golden, tmp_path / "pipeline"))
    shutil.rmtree(folder / "adapted.concepts")
    with serving(open_sources(folder / "a.concepts", compare=folder / "compare.json")) as client:
        for page in open_tab(browser, client.address):
            open_page(page, "#/adaptation", "Adaptation")
            assert "The adapted model's concept table is not there" in page.locator(".error").inner_text()
            page.locator("section.pair .columns > div:first-child img").first.wait_for()
            assert page.locator("section.pair .columns > div:last-child img").count() == 0


def test_pages_without_a_comparison_or_results_say_what_would_give_them(sources: Sources, browser: Any) -> None:
    with serving(sources) as client:
        for page in open_tab(browser, client.address):
            for address, flag in (("#/adaptation", "--compare"), ("#/results", "--result")):
                page.goto(client.address + address)
                page.locator(".error").wait_for()
                assert flag in page.locator(".error").inner_text()
            assert page.get_by_role("navigation", name="Pages").locator("a").all_inner_texts() == ["Atlas", "Images"]


# ---------------------------------------------------------------------------------------------------------------------
# Results


def test_results_are_drawn_in_a_frame_that_fills_the_screen(page: Any, shown: Shown) -> None:
    for width, height in ((1280, 900), (400, 800)):
        page.set_viewport_size({"width": width, "height": height})
        open_page(page, "#/results", "Results")
        frame = page.frame_locator("iframe")
        frame.locator(".bk-Figure").first.wait_for()
        titles = frame.locator("h2").all_inner_texts()
        assert [title.split()[0] for title in titles] == ["What", "Masking", "Rules", "Dictionaries"]
        size = page.evaluate("document.documentElement.scrollHeight")
        assert size <= height, "there are two scroll bars"
        assert page.locator("iframe").bounding_box()["height"] > 0.6 * height
        inside = page.frames[-1]
        assert inside.evaluate("document.documentElement.scrollWidth") <= width
        assert inside.evaluate("self.origin") == "null", "its scripts could reach the page"


def test_results_have_the_colors_of_the_page(page: Any) -> None:
    page.emulate_media(color_scheme="light")
    open_page(page, "#/results", "Results")
    body = page.frame_locator("iframe").locator("body")
    back = "body => [...getComputedStyle(body).backgroundColor.matchAll(/[0-9]+/g)].map(Number)[0]"
    wait_until(lambda: body.evaluate(back) > 200)
    for _ in range(2):  # from auto over light to dark
        page.get_by_role("button", name=re.compile("^Colors")).click()
    wait_until(lambda: body.evaluate(back) < 60)


def test_a_latent_in_the_results_leads_to_its_page(page: Any) -> None:
    open_page(page, "#/results", "Results")
    linked = page.frame_locator("iframe").locator("a[target=_top]").first
    latent = re.findall(r"\d+", linked.inner_text())[0]
    linked.click(trial=True)
    # The click takes away the frame that has to confirm it, so the confirmation may never come. The page that opens
    # is what shows that the link leads there.
    with suppress(pytest.importorskip("playwright.sync_api").TimeoutError):
        linked.click(timeout=10_000)
    page.get_by_role("heading", level=1, name=re.compile(f"^Latent {latent}")).wait_for()


def test_the_results_are_there_the_second_time(page: Any) -> None:
    for _ in range(2):  # the browser has kept them and asks whether they have changed
        open_page(page, "#/results", "Results")
        page.frame_locator("iframe").get_by_role("heading", level=1).wait_for()
        page.keyboard.press("a")
        page.get_by_role("heading", level=1, name="Atlas").wait_for()


def test_the_results_can_be_opened_alone(page: Any) -> None:
    open_page(page, "#/results", "Results")
    with page.expect_popup() as opened:
        page.get_by_role("link", name=re.compile("Open the results")).click()
    alone = opened.value
    alone.locator(".bk-Figure").first.wait_for()
    assert alone.url.endswith("data/results.html")


def test_a_page_of_results_holds_no_more_of_bokeh_than_its_plots_need(shown: Shown) -> None:
    folder = shown.sources.concepts.path.parent
    scripts = Path(bokeh.__file__).parent / "server" / "static" / "js"
    core, many_points = ((scripts / f"{name}.min.js").read_bytes()[-2000:-200] for name in ("bokeh", "bokeh-gl"))
    with_plots = (folder / "host" / "deep" / "site" / "data" / "results.html").read_bytes()
    tables = Data(open_sources(shown.sources.concepts, results=[folder / "rules.json"])).answer("results.html").body
    assert [core in with_plots, many_points in with_plots, core in tables] == [True, False, False]
    assert len(tables) < 30_000
    assert b"Rules" in tables


# ---------------------------------------------------------------------------------------------------------------------
# The map, and twins


def test_a_click_on_the_map_opens_the_latent_that_lies_there(page: Any, shown: Shown) -> None:
    place = read_map(shown.sources)
    points = np.stack([place["map_x"], place["map_y"]], axis=1).astype(np.float64)
    alive = np.flatnonzero(np.isfinite(points[:, 0]))
    low, high = points[alive].min(axis=0), points[alive].max(axis=0)
    share = (points - low + 0.03 * (high - low)) / (1.06 * (high - low))
    open_page(page, "", "Atlas")
    page.get_by_label("show").select_option("map of directions")
    page.wait_for_url("**view=map**")
    canvas = page.locator(".scatter canvas")
    assert "Map of decoder directions" in canvas.get_attribute("aria-label")
    box = canvas.bounding_box()
    x, y = 8 + share[:, 0] * (box["width"] - 16), 8 + (1 - share[:, 1]) * (box["height"] - 16)
    apart = np.hypot(x[alive, None] - x[alive], y[alive, None] - y[alive]) + np.eye(len(alive)) * 1e9
    latent = int(alive[apart.min(axis=1).argmax()])
    canvas.hover(position={"x": x[latent], "y": y[latent]})
    page.get_by_text(f"Latent {latent} · ").wait_for()
    canvas.click(position={"x": x[latent], "y": y[latent]})
    page.get_by_role("heading", level=1, name=re.compile(f"^Latent {latent}")).wait_for()
    page.go_back()
    page.get_by_role("heading", level=1, name="Atlas").wait_for()
    assert page.get_by_label("show").input_value() == "map"


def test_the_twin_in_the_other_run_is_shown(page: Any, shown: Shown) -> None:
    open_page(page, "#/latent/19", "^Latent 19")
    twins = page.locator("section", has=page.get_by_role("heading", name="In other runs"))
    assert re.match(r"variantrelu: latent \d+, cosine 0?\.?\d+", twins.locator("li").inner_text())


# ---------------------------------------------------------------------------------------------------------------------
# All of them


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_part_has_a_name_a_place_and_contrast(page: Any, theme: str) -> None:
    page.emulate_media(color_scheme=theme)
    for width in (400, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        for address, heading in PAGES:
            open_page(page, address, heading)
            assert page.evaluate(NAMELESS) == []
            assert page.locator("h1").count() == 1
            assert page.evaluate("document.documentElement.scrollWidth") <= width, address
            assert page.evaluate(PALE) == [], address
            assert page.title().endswith("Concepts of a")


def test_a_comparison_of_other_tables_is_refused(golden: Path, tmp_path: Path) -> None:
    """Its images may have other numbers, so the pictures would be wrong."""
    other = analyze(golden / "a.codes", tmp_path / "other.concepts", config=AnalyzeConfig(n_top=3))
    with pytest.raises(
        SettingsError, match=r"compares a\.concepts with adapted\.concepts, and other\.concepts is neither"
    ):
        open_sources(other, compare=golden / "compare.json")
