"""A real server of the explorer on a free port of this machine, and a client that sends what no browser would."""

import contextlib
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
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
