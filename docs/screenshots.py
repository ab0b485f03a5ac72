"""Make the pictures of docs/reference/screens.md again, from the demo: docs/explore/<page>-<width>-<theme>.webp.

    python docs/screenshots.py DEMO

DEMO is a folder for quickstart's demo and what is made from it: a run of another seed, prompts, a comparison and a
masking curve. What is there already is used again. This needs the extras `explore` and `dev`, and Chromium; it takes
ten minutes on two cores that others use, too, or two where DEMO is there.
"""

import io
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from actcache import PromptConfig, adapt, extract
from actcache.demo import MODEL, PRETRAINED
from analysis import (
    ComparisonConfig,
    ConceptTable,
    MaskingConfig,
    analyze,
    compare,
    inspect_dictionaries,
    mask_latents,
    name_latents,
    quickstart,
)
from analysis.tour import LAYER, SAE, STEPS
from saetrain import Run, TrainConfig, encode, train

ROOT = Path(__file__).parents[1]
OUT = Path(__file__).parent / "explore"
HEIGHT = 860
SHOTS = [(width, theme) for width in (1280, 400) for theme in ("light", "dark")]  # of each page
QUALITY = 72
WORDS = (
    "red green blue yellow purple cyan white circle square triangle star cross ring solid striped dotted checkered "
    "small large grass sky sand night brick"
)


class Demo(NamedTuple):
    """What the explorer is started with."""

    concepts: Path
    comparison: Path
    results: tuple[Path, ...]


class View(NamedTuple):
    """A page to be shown: its address, what is done there, and what shows that it is ready.

    Attributes:
        scroll: what is scrolled to on a narrow screen, where it lies far below.
    """

    address: str
    ready: str
    act: Callable[[Page], None] = lambda page: None
    scroll: str = ""


def make_demo(folder: Path) -> Demo:
    """Quickstart, and on its unseen scenes, which no SAE was trained on, all that the explorer can show."""
    quickstart(folder)
    run, unseen, images = Run.open(folder / "run"), folder / "unseen.acts", folder / "unseen-scenes" / "images"
    config = TrainConfig(n_steps=STEPS, batch_size=2048, lr=2e-3, dead_tokens=100_000, seed=1)
    train(folder / "scenes.acts", folder / "run-seed1", sae=SAE, config=config)
    inspect_dictionaries([run, folder / "run-seed1"], unseen, folder / "inspection.json")
    base = analyze(folder / "unseen.codes", folder / "unseen.concepts")
    (folder / "words.txt").write_text("\n".join(WORDS.split()))
    name_latents(base, vocabulary=folder / "words.txt")
    model: dict[str, Any] = {"model": MODEL, "pretrained": PRETRAINED}
    settings = PromptConfig("maple", n_prompts=4, lr=0.5, batch_size=32, n_epochs=10, augment=False, shots=64)
    prompts = folder / "scenes.prompts"
    adapt(folder / "scenes" / "images", prompts, **model, config=settings, test=images)
    acts = extract(
        images, folder / "adapted.acts", **model, layers=[LAYER], masks=folder / "unseen-scenes" / "objects",
        batch_size=64, seed=0, prompts=prompts,
    )  # fmt: skip
    adapted = analyze(encode(run, acts, folder / "adapted.codes"), folder / "adapted.concepts")
    comparison = folder / "comparison.json"
    compare(base.path, adapted.path, comparison, ComparisonConfig(k=(1, 2, 5, 10), n_top=8, high=8, low=16))
    masks = folder / "masks.json"
    mask_latents(run, unseen, masks, MaskingConfig(k=(1, 2, 5, 10)), chosen_on=folder / "scenes.codes")
    return Demo(base.path, comparison, (masks, folder / "inspection.json"))


def choose_views(concepts: ConceptTable) -> dict[str, View]:
    """The pages, of the latent that tells most about one class and of its strongest image."""
    table = concepts.table.select(["latent", "label_entropy", "n_tokens"]).to_pylist()
    telling = [row for row in table if row["n_tokens"] > 200 and row["label_entropy"] is not None]
    latent = min(telling, key=lambda row: (row["label_entropy"], -row["n_tokens"]))["latent"]
    first, second = [
        row["image"] for row in concepts.rows_of("top_images", latent).sort_by("rank").slice(0, 2).to_pylist()
    ]
    return {
        "atlas": View("#/atlas", ".list tbody tr"),
        "map": View("#/atlas?view=map&color=name", ".list tbody tr"),
        "latent": View(f"#/latent/{latent}", ".shots img"),
        "image": View(f"#/image/{first}", ".bars-table tbody tr", choose_patch),
        "edit": View(f"#/image/{first}?latent={latent}", ".bars-table tbody tr", drop_latent, ".edit"),
        "two-images": View(f"#/image/{first}?with={second}&latent={latent}", ".thirds li"),
        "images": View("#/images", ".shots img"),
        "adaptation": View("#/adaptation", ".shots img"),
        "results": View("#/results", "iframe", wait_for_plots),
    }


def choose_patch(page: Page) -> None:
    """The patch in the middle of what is shown, and the latent that fires most there."""
    place = page.locator(".picker").bounding_box() or {}
    page.locator(".picker").click(position={"x": place["width"] / 2, "y": place["height"] / 2})
    page.locator(".bars-table .plain-button").first.click()
    page.mouse.move(0, 0)


def drop_latent(page: Page) -> None:
    """The latent of the address is left out, and the model runs."""
    page.get_by_role("button", name="Add").click()
    page.get_by_role("button", name="Run the model").click()
    page.get_by_text("Judge:").wait_for(timeout=120_000)


def wait_for_plots(page: Page) -> None:
    page.frame_locator("iframe").locator(".bk-Figure").first.wait_for()


@contextmanager
def explorer(demo: Demo) -> Iterator[str]:
    """The address of `explore` on a free port."""
    words = [sys.executable, ROOT / "cli.py", "explore", demo.concepts, "--port", "0", "--compare", demo.comparison]
    for file in demo.results:
        words += ["--result", file]
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found, "the server did not start"
        yield found[0]
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def chromium() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def open_view(browser: Any, address: str, view: View, width: int, theme: str) -> Page:
    """A tab that shows a page."""
    is_phone = width < 900
    context = browser.new_context(
        viewport={"width": width, "height": HEIGHT}, color_scheme=theme, is_mobile=is_phone, has_touch=is_phone
    )
    page: Page = context.new_page()
    page.goto(address + view.address)
    page.locator(view.ready).first.wait_for()
    view.act(page)
    if view.scroll and is_phone:
        page.locator(view.scroll).evaluate("element => element.scrollIntoView()")
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(300)  # canvases are drawn after what they show has arrived
    return page


def main(folder: Path) -> None:
    demo = make_demo(folder)
    OUT.mkdir(exist_ok=True)
    n_bytes = 0
    with explorer(demo) as address, chromium() as browser:
        for name, view in choose_views(ConceptTable.open(demo.concepts)).items():
            for width, theme in SHOTS:
                page = open_view(browser, address, view, width, theme)
                file = OUT / f"{name}-{width}-{theme}.webp"
                with Image.open(io.BytesIO(page.screenshot())) as picture:
                    picture.convert("RGB").save(file, quality=QUALITY, method=6)
                n_bytes += file.stat().st_size
                print(f"{file.relative_to(ROOT)}  {file.stat().st_size / 1000:.0f} kB")
                page.context.close()
    print(f"{n_bytes / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
