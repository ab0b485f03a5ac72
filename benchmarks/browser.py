"""Chromium, driven by Playwright, and what the pages of the explorer are waited for: shared by bench_explore.py.

Seconds are taken within the page, so that the driver's own time does not count.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

QUIET_MS = 700
"""What is far from the screen is loaded when a page has been idle for 300 ms."""
VIEWPORT = {"width": 1280, "height": 900}

WAIT = """
const frame = () => new Promise(requestAnimationFrame);
const until = async (done, ms = 120000) => {
    for (const end = performance.now() + ms; !done(); await frame())
        if (performance.now() > end) throw new Error(`it never came: ${done}: ${document.body.innerText.slice(0, 99)}`);
    await frame();  // what was found has been painted
    return performance.now();
};
const heading = (text) => new RegExp(`^${text}(\\\\W|$)`).test(document.querySelector('h1')?.textContent ?? '')
    && !document.querySelector('.wait');
const onScreen = (element) => {
    const { top, bottom, width } = element.getBoundingClientRect();
    return bottom > 0 && top < innerHeight && width > 0;
};
const drawn = (box) => [...box.querySelectorAll('img')].some((i) => i.complete && i.naturalWidth)
    || box.querySelector('.blank')?.textContent;  // a picture that a site leaves out
const pictures = () => [...document.querySelectorAll('.picture')];
const atlas = () => {
    const canvas = document.querySelector('.scatter canvas');
    return document.querySelector('.list tbody tr') && canvas && canvas.width === canvas.clientWidth * devicePixelRatio;
};
"""
TYPE = """
const box = document.querySelector('#search'), start = performance.now();
box.value = given;
box.dispatchEvent(new Event('input', {bubbles: true}));
"""
SEARCH = f"""{TYPE}
return await until(() => document.querySelector('.list [role=status]').textContent.includes(given)) - start;
"""
SEARCH_TEXT = f"""{TYPE}
return await until(() => document.querySelector('.list .tag')) - start;
"""
ARRIVE = """
const record = await until(() => heading(given[1]));
const shown = await until(() => pictures().some(onScreen) && pictures().filter(onScreen).every(drawn));
return [record, shown];
"""
CLICK = f"""
const link = Object.assign(document.createElement('a'), {{href: given[0]}});
document.body.append(link);
const start = performance.now();
link.click();
link.remove();
{ARRIVE.replace("[record", "[start, record")}
"""
EDIT = """
const table = () => document.querySelector('.edit table'), old = table()?.outerHTML;
const button = [...document.querySelectorAll('.edit button')].find((b) => b.textContent === 'Run the model');
const start = performance.now();
button.click();
const said = () => document.querySelector('.edit [role=status]').textContent;
return await until(() => table() && table().outerHTML !== old && !said()) - start;
"""


@contextmanager
def open_browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Tab:
    """A tab of a browser with an empty cache, and the bytes that it has received."""

    def __init__(self, browser: Any, address: str) -> None:
        self.context = browser.new_context(viewport=VIEWPORT)
        self.page = self.context.new_page()
        self.address, self.n_bytes = address, 0
        network = self.context.new_cdp_session(self.page)
        network.on("Network.loadingFinished", self._count)
        network.send("Network.enable")

    def _count(self, event: dict[str, Any]) -> None:
        self.n_bytes += int(event["encodedDataLength"])

    def __enter__(self) -> "Tab":
        return self

    def __exit__(self, *error: object) -> None:
        self.context.close()

    def open(self, route: str = "") -> None:
        self.page.goto(self.address + route, wait_until="commit")

    def run(self, script: str, argument: object = None) -> Any:
        """What an async function of the page returns; it may use the words of WAIT."""
        return self.page.evaluate(f"async (given) => {{ {WAIT} {script} }}", argument)

    def settle(self) -> int:
        """The bytes since the last call, once nothing more comes."""
        before = -1
        while before != self.n_bytes:
            before = self.n_bytes
            self.page.wait_for_timeout(QUIET_MS)
        self.n_bytes = 0
        return before

    def click(self, route: str, heading: str) -> tuple[float, float]:
        """(seconds until the heading, until the pictures on the screen are drawn) after a click on a link."""
        start, record, shown = self.run(CLICK, [route, heading])
        return (record - start) / 1e3, (shown - start) / 1e3

    def arrive(self, route: str, heading: str) -> tuple[float, float]:
        """The same for an address that is opened, from the start of the navigation."""
        self.open(route)
        record, shown = self.run(ARRIVE, [route, heading])
        return record / 1e3, shown / 1e3

    def fetch_plainly(self, n_bytes: int) -> float:
        """Seconds to fetch the page's script until so many bytes have moved."""
        milliseconds = self.run(
            """const start = performance.now();
            for (let got = 0; got < given;)
                got += (await (await fetch('app.js', {cache: 'no-store'})).arrayBuffer()).byteLength;
            return performance.now() - start;""",
            n_bytes,
        )
        self.settle()
        return float(milliseconds) / 1e3
