"""Measures the explorer in a real browser: how long each page takes and how many bytes it moves, beside its limits.

    python benchmarks/bench_explore.py --folder /big/disk/explore

Makes synthetic codes of 10^7 tokens x 49,152 latents (as bench_query.py does), small pictures for all images, an SAE of
that width, and a concept table; starts `explore` as a process, and opens it in Chromium with an empty cache each time.
The same pages are then read from `publish --site` by Python's own web server. Parts, which are all measured unless
--parts names some: `server` and `site` as above; `edit`, on a table of a few images by ViT-B/16 with random weights;
`demo`, the size of the quickstart's site. What is made is kept in --folder (8 GB).

Seconds are those of the browser, from the click until what is on the screen has been drawn: `record` is the heading
alone. Bytes are those of the network, with headers. `plain` is how long the browser takes to fetch the page's script so
often that as many bytes have moved, from the same server: no page that moves these bytes can be faster.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from common import emit, machine, parser

import numpy as np
from browser import EDIT, SEARCH, SEARCH_TEXT, Tab, open_browser
from explored_tables import make_small, make_table

from analysis.explore.coherence import FILE
from analysis.explore.latents import describe_latent
from analysis.explore.site import choose_latents
from analysis.explore.sources import open_sources
from saetrain import CodeStore

ROOT = Path(__file__).parents[1]
PARTS = ["server", "site", "edit", "demo"]
LIMITS: dict[str, float] = {
    "first view s": 2, "click s": 0.3, "latent bytes": 1e6, "image bytes": 2e5, "script bytes": 5e5,
    "demo's site bytes": 15e6, "edit s": 1, "share of the codes": 0.01,
}  # fmt: skip


class Row(NamedTuple):
    """What was measured: medians over repetitions; of several latents or images the slowest, and the most bytes."""

    what: str
    seconds: float
    limit_s: float | None = None
    record_s: float | None = None
    first_s: float | None = None
    n_bytes: int | None = None
    limit_bytes: float | None = None
    plain_s: float | None = None


def call(*words: object) -> None:
    """Run a verb of the command line."""
    command = [sys.executable, ROOT / "cli.py", "--quiet", *map(str, words)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)


# ---------------------------------------------------------------------------------------------------------------------
# Who answers


@contextmanager
def explore(table: Path) -> Iterator[str]:
    """The address of `explore`, as a process."""
    command = [sys.executable, ROOT / "cli.py", "--json", "explore", table, "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["address"]
        finally:
            process.terminate()


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """The address of a folder, by Python's own web server."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{process.stdout.readline().split('port ')[1].split()[0]}/"
        finally:
            process.terminate()


# ---------------------------------------------------------------------------------------------------------------------
# Looking


def look(
    browser: Any, address: str, latents: Sequence[int], images: Sequence[int], grid: int, repeat: int
) -> list[Row]:
    """Every page of a large table: each repetition in a tab with an empty cache."""
    views, searches, patches, bytes_of_view = [], [], [], []
    clicks: dict[str, dict[int, list[tuple[float, float, int]]]] = {"latent": {}, "image": {}}
    plain: dict[str, float] = {}
    for number in range(repeat):
        with Tab(browser, address) as tab:
            tab.open()
            views.append(tab.run("return await until(atlas)") / 1e3)
            bytes_of_view.append(tab.settle())
            searches.append(tab.run(SEARCH, "class00") / 1e3)
            for page, numbers in (("latent", latents), ("image", images)):
                for n in numbers:
                    tab.settle()
                    name = f"Latent {n}" if page == "latent" else f"{n:08d}.jpg"
                    record, shown = tab.click(f"#/{page}/{n}", name)
                    clicks[page].setdefault(n, []).append((record, shown, tab.settle()))
            patches += [choose_patch(tab, grid, place) for place in (0, grid * grid // 2)]
            if number == repeat - 1:
                sizes = {"view": bytes_of_view[-1], **{page: most_bytes(clicks[page]) for page in clicks}}
                plain = {name: tab.fetch_plainly(size) for name, size in sizes.items()}
    rows = [
        Row("first view: the atlas is drawn", statistics.median(views), LIMITS["first view s"], first_s=views[0],
            n_bytes=max(bytes_of_view), plain_s=plain["view"]),
        Row("search by class, all latents", statistics.median(searches), LIMITS["click s"]),
    ]  # fmt: skip
    for page, of in clicks.items():
        slowest = max(of, key=lambda n: statistics.median(shown for _, shown, _ in of[n]))
        record, shown, _ = (statistics.median(column) for column in zip(*of[slowest], strict=True))
        first = max(times[0][1] for times in of.values())
        rows.append(
            Row(f"click on {'a latent' if page == 'latent' else 'an image'}, slowest of {len(of)}", shown,
                LIMITS["click s"], record_s=record, first_s=first, n_bytes=most_bytes(of),
                limit_bytes=LIMITS[f"{page} bytes"], plain_s=plain[page])
        )  # fmt: skip
    return [*rows, Row("click on a patch", max(patches), LIMITS["click s"])]


def most_bytes(of: dict[int, list[tuple[float, float, int]]]) -> int:
    return max(n_bytes for times in of.values() for _, _, n_bytes in times)


def choose_patch(tab: Tab, grid: int, patch: int) -> float:
    """Seconds from releasing the mouse on a patch until its latents are listed."""
    row, column = divmod(patch, grid)
    box = tab.page.locator(".picker").bounding_box()
    tab.run("addEventListener('pointerup', () => { window.released = performance.now(); }, true)")
    tab.page.mouse.click(box["x"] + (column + 0.5) * box["width"] / grid, box["y"] + (row + 0.5) * box["height"] / grid)
    text = f"row {row}, column {column}"
    seconds = tab.run(
        "return await until(() => [...document.querySelectorAll('h2')].some((h) => h.textContent.includes(given)))"
        " - window.released", text,
    )  # fmt: skip
    return float(seconds) / 1e3


def look_first(browser: Any, table: Path, latent: int, when: str = "") -> list[Row]:
    """A server that has just started: until it answers, and the first latent."""
    started = time.perf_counter()
    with explore(table) as address, Tab(browser, address) as tab:
        ready = time.perf_counter() - started
        record, shown = tab.arrive(f"#/latent/{latent}", f"Latent {latent}")
    return [
        Row("start of the server", ready),
        Row(f"page and first latent of a new server{when}", shown, LIMITS["first view s"], record_s=record),
    ]


def edit(browser: Any, table: Path, repeat: int) -> list[Row]:
    """Changed latents, an image of the user, and a text."""
    picture = next(table.parent.glob("images/*/1.png"))
    with explore(table) as address, Tab(browser, address) as tab:
        tab.open("#/image/0")
        tab.page.get_by_role("button", name="Add").click()
        times = []
        for number in range(repeat + 1):
            tab.settle()
            tab.page.get_by_label("What happens to latent").select_option(["set", "drop"][number % 2])
            times.append(tab.run(EDIT) / 1e3)
        uploads, texts = [], []
        for _ in range(repeat):
            tab.open("#/image/0")
            tab.page.locator("input[type=file]").wait_for()
            started = time.perf_counter()
            tab.page.locator("input[type=file]").set_input_files(picture)
            tab.page.get_by_role("heading", level=1, name="your image").wait_for()
            uploads.append(time.perf_counter() - started)
        for text in ["red ring", "a dog", "blue"][:repeat]:
            tab.open()
            tab.run("await until(atlas)")
            texts.append(tab.run(SEARCH_TEXT, text) / 1e3)
    name = table.stem
    return [
        Row(f"an edit from block {name}", statistics.median(times[1:]), LIMITS["edit s"], first_s=times[0]),
        Row(f"an image of the user, block {name}", statistics.median(uploads)),
        Row(f"a text, block {name}", statistics.median(texts), first_s=texts[0]),
    ]


def count_read(table: Path, latents: Sequence[int]) -> Row:
    """The largest share of the codes that a latent's record reads."""
    sources = open_sources(table)
    codes = sources.codes
    assert isinstance(codes, CodeStore)
    whole = codes.n_entries * sum(codes.dtypes[name].itemsize for name in ("latent", "value", "row", "latent_value"))
    most, slowest = 0, 0.0
    for latent in latents:
        before, started = codes.bytes_read, time.perf_counter()
        describe_latent(sources, latent)
        most, slowest = max(most, codes.bytes_read - before), max(slowest, time.perf_counter() - started)
    return Row("codes read for a latent", slowest, n_bytes=most, limit_bytes=LIMITS["share of the codes"] * whole)


# ---------------------------------------------------------------------------------------------------------------------
# All of it


def spread(numbers: Sequence[int], counts: np.ndarray, n: int) -> list[int]:
    """Some of the latents that fire, from the most frequent to the rarest, evenly by the logarithm of their rank."""
    order = sorted((number for number in numbers if counts[number]), key=lambda number: -counts[number])
    ranks = np.unique(np.geomspace(1, len(order), n).astype(int) - 1)
    return [order[rank] for rank in ranks]


def measure_table(browser: Any, folder: Path, given: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    """The parts `server` and `site`."""
    table = make_table(folder, given)
    sources = open_sources(table)
    rng = np.random.default_rng(1)
    if "server" in given.parts:
        latents = spread(range(given.n_latents), sources.n_fired, given.clicks)
        images = rng.choice(given.images, min(given.clicks, given.images), replace=False).tolist()
        rows = [*look_first(browser, table, latents[len(latents) // 2]), count_read(table, latents)]
        kept = (table / "notes" / FILE).rename(table.parent / FILE)  # with the process that makes it beside
        try:
            rows += [
                row._replace(what=f"{row.what}, as the map's maker runs") for row in look_first(browser, table, 0)[1:]
            ]
        finally:
            kept.rename(table / "notes" / FILE)
        with explore(table) as address:
            rows += look(browser, address, latents, images, given.grid, given.repeat)
        yield from (("server", row) for row in rows)
    if "site" in given.parts:
        site = table.parent / "site"
        if not site.exists():
            call("publish", table, "--site", site)
        chosen = choose_latents(sources, [])
        latents = spread(chosen, sources.n_fired, given.clicks)
        images = [int(next(iter(describe_latent(sources, latent)["images"]))) for latent in latents]  # the strongest
        with serve(site) as address:
            yield from (
                ("site", row)
                for row in look(browser, address, latents, [*dict.fromkeys(images)], given.grid, given.repeat)
            )


def measure_demo(folder: Path) -> Iterator[tuple[str, Row]]:
    """How long the quickstart's site takes to write, and how large it is."""
    if not (folder / "demo" / "report.html").exists():
        call("quickstart", folder / "demo")
    started = time.perf_counter()
    call("publish", folder / "demo" / "scenes.concepts", "--site", folder / "demo-site", "--overwrite")
    n_bytes = sum(file.stat().st_size for file in (folder / "demo-site").rglob("*") if file.is_file())
    yield "demo", Row("site of the demo", time.perf_counter() - started, n_bytes=n_bytes,
                      limit_bytes=LIMITS["demo's site bytes"])  # fmt: skip


def measure(given: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Row]]:
    with open_browser() as browser:
        if {"server", "site"} & set(given.parts):
            yield from measure_table(browser, folder, given)
        if "edit" in given.parts:
            for layer in given.layers:
                yield from (("edit", row) for row in edit(browser, make_small(folder, given, layer), given.repeat))
    if "demo" in given.parts:
        yield from measure_demo(folder)


def show_row(part: str, row: Row) -> str:
    def write(value: float | None, kind: str) -> str:
        return "" if value is None else f"{value:,.3f} s" if kind == "s" else f"{value / 1e3:,.0f} kB"

    cells = [(row.seconds, "s"), (row.limit_s, "s"), (row.record_s, "s"), (row.first_s, "s"), (row.n_bytes, "b"),
             (row.limit_bytes, "b"), (row.plain_s, "s")]  # fmt: skip
    return f"{part:7} {row.what:44} " + " ".join(f"{write(value, kind):>10}" for value, kind in cells)


def main() -> None:
    options = parser(
        __doc__, images=50_762, grid=14, n_latents=49_152, l0=32, shards=50, classes=1000, pixels=224, d_model=768,
        clicks=10, repeat=3, model="ViT-B-16-quickgelu", pretrained="random:0", layers=[0, 10], parts=PARTS,
    )  # fmt: skip
    options.add_argument("--folder", type=Path, help="where to keep what is made; a temporary folder by default")
    given = options.parse_args()
    load = os.getloadavg()[0]
    script = sum((ROOT / "analysis/explore/page" / name).stat().st_size for name in ("app.js", "style.css"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if not given.json:
            print(
                machine(), f"load {load:.2f}", f"script {script:,} bytes, limit {LIMITS['script bytes']:,.0f}", sep="; "
            )
            heads = ("seconds", "limit", "record", "first", "bytes", "limit", "plain")
            print(f"{'part':7} {'what':44} " + " ".join(f"{head:>10}" for head in heads))
        rows = []
        for part, row in measure(given, folder):
            rows.append({"part": part, **row._asdict()})
            if not given.json:
                print(show_row(part, row), flush=True)
    if given.json:
        emit(given, load=load, script_bytes=script, rows=rows)


if __name__ == "__main__":
    main()
