"""The server of the explorer: the page, `data/` and `api/`, as a Starlette application.

Every answer carries a policy under which the page can load from this server only. A request counts only if it was
meant for this server (its Host) and, where it changes something, comes from its own page (its Origin). Where the server
can be reached from other machines, it asks for a token.
"""

import gzip
import json
import secrets
from collections.abc import Awaitable, Callable, Mapping
from http.cookies import SimpleCookie
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actcache import PipelineError, SettingsError
from actcache.text import visible
from analysis.explore.data import JSON, Data
from analysis.explore.edit import Edit
from analysis.explore.encoding import encode
from analysis.explore.page_files import INDEX, kind_of, read_page

if TYPE_CHECKING:
    from analysis.explore.live import LiveModel

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "font-src 'self'; frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
RESULTS_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'; sandbox allow-scripts allow-top-navigation-by-user-activation"
)
"""Of results.html, whose scripts are in the page; it runs in an origin of its own and reaches nothing here. Its links
lead to latents."""
MAX_NOTE_BYTES, MAX_EDIT_BYTES, MAX_UPLOAD_BYTES = 1 << 16, 1 << 20, 1 << 25
MAX_QUERY = 300
LEAST_PACKED = 1 << 18
"""Bytes of JSON above which they are compressed: names, and the list of all images. It takes 10 ms per megabyte."""
COOKIE = "patchsae-token"


def make_app(
    data: Data, model: Callable[[], "LiveModel"], *, hosts: frozenset[str] = frozenset(), token: str | None = None
) -> ASGIApp:
    """The application.

    Args:
        model: opens what answers uploads, edits and texts; it loads torch.
        hosts: the names that a request may call this server by, without the port; all if empty.
        token: what a request must know; None for nothing.
    """
    stamp = secrets.token_hex(4)  # answers stay in the browser's cache as long as this server runs

    async def page(request: Request) -> Response:
        name = request.path_params.get("name", INDEX)
        try:
            found = read_page()
        except SettingsError as error:
            raise HTTPException(404, str(error)) from error
        if name not in found:
            raise HTTPException(404, f"There is no {name[:100]}.")
        return Response(found[name], media_type=kind_of(name))

    async def answer(request: Request) -> Response:
        path = request.path_params["path"]
        changing = path in ("site.json", "names.json", "atlas.bin")
        tag = f'"{stamp}-{data.stage}"'
        headers = {"cache-control": "no-store"} if changing else {"cache-control": "no-cache", "etag": tag}
        if path == "results.html":
            headers["content-security-policy"] = RESULTS_POLICY  # also of a 304, whose headers replace what is kept
        if not changing and request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        try:
            found = await run_in_threadpool(data.answer, path)
        except PipelineError as error:
            raise HTTPException(404, str(error)) from error
        body = found.body
        if found.kind == JSON and len(body) > LEAST_PACKED and "gzip" in request.headers.get("accept-encoding", ""):
            headers |= {"content-encoding": "gzip", "vary": "accept-encoding"}
            body = await run_in_threadpool(gzip.compress, body, 1)
        return Response(body, media_type=found.kind, headers=headers)

    async def picture(request: Request) -> Response:
        try:
            body = await run_in_threadpool(data.shelf.whole, request.path_params["image"])
        except PipelineError as error:
            raise HTTPException(404, str(error)) from error
        return Response(body, media_type="image/jpeg", headers={"cache-control": "no-cache", "etag": f'"{stamp}"'})

    async def notes(request: Request) -> Response:
        fields = await read_json(request, MAX_NOTE_BYTES)
        done, names = await run_in_threadpool(data.notes.write, request.path_params["latent"], fields)
        return show({"names": names}, 200 if done else 409)

    async def upload(request: Request) -> Response:
        body = await read_body(request, MAX_UPLOAD_BYTES)
        return show(await run_in_threadpool(lambda: model().upload(body)))

    async def edit(request: Request) -> Response:
        wanted = Edit.parse(await read_json(request, MAX_EDIT_BYTES))
        return show(await run_in_threadpool(lambda: model().edit(wanted)))

    async def search(request: Request) -> Response:
        text = request.query_params.get("q", "").strip()
        if not 0 < len(text) <= MAX_QUERY:
            raise HTTPException(400, f"Give a text of at most {MAX_QUERY} letters: api/search?q=TEXT.")
        return show(await run_in_threadpool(lambda: model().search(text)))

    routes = [
        Route("/", page),
        Route("/data/{path:path}", answer),
        Route("/api/picture/{image:int}", picture),
        Route("/api/notes/{latent:int}", notes, methods=["PUT"]),
        Route("/api/upload", upload, methods=["POST"]),
        Route("/api/edit", edit, methods=["POST"]),
        Route("/api/search", search),
        Route("/{name}", page),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: show_error, PipelineError: show_refusal})
    return Guard(app, hosts, token)


def show(record: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A record as JSON."""
    return Response(encode(record), status, headers, "application/json")


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a request. Raises HTTPException 413 as soon as it is larger than `limit` bytes."""
    parts, n_bytes = [], 0
    try:
        async for part in request.stream():
            n_bytes += len(part)
            if n_bytes > limit:
                raise HTTPException(413, f"This is larger than {limit // 1024:,} kB, which is the limit.")
            parts.append(part)
    except ClientDisconnect as error:
        raise HTTPException(400, "The request was cut off.") from error
    return b"".join(parts)


async def read_json(request: Request, limit: int) -> Mapping[str, Any]:
    """A JSON object. Raises HTTPException 400 for anything else."""
    body = await read_body(request, limit)
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "The request is not JSON.") from error
    if not isinstance(fields, dict):
        raise HTTPException(400, "Expected a JSON object.")
    return fields


async def show_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return show({"error": visible(error.detail)}, error.status_code, error.headers)


async def show_refusal(request: Request, error: Exception) -> Response:
    return show({"error": visible(error)}, 422)


class Guard:
    """Lets requests through that are meant for this server, and puts the policy on every answer."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str], token: str | None) -> None:
        self.app, self.hosts, self.token = app, hosts, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *((name, value) for name, value in _HEADERS if name not in present),
                ]
            await send(message)

        respond: Callable[[Scope, Receive, Send], Awaitable[None]] = self._refuse(request) or self.app
        await respond(scope, receive, send_guarded)

    def _refuse(self, request: Request) -> Response | None:
        """What is answered to a request that is not let through; None for one that is."""
        host = request.headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if self.hosts and name.lower() not in self.hosts:
            return show({"error": "This server answers under its own address only."}, 400)
        origin = request.headers.get("origin")
        if request.method not in ("GET", "HEAD") and origin is not None and origin.partition("://")[2] != host:
            return show({"error": "This request comes from another page."}, 403)
        return None if self.token is None else self._ask_for_token(request, self.token)

    def _ask_for_token(self, request: Request, token: str) -> Response | None:
        cookie = SimpleCookie()
        try:
            cookie.load(request.headers.get("cookie", ""))
        except Exception:  # another server's cookie
            cookie = SimpleCookie()
        kept = cookie[COOKIE].value if COOKIE in cookie else ""
        for given in (request.headers.get("x-token", ""), kept):
            if secrets.compare_digest(given.encode(), token.encode()):
                return None
        asked = request.query_params.get("token", "")
        if secrets.compare_digest(asked.encode(), token.encode()):
            response = RedirectResponse(request.url.path, 303)  # the token leaves the address
            response.set_cookie(COOKIE, token, httponly=True, samesite="strict")
            return response
        return show({"error": "Open the address that `explore` printed, which holds the token."}, 403)


_HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-cache"),
]
