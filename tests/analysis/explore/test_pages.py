"""The explorer in a real browser: by the server of `explore`, and as a folder on a plain web host under a sub-path."""

import http.client
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from explorer import NAMELESS, PALE, open_page, open_tab, wait_until
from PIL import Image

from actcache import extract
from actcache.demo import MODEL, PRETRAINED, write_demo
from analysis import ConceptTable, analyze, query_image, set_name
from saetrain import CodeStore, SAEConfig, TrainConfig, encode, train

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
N_IMAGES = 60


class Explored(NamedTuple):
    concepts: Path
    codes: CodeStore
    server: str
    site: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[str], path: str = "/") -> None:
    for _ in range(2400):  # a loaded machine takes its time to import
        assert process.poll() is None, process.communicate()
        try:
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
                connection.request("GET", path)
                assert connection.getresponse().status == 200
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the server does not answer")


@pytest.fixture(scope="module")
def explored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Explored]:
    """Concepts of the demo with one hostile name, served by `explore`, and a site of them at /deep/site/."""
    folder = tmp_path_factory.mktemp("explored")
    images = write_demo(folder / "scenes", n_images=N_IMAGES).path / "images"
    store = extract(images, folder / "scenes.acts", model=MODEL, pretrained=PRETRAINED, layers=[3])
    sae, config = SAEConfig("topk", 64, 4), TrainConfig(n_steps=60, batch_size=256)
    run = train(store, folder / "run", layer=3, sae=sae, config=config)
    codes = encode(run, store, folder / "scenes.codes")
    concepts = analyze(codes, folder / "scenes.concepts")
    set_name(concepts, strongest(codes), name="<img src=x onerror=alert(1)>", note="</script><b>bold</b>")
    port, other = free_port(), free_port()
    words = [sys.executable, ROOT / "cli.py"]
    subprocess.run(
        [*words, "publish", concepts.path, "--site", folder / "host" / "deep" / "site"], check=True, cwd=ROOT,
        capture_output=True,
    )  # fmt: skip
    server = subprocess.Popen(
        [*words, "explore", concepts.path, "--port", str(port), "--no-open"], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    host = subprocess.Popen(
        [sys.executable, "-m", "http.server", str(other), "--bind", "127.0.0.1", "-d", folder / "host"], text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(port, server)
        wait_for(other, host, "/deep/site/")
        yield Explored(concepts.path, codes, f"http://127.0.0.1:{port}/", f"http://127.0.0.1:{other}/deep/site/")
    finally:
        for process in (server, host):
            process.terminate()
            process.communicate(timeout=60)


def strongest(codes: CodeStore) -> int:
    """The latent with the most entries."""
    assert codes.n_shards == 1
    return int(np.argmax(np.diff(codes.read_by_latent(0).latent_indptr)))


@pytest.fixture(params=["server", "site"])
def page(request: pytest.FixtureRequest, explored: Explored, browser: Any) -> Iterator[Any]:
    """An empty tab; `address` is that of the server or of the site. Errors of the page fail the test."""
    yield from open_tab(browser, getattr(explored, request.param))


@pytest.fixture
def served(explored: Explored, browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield lambda address="": (tab := context.new_page(), tab.goto(explored.server + address))[0]
    context.close()


def test_the_atlas_lists_every_latent_that_fires_and_opens_one(page: Any, explored: Explored) -> None:
    table = ConceptTable.open(explored.concepts).table
    fires = np.flatnonzero(np.asarray(table["n_tokens"]) > 0)
    open_page(page, "", "Atlas")
    page.get_by_text(f"{len(fires)} latents that fire, of 64").wait_for()
    page.get_by_role("button", name="maximum activation").click()
    first = page.locator(".list tbody tr td a").first
    highest = int(np.argmax(np.asarray(table["max_activation"])))
    wait_until(lambda: int(first.inner_text()) == highest)
    assert "sort=-max_activation" in page.url
    first.click()
    page.get_by_role("heading", level=1, name=re.compile(r"^Latent \d+")).wait_for()
    page.go_back()
    page.get_by_role("heading", level=1, name="Atlas").wait_for()
    assert "sort=-max_activation" in page.url
    wait_until(lambda: page.locator(".list th[aria-sort=descending]").count() == 1)


def test_the_search_box_finds_numbers_names_and_classes(page: Any, explored: Explored) -> None:
    latent = strongest(explored.codes)
    open_page(page, "", "Atlas")
    box = page.get_by_role("searchbox")
    box.fill("onerror")
    page.get_by_text("1 latent for").wait_for()
    wait_until(lambda: page.locator(".list tbody tr td a").all_inner_texts() == [str(latent)])
    box.fill("star")
    page.wait_for_url("**q=star**")
    wait_until(lambda: set(page.locator(".list tbody tr td:nth-child(3)").all_inner_texts()) == {"star"})
    box.fill(str(latent))
    box.press("Enter")
    page.get_by_role("heading", level=1, name=re.compile(f"^Latent {latent}")).wait_for()


def test_a_hostile_name_and_note_are_text(page: Any, explored: Explored) -> None:
    open_page(page, f"#/latent/{strongest(explored.codes)}", "^Latent")
    assert page.locator("h1 .name").inner_text() == "<img src=x onerror=alert(1)>"
    assert page.get_by_label("Note", exact=True).input_value() == "</script><b>bold</b>"


def test_a_latent_shows_its_strongest_images_in_order(page: Any, explored: Explored) -> None:
    table, latent = ConceptTable.open(explored.concepts), strongest(explored.codes)
    rows = [row for row in table.top_images.to_pylist() if row["latent"] == latent]
    open_page(page, f"#/latent/{latent}", "^Latent")
    first = page.locator("section", has=page.get_by_role("heading", name="Strongest", exact=True))
    first.locator("li a").first.wait_for()
    links = first.locator("li a").evaluate_all("all => all.map(a => a.getAttribute('href'))")
    images = [int(re.findall(r"image/(\d+)", link)[0]) for link in links]
    assert images == [row["image"] for row in sorted(rows, key=lambda row: row["rank"])][: len(images)]
    assert len(images) >= 6
    seen = "all => all.filter(i => i.complete && i.naturalWidth > 0).length"
    wait_until(lambda: first.locator("img").evaluate_all(seen) == len(images))
    wait_until(lambda: first.locator("canvas").count() == len(images))
    page.get_by_role("checkbox", name="heat maps").uncheck()
    page.wait_for_url("**heat=off**")
    first.locator("canvas").first.wait_for(state="detached")
    page.go_back()
    page.get_by_role("checkbox", name="heat maps", checked=True).wait_for()


@pytest.mark.parametrize("corner", [(0, 0), (0, 7), (7, 0), (7, 7), (3, 7), (7, 4)])
def test_a_click_on_a_patch_lists_the_latents_of_that_token(
    page: Any, explored: Explored, corner: tuple[int, int]
) -> None:
    row, column = corner
    answer = query_image(explored.codes, 5, at=corner, n_top=64).to_pylist()
    open_page(page, "#/image/5", r"\.png$")
    box = page.locator(".picker").bounding_box()
    place = {"x": (column + 0.5) * box["width"] / 8, "y": (row + 0.5) * box["height"] / 8}
    page.locator(".picker").click(position=place)
    page.get_by_role("heading", name=f"Latents on row {row}, column {column}").wait_for()
    assert f"at={8 * row + column}" in page.url
    shown = page.locator(".bars-table tbody tr")
    latents = [int(text.split()[0]) for text in shown.locator("td:first-child").all_inner_texts()]
    peaks = [float(text) for text in shown.locator("td:nth-child(4)").all_inner_texts()]
    assert latents == [row["latent"] for row in answer]
    np.testing.assert_allclose(peaks, [row["peak"] for row in answer], rtol=6e-3)


def test_a_heat_map_is_bright_where_the_latent_fires(page: Any, explored: Explored) -> None:
    """Its canvas, cell by cell, against the codes of that image."""
    record = query_image(explored.codes, 7, n_top=1).to_pylist()[0]
    entries = explored.codes.read_latents(0, record["latent"], record["latent"] + 1)
    rows, values = entries.row, entries.latent_value
    heat = np.zeros(64)
    of_image = (rows // 65 == 7) & (rows % 65 > 0)
    heat[rows[of_image] % 65 - 1] = values[of_image]
    open_page(page, f"#/image/7?latent={record['latent']}&level=0.01", r"\.png$")
    read = """canvas => {
        const [w, h] = [canvas.width / 8, canvas.height / 8], c = canvas.getContext('2d');
        const alpha = i => c.getImageData((i % 8 + .5) * w, (Math.floor(i / 8) + .5) * h, 1, 1).data[3];
        return [...Array(64).keys()].map(alpha);
    }"""
    maximum = float(ConceptTable.open(explored.concepts).table["max_activation"][record["latent"]].as_py())
    bright = (heat >= 0.01 * maximum).tolist()
    assert 0 < sum(bright) < 64
    wait_until(lambda: [value < 100 for value in page.locator(".picker canvas").evaluate(read)] == bright)


def test_dragging_chooses_a_rectangle_and_escape_clears_it(page: Any, explored: Explored) -> None:
    answer = query_image(explored.codes, 2, at=(slice(1, 4), slice(2, 4)), n_top=64).to_pylist()
    open_page(page, "#/image/2", r"\.png$")
    box = page.locator(".picker").bounding_box()
    cell = box["width"] / 8
    page.mouse.move(box["x"] + 2.5 * cell, box["y"] + 1.5 * cell)
    page.mouse.down()
    page.mouse.move(box["x"] + 3.5 * cell, box["y"] + 3.5 * cell, steps=4)
    page.mouse.up()
    page.get_by_role("heading", name="Latents on 6 patches").wait_for()
    shown = page.locator(".bars-table tbody tr td:first-child").all_inner_texts()
    assert {int(text.split()[0]) for text in shown} == {row["latent"] for row in answer}
    page.mouse.move(0, 0)
    page.keyboard.press("Escape")
    page.get_by_role("heading", name="Latents on the whole image").wait_for()


def test_two_images_are_compared(page: Any, explored: Explored) -> None:
    of = [{row["latent"] for row in query_image(explored.codes, image, n_top=64).to_pylist()} for image in (1, 4)]
    open_page(page, "#/image/1?with=4", r" and ")
    counts = [len(of[0] - of[1]), len(of[0] & of[1]), len(of[1] - of[0])]
    shown = page.locator(".thirds h2 .soft")
    wait_until(lambda: [int(text.split()[0]) for text in shown.all_inner_texts()] == counts)


def test_everything_works_by_keyboard(page: Any, explored: Explored) -> None:
    open_page(page, "#/latent/3", "^Latent 3")
    page.keyboard.press("n")
    page.get_by_role("heading", level=1, name=re.compile("^Latent 4")).wait_for()
    page.keyboard.press("p")
    page.get_by_role("heading", level=1, name=re.compile("^Latent 3")).wait_for()
    page.keyboard.press("h")
    page.wait_for_url("**heat=off**")
    page.keyboard.press("/")
    page.keyboard.type("12n")  # typed, not obeyed
    wait_until(lambda: page.get_by_role("searchbox").input_value() == "12n")
    page.get_by_role("searchbox").blur()
    page.keyboard.press("i")
    page.get_by_role("heading", level=1, name="Images").wait_for()
    open_page(page, "#/image/5", r"\.png$")
    page.locator(".picker").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", " "):
        page.keyboard.press(key)
    page.get_by_role("heading", name="Latents on row 1, column 1").wait_for()


def test_the_list_of_keys_opens_over_the_page_and_closes(page: Any) -> None:
    open_page(page, "#/latent/3", "^Latent 3")
    opener = page.get_by_role("button", name="Keys")
    opener.focus()
    page.keyboard.press("?")
    dialog = page.get_by_role("dialog", name="Keys")
    dialog.wait_for()
    assert dialog.locator("dt").count() > 8
    box = dialog.bounding_box()
    assert 0 <= box["y"] < box["y"] + box["height"] <= 900
    page.keyboard.press("n")  # of the page behind it
    page.keyboard.press("Escape")
    dialog.wait_for(state="hidden")
    assert page.url.endswith("#/latent/3")
    assert opener.evaluate("button => document.activeElement === button")
    opener.click()
    dialog.get_by_role("button", name="Close").click()
    dialog.wait_for(state="hidden")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_can_be_read(page: Any, theme: str) -> None:
    page.emulate_media(color_scheme=theme)
    for address, heading in (("", "Atlas"), ("#/latent/3", "^Latent"), ("#/image/3?latent=3", "png"),
                             ("#/images", "Images"), ("#/image/1?with=4", " and ")):  # fmt: skip
        open_page(page, address, heading)
        assert page.evaluate(PALE) == [], address


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_what_stands_in_place_of_a_picture_can_be_read(explored: Explored, browser: Any, theme: str) -> None:
    for page in open_tab(browser, explored.site):
        page.emulate_media(color_scheme=theme)
        page.route("**/pictures/**", lambda route: None)  # which never come
        open_page(page, "#/image/3?latent=3", "png")
        page.locator(".picture .blank").filter(has_text="png").first.wait_for()
        assert page.evaluate(PALE) == []


def test_a_page_is_printed_in_black_on_white(page: Any) -> None:
    page.emulate_media(color_scheme="dark", media="print")
    open_page(page, "#/latent/3", "^Latent 3")
    colors = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    assert colors == ["rgb(255, 255, 255)", "rgb(0, 0, 0)"]
    assert not page.locator("header.bar").is_visible()
    page.locator(".shots img").first.wait_for()


def test_everything_has_a_name_for_a_screen_reader(page: Any) -> None:
    for address, heading in (("", "Atlas"), ("#/latent/3", "^Latent"), ("#/image/3", "png"), ("#/images", "Images")):
        open_page(page, address, heading)
        assert page.evaluate(NAMELESS) == []
        assert page.locator("h1").count() == 1


@pytest.mark.parametrize("width", [400, 1280])
def test_no_page_is_wider_than_the_screen(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    for address, heading in (("", "Atlas"), ("#/latent/3", "^Latent"), ("#/image/3", "png"), ("#/images", "Images"),
                             ("#/image/1?with=4", " and ")):  # fmt: skip
        open_page(page, address, heading)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, address


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("#/latent/64", "There is no latent 64; they are numbered 0 to 63."),
        ("#/latent/x", "There is no latent x"),
        ("#/image/60", "There is no image 60; they are numbered 0 to 59."),
        ("#/nowhere", "There is no page nowhere."),
    ],
)
def test_an_address_that_names_nothing_says_so(page: Any, address: str, said: str) -> None:
    page.goto(page.address + address)
    page.locator(".error").wait_for()
    assert said in page.locator(".error").inner_text()


def test_the_page_loads_nothing_from_elsewhere_and_is_small(page: Any) -> None:
    asked: list[tuple[str, int]] = []
    page.on("response", lambda answer: asked.append((answer.url, len(answer.body()) if answer.ok else 0)))
    open_page(page, "", "Atlas")
    page.wait_for_load_state("networkidle")
    assert all(url.startswith(page.address) for url, _ in asked)
    assert sum(size for url, size in asked if url.endswith((".js", ".css"))) <= 500_000


# ---------------------------------------------------------------------------------------------------------------------
# Names and notes


def write_note(tab: Any, name: str) -> str:
    tab.get_by_label("Name", exact=True).fill(name)
    tab.get_by_role("button", name="Save").click()
    return wait_for_text(tab.locator(".note [role=status]"))


def wait_for_text(said: Any, unlike: str = "") -> str:
    """What a line says once it says something. The page allows no code from elsewhere, so it is asked from here."""
    for _ in range(600):
        if (text := str(said.inner_text())) and not (unlike and text.startswith(unlike)):
            return text
        time.sleep(0.05)
    raise AssertionError("the page says nothing")


def test_two_tabs_do_not_lose_each_others_notes(served: Any, explored: Explored) -> None:
    first, second = served("#/latent/5"), served("#/latent/6")
    third = served("#/latent/5")
    for tab in (first, second, third):
        tab.get_by_role("heading", level=1, name=re.compile("^Latent")).wait_for()
        tab.get_by_label("Name", exact=True).wait_for()
    assert write_note(first, "one") == "Saved."
    assert write_note(second, "two") == "Saved."  # of another latent: both are kept
    assert "Somebody else has changed this latent" in write_note(third, "three")
    own = json.loads((explored.concepts / "notes" / "own.json").read_text())
    assert (own["5"]["name"], own["6"]["name"]) == ("one", "two")
    third.get_by_role("button", name="Save").click()
    third.get_by_text("Saved.").wait_for()
    assert json.loads((explored.concepts / "notes" / "own.json").read_text())["5"]["name"] == "three"


def test_a_site_keeps_notes_in_the_browser_and_exports_them(explored: Explored, browser: Any) -> None:
    context = browser.new_context()
    tab = context.new_page()
    tab.goto(f"{explored.site}#/latent/5")
    tab.get_by_label("Name", exact=True).wait_for()
    assert write_note(tab, "mine") == "Saved in this browser."
    tab.reload()
    tab.locator("h1 .name").wait_for()
    assert tab.locator("h1 .name").inner_text() == "mine"
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Export").click()
    assert json.loads(Path(download.value.path()).read_text()) == {"5": {"name": "mine", "note": ""}}
    context.close()


# ---------------------------------------------------------------------------------------------------------------------
# Uploads and edits


def test_an_upload_is_encoded_and_a_broken_one_is_refused(served: Any, explored: Explored, tmp_path: Path) -> None:
    """The upload is an image of the store, so its latents are those of the store."""
    uri = explored.codes.images["uri"][5].as_py()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    tab = served("#/image/5")
    field = tab.locator("input[type=file]")
    field.set_input_files(tmp_path / "broken.png")
    assert "image" in wait_for_text(tab.locator(".controls [role=status]"), "Encoding")
    assert "upload" not in tab.url
    field.set_input_files(explored.concepts.parent / "scenes" / "images" / uri)
    tab.wait_for_url("**/image/upload-**", timeout=60_000)
    tab.get_by_role("heading", level=1, name="your image").wait_for()
    tab.locator(".bars-table tbody tr").first.wait_for()
    shown = tab.locator(".bars-table tbody tr td:first-child").all_inner_texts()
    stored = [row["latent"] for row in query_image(explored.codes, 5, n_top=64).to_pylist()]
    assert {int(text.split()[0]) for text in shown[:5]} <= set(stored[:8])


def test_an_edit_shows_probabilities_beside_a_random_latent(served: Any, explored: Explored) -> None:
    tab = served("#/image/5")
    tab.get_by_role("button", name="Add").click()
    tab.locator(".edit select").select_option("set")
    tab.locator(".edit li input").fill("100")
    tab.get_by_role("button", name="Run the model").click()
    tab.get_by_text("Judge:").wait_for(timeout=60_000)
    cells = tab.locator(".edit table tbody tr").evaluate_all(
        "all => all.map(row => [...row.cells].slice(1).map(cell => parseFloat(cell.innerText.replace('<', ''))))"
    )
    before, after, random = np.array(cells).T
    np.testing.assert_allclose([before.sum(), after.sum(), random.sum()], 100, atol=1)
    assert not np.allclose(before, after, atol=0.01)
    text = tab.get_by_text("Judge:").inner_text()
    said = re.search(r"latent (\d+) instead.*\(on [\d.]+ % and ([\d.]+) % of all tokens\)", text)
    assert said, text
    density = ConceptTable.open(explored.concepts).table["density"][int(said[1])].as_py()
    assert float(said[2]) == pytest.approx(100 * density, rel=0.06)


def test_a_picture_that_is_no_png_is_taken_too(served: Any, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.webp")
    tab = served("#/image/5")
    tab.locator("input[type=file]").set_input_files(tmp_path / "noise.webp")
    tab.wait_for_url("**/image/upload-**", timeout=60_000)
