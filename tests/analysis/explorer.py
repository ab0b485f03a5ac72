"""A real server of the explorer on a free port of this machine, and a client that sends what no browser would."""

import contextlib
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

PAGE = {"index.html": b"<!doctype html><title>page</title>", "app.js": b"1", "style.css": b"a{}"}
"""A page of three small files in place of the built one."""


@dataclass(frozen=True)
class Response:
    status: int
    headers: Any
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Client:
    address: str

    def ask(self, path: str, data: bytes | object = None, method: str | None = None, **headers: str) -> Response:
        """GET, or POST where there is data; an object is sent as JSON. Redirects are not followed."""
        body = data if isinstance(data, bytes) or data is None else json.dumps(data).encode()
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.address + path, body, names, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Stay())
        try:
            with opener.open(request, timeout=60) as answer:
                return Response(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as error:
            return Response(error.code, error.headers, error.read())

    def raw(self, request: bytes) -> bytes:
        """What the server answers to bytes that no client would send."""
        host, port = self.address.removeprefix("http://").rstrip("/").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(request)
            parts = []
            with contextlib.suppress(TimeoutError):
                while part := connection.recv(65536):
                    parts.append(part)
        return b"".join(parts)


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **keywords: Any) -> None:
        return None


def dawdle(*paths: str) -> dict[str, Any]:
    """Makes a column of the atlas for longer than any test takes; for a process of its own."""
    time.sleep(3600)
    return {}


@contextlib.contextmanager
def serving(sources: Any, **options: Any) -> Iterator[Client]:
    """A real server on a free port of this machine."""
    import uvicorn

    from analysis.config import ModelOptions
    from analysis.explore.abilities import find_abilities
    from analysis.explore.data import Data
    from analysis.explore.live import LiveModel
    from analysis.explore.server import make_app
    from analysis.explore.serving import LOOPBACK, open_socket

    data, model = (
        Data(sources, live=True, abilities=find_abilities(sources)),
        LiveModel(sources, ModelOptions(device="cpu")),
    )
    app = make_app(data, lambda: model, **{"hosts": LOOPBACK, **options})
    with open_socket("127.0.0.1", 0) as listening:
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield Client(f"http://127.0.0.1:{listening.getsockname()[1]}/")
        finally:
            server.should_exit = True
            thread.join(20)


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


def open_tab(browser: Any, address: str, **options: Any) -> Iterator[Any]:
    """An empty tab; `address` is that of a server or a site. Errors of the page fail the test that uses it."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    context.set_default_timeout(120_000)  # a loaded machine takes its time
    tab, errors = context.new_page(), []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("dialog", lambda dialog: errors.append(f"a dialog: {dialog.message}"))
    tab.address = address
    yield tab
    context.close()
    assert errors == []


def open_page(tab: Any, address: str, heading: str) -> None:
    """Go to an address of the page, and wait for its heading."""
    tab.goto(tab.address + address)
    tab.get_by_role("heading", level=1, name=re.compile(heading)).wait_for()


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait until a page shows what it should: it draws a moment after its address or its heading has changed."""
    for _ in range(1200):
        if holds():
            return
        time.sleep(0.05)
    assert holds()


NAMELESS = """() => [...document.querySelectorAll('a, button, input, select, textarea, img, canvas, iframe, [role]')]
.filter(e => e.getAttribute('role') !== 'status' && !e.closest('[aria-hidden]')
  && !(e.innerText || e.getAttribute('aria-label') || e.hasAttribute('alt') || e.title || e.labels?.length))
.map(e => e.outerHTML.slice(0, 120))"""
"""What a screen reader would have no name for."""

PALE = """() => {
    const channels = text => (text.match(/[0-9.]+/g) ?? []).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
        .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = e => {
        for (; e; e = e.parentElement) {
            const color = channels(getComputedStyle(e).backgroundColor);
            if (color.length === 3 || color[3] === 1) return color;
        }
        return [255, 255, 255];
    };
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = new Set();
    while (texts.nextNode()) {
        const e = texts.currentNode.parentElement;
        if (!texts.currentNode.data.trim() || !e.checkVisibility()) continue;
        if (e.closest(':disabled, script, noscript')) continue;
        const [a, b] = [light(channels(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
        const contrast = (a + 0.05) / (b + 0.05);
        if (contrast < 4.5) found.add(`${e.tagName} ${e.className}: ${contrast.toFixed(2)}`);
    }
    return [...found];
}"""
"""Texts that differ too little from what is behind them (WCAG 2.2, 1.4.3)."""
