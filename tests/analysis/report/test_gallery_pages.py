"""A report of many latents opens quickly: one page of the gallery at a time, pictures last, on any screen."""

import html
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_codes import write_codes

from actcache.artifacts import seal_artifact
from analysis import AnalyzeConfig, ConceptTable, analyze, write_report
from analysis.report.overview import draw_training
from analysis.report.report import PER_PAGE

N_LATENTS, N_IMAGES, GRID = 70, 90, (7, 7)
LONG_NAME = "a" * 200


@pytest.fixture(scope="module")
def concepts(tmp_path_factory: pytest.TempPathFactory) -> ConceptTable:
    """More latents than two pages of the gallery hold, with thumbnails, and a class whose name is one long word."""
    folder = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    dense = rng.random((N_IMAGES, 1 + GRID[0] * GRID[1], N_LATENTS)).astype(np.float16)
    dense *= rng.random(dense.shape) < 0.01
    labels = np.arange(N_IMAGES, dtype=np.int32) % 3
    codes = write_codes(folder / "x.codes", dense, [N_IMAGES], labels, grid=GRID)
    return analyze(codes, folder / "x.concepts", config=AnalyzeConfig(n_gallery=N_LATENTS))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, concepts: ConceptTable) -> Path:
    (concepts.path / "gallery").mkdir(exist_ok=True)
    for image in set(concepts.gallery["image"].to_pylist()):
        pixels = np.random.default_rng(image).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG")
        (concepts.path / "gallery" / f"{image}.jpg").write_bytes(buffer.getvalue())
    (concepts.path / "manifest.json").unlink()
    seal_artifact(concepts.path, **{k: v for k, v in concepts.summary.items() if k != "files"})
    return write_report(ConceptTable.open(concepts.path), tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory, page: Path) -> Callable[..., Any]:
    """ask(script, *flags) -> what the script returns once a real browser has loaded the page."""
    browser = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("there is no chromium")

    def run(script: str, *flags: str, content: str | None = None) -> Any:
        folder = tmp_path_factory.mktemp("browser")
        guarded = f"try {{ {script} }} catch (error) {{ return String(error.stack); }}"
        answer = f"document.body.dataset.answer = JSON.stringify((() => {{ {guarded} }})())"
        text = (content or page.read_text()).replace(
            "</body>", f"<script>window.addEventListener('load', () => {{ {answer} }})</script></body>"
        )
        (folder / "page.html").write_text(text)
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
        command = [browser, *options, *flags, f"file://{folder / 'page.html'}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        found = re.search(r'data-answer="(.*?)"', done.stdout)
        assert found, done.stderr
        return json.loads(html.unescape(found[1]))

    return run


def test_the_gallery_is_turned_page_by_page(ask: Callable[..., Any], concepts: ConceptTable) -> None:
    shown = list(dict.fromkeys(concepts.gallery["latent"].to_pylist()))
    assert len(shown) > 2 * PER_PAGE
    last = shown[-1]
    seen = ask(
        f"""
        const entries = () => [...document.querySelectorAll("#gallery section")].map(e => +e.id.slice(7));
        const pictures = () => [...document.querySelectorAll("#gallery .view img:not(.heat)")];
        const drawn = () => pictures().every(i => i.src.length > 500);
        const turn = value => document.querySelector(`#turn button[value="${{value}}"]`).click();
        const text = () => document.querySelector("#turn span").textContent;
        const seen = {{pages: [], drawn: []}};
        const note = () => {{ seen.pages.push(entries()); seen.drawn.push(drawn()); }};
        note(); turn(1); note(); seen.text = text(); turn(-1); note();
        document.querySelector('#index a[href="#latent-{last}"]').click();
        location.hash = "#latent-{last}"; window.dispatchEvent(new HashChangeEvent("hashchange")); note();
        const box = document.getElementById("search"); box.value = "{shown[PER_PAGE]}"; box.oninput(); note();
        return seen;"""
    )
    assert seen["pages"][0] == seen["pages"][2] == shown[:PER_PAGE]
    assert seen["pages"][1] == shown[PER_PAGE : 2 * PER_PAGE]
    assert last in seen["pages"][3]
    assert seen["pages"][4] == [n for n in shown if str(n).startswith(str(shown[PER_PAGE]))][:PER_PAGE]
    assert seen["drawn"] == [True] * 5
    assert seen["text"] == f"page 2 of {-(-len(shown) // PER_PAGE)}"


def test_pictures_are_the_last_part_of_the_file(page: Path, concepts: ConceptTable) -> None:
    text = page.read_text()
    entries, pictures = (
        text.index('<template id="entries">'),
        text.index('<script type="application/json" id="pictures">'),
    )
    assert 'src="data:image/jpeg' not in text
    assert max(text.index('id="index"'), text.index("</h2>")) < entries < pictures
    assert entries < 2e6
    kept = json.loads(text[pictures:].split(">", 1)[1].split("</script>")[0])
    assert len(kept) == len(set(kept)) == len(set(concepts.gallery["image"].to_pylist()))


def test_captions_show_what_orders_the_images(page: Path, concepts: ConceptTable) -> None:
    text = page.read_text()
    assert "mean activation over the tokens of the image" in text
    for latent in (3, 40):
        entry = text.split(f'id="latent-{latent}"')[1].split("</section>")[0]
        shown = [float(value) for value in re.findall(r"· ([\d.e-]+)</figcaption>", entry)]
        top = concepts.top_images.filter(concepts.top_images["latent"].to_numpy() == latent).sort_by("rank")
        assert shown == pytest.approx(top["score"].to_numpy()[: len(shown)], rel=5e-3)
        assert shown == sorted(shown, reverse=True)


@pytest.mark.parametrize("width", [400, 800])
def test_the_page_does_not_scroll_sideways(ask: Callable[..., Any], page: Path, width: int) -> None:
    content = page.read_text().replace("class1", LONG_NAME)
    # Headless Chromium has a least width of 500, so the page is shown in a frame.
    frame = f'<iframe style="width: {width}px; height: 800px; border: 0" srcdoc="{html.escape(content)}"></iframe>'
    overflow = ask(
        "const page = document.querySelector('iframe').contentDocument.documentElement;"
        "return [page.scrollWidth, page.clientWidth];",
        "--window-size=1200,900",
        content=f"<!doctype html><body>{frame}</body>",
    )
    assert overflow[0] <= overflow[1] <= width


def test_the_page_is_dark_where_the_reader_wants_it_dark(ask: Callable[..., Any]) -> None:
    script = """
        const light = color => {
          const [r, g, b] = color.match(/[\\d.]+/g).map(Number);
          return (2 * r + 5 * g + b) / 8 / 255;
        };
        const style = query => getComputedStyle(document.querySelector(query));
        return ["body", ".card", ".latent", ".index th", ".contents", "#search"].map(
          query => [light(style(query).color), light(style(query).backgroundColor)]);"""
    for scheme, dark in (("0", True), ("1", False)):
        for ink, back in ask(script, f"--blink-settings=preferredColorScheme={scheme}"):
            assert (ink > 0.5 > back) if dark else (ink < 0.5 < back)


def test_the_contents_lead_to_each_part(page: Path) -> None:
    text = page.read_text()
    contents = text.split('aria-label="contents">')[1].split("</nav>")[0]
    links = re.findall(r'<a href="#(.*?)">(.*?)</a>', contents)
    assert [name for _, name in links] == re.findall(r"<h2.*?>(.*?)</h2>", text)
    assert all(f'id="{anchor}"' in text for anchor, _ in links)


@pytest.mark.parametrize("values", [[0.0, 0.0], [0.25, 0.25], [0.0, 1.0], [3.0, 64.0]])
def test_shares_and_counts_are_drawn_from_0(values: list[float]) -> None:
    """A constant is not drawn in the middle of an axis from -100 % to 100 %."""
    plots = draw_training(dict.fromkeys(("step", "loss", "fvu", "l0", "dead"), values))
    for plot in plots[2:]:
        ranges = re.findall(
            r'"y_range":{"type":"object","name":"DataRange1d","id":"\w+"(,"attributes":{.*?})', plot.html
        )
        (attributes,) = ranges
        low, high = (float(re.search(rf'"{end}":([\d.]+)', attributes)[1]) for end in ("start", "end"))  # type: ignore[index]
        assert low == 0
        assert max(values) < high <= max(0.1, 1.1 * max(values))
