"""explore_concepts(): the explorer as a small server on this machine."""

import errno
import ipaddress
import secrets
import socket
import threading
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from actcache import PipelineError, SettingsError
from analysis.concepts import ConceptTable
from analysis.config import ModelOptions
from analysis.explore.abilities import find_abilities
from analysis.explore.data import Data
from analysis.explore.sources import Sources, open_sources

if TYPE_CHECKING:
    from analysis.explore.live import LiveModel

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
INSTALL = "The explorer needs starlette and uvicorn, which are not installed: pip install 'patchsae[explore]'."


def explore_concepts(
    concepts: ConceptTable | str | Path, *, host: str = "127.0.0.1", port: int = 8000, codes: str | Path | None = None,
    run: str | Path | None = None, store: str | Path | None = None, images: str | Path | None = None,
    compare: str | Path | None = None, results: tuple[str | Path, ...] | list[Path] = (),
    model: ModelOptions = ModelOptions(), browser: bool = False, on_ready: Callable[[str], None] | None = None,
) -> None:  # fmt: skip
    """Show a concept table in a browser, until Ctrl-C.

    Args:
        host: the address to answer on. Other machines reach any but that of this machine (127.0.0.1), and the server
            then asks for a token, which is part of the address that is passed to `on_ready`.
        port: 0 takes one that is free.
        codes, run, store, images: where these lie now, if they have moved.
        compare, results: see `open_sources`.
        model: the model behind the store, if its files have moved.
        browser: open a browser window.
        on_ready: called with the address once the server can be reached.

    Raises:
        SettingsError: starlette or uvicorn is not installed, or the port is taken. Others as `open_sources`.
    """
    try:
        import uvicorn

        from analysis.explore.server import make_app
    except ImportError as error:
        raise SettingsError(INSTALL) from error
    sources = open_sources(concepts, codes=codes, run=run, store=store, images=images, compare=compare, results=results)
    listening = open_socket(host, port)
    with listening:
        token = None if is_loopback(host) else secrets.token_urlsafe(16)
        known = frozenset() if token else LOOPBACK | {f"[{host}]" if ":" in host else host.lower()}
        data = Data(sources, live=True, abilities=find_abilities(sources))
        app = make_app(data, lambda: open_model(sources, model), hosts=known, token=token)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=1, server_header=False
        )
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listening.getsockname()[1]}/" + (f"?token={token}" if token else "")
        threading.Thread(target=warm_up, args=(data,), daemon=True).start()
        data.start()
        if on_ready:
            on_ready(address)
        if browser:
            webbrowser.open(address)
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:  # this is how people end it
            return
        finally:
            data.stop()


def warm_up(data: Data) -> None:
    """Read what the first click needs. If a file is damaged, that click says so."""
    with suppress(PipelineError):
        data.warm_up()


@lru_cache(maxsize=1)
def open_model(sources: Sources, options: ModelOptions) -> "LiveModel":
    """What answers with the model; torch is loaded here, when the first image is uploaded or edited."""
    from analysis.explore.live import LiveModel

    return LiveModel(sources, options)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises SettingsError: the port is taken or not allowed, or there is no such address."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OverflowError as error:
        raise SettingsError(f"--port must lie in 0..65535, got {port}.") from error
    except ValueError as error:  # what no name of a host may hold
        raise SettingsError(f"--host must be an address such as 127.0.0.1, got {host[:60]!r}.") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise SettingsError(
                f"Port {port} of {host} is taken, perhaps by another explorer. Choose another one with --port."
            ) from error
        raise SettingsError(
            f"{host}, port {port}, cannot be used ({error.strerror or error}). Choose others with --host and --port."
        ) from error
