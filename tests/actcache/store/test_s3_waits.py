"""An object store that is away, silent, dying or wrongly named is one line, after a bounded wait. Real sockets and a
real S3 server.
"""

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from actcache import ActivationStore, PipelineError, SettingsError, StorageError, describe, extract, verify
from actcache.artifacts import object_store

pytest.importorskip("s3fs")
pytest.importorskip("moto")

ROOT = Path(__file__).parents[3]
KEYS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.mark.parametrize("url", ["s3://", "s3:///", "s3:///x", "s3://b", "s3://b/", "s3://b//", "s3a://b"])
@pytest.mark.parametrize("call", [describe, verify, ActivationStore.open], ids=lambda call: call.__qualname__)
def test_a_url_without_bucket_or_folder_is_refused_without_a_connection(url: str, call: Callable[..., object]) -> None:
    with pytest.raises(SettingsError, match=rf"{url} does not name .*Expected e\.g\. s3a?://bucket/val\.acts\.$"):
        call(url)


@pytest.fixture(autouse=True)
def no_file_system_is_kept() -> Iterator[None]:
    """fsspec keeps a file system for each set of arguments, and with it the address that it was made with."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def address() -> Iterator[Callable[[Callable[[socket.socket], None]], str]]:
    """address(answer): the URL of a server that treats each connection as `answer` does."""
    servers: list[socket.socket] = []
    kept: list[socket.socket] = []

    def serve(answer: Callable[[socket.socket], None]) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)

        def accept() -> None:
            while True:
                try:
                    kept.append(server.accept()[0])
                    answer(kept[-1])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        return f"http://127.0.0.1:{server.getsockname()[1]}"

    yield serve
    for server in servers:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
    for connection in kept:
        connection.close()


SCRIPT = """
import sys
from actcache.artifacts import object_store
object_store.READ_S = object_store.CONNECT_S = 1
from cli import app
app()
"""


def ask(*args: str, **environment: str) -> tuple[int, str, float]:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *args], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env={**{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
             "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull,
             "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    return done.returncode, done.stderr.strip(), time.monotonic() - started


def reset(connection: socket.socket) -> None:
    connection.close()


def garbage(connection: socket.socket) -> None:
    connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")


def half_an_answer(connection: socket.socket) -> None:
    connection.recv(4096)
    connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nETag: "1"\r\n\r\n{')
    connection.close()


@pytest.mark.parametrize("verb", ["info", "verify"])
@pytest.mark.parametrize("answer", [None, lambda connection: None, reset, garbage, half_an_answer],
                         ids=["away", "silent", "reset", "garbage", "half"])  # fmt: skip
def test_a_server_that_does_not_serve_is_one_line(
    verb: str, answer: Callable[[socket.socket], None] | None, address: Callable[..., str]
) -> None:
    url = "http://127.0.0.1:1" if answer is None else address(answer)
    code, stderr, seconds = ask(verb, "s3://bucket/x.acts", **KEYS, AWS_ENDPOINT_URL=url)
    (line,) = stderr.splitlines()
    assert code == 1
    assert line.startswith("error: s3://bucket/x.acts")
    assert seconds < 40


def test_no_credentials_are_one_line() -> None:
    code, stderr, _ = ask("info", "s3://bucket/x.acts", AWS_ENDPOINT_URL="http://127.0.0.1:1")
    (line,) = stderr.splitlines()
    assert code == 1
    assert "Unable to locate credentials" in line
    assert "the credentials, then run the same command again" in line


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    child = subprocess.Popen(
        [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": url}.items():
        monkeypatch.setenv(name, value)
    for _ in range(200):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            break
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT"), timeout=5).close()
    yield child
    child.kill()
    child.wait()


def test_a_server_that_dies_in_the_middle_is_one_line(
    server: subprocess.Popen[bytes], tiny_images: Path, tiny_model: dict[str, str]
) -> None:
    def kill(done: int, total: int) -> None:
        if done > 20:
            server.kill()

    wanted: dict[str, Any] = {"layers": [1], "shard_images": 16, "precision": "float32"}
    with pytest.raises(StorageError, match="run the same command again") as caught:
        extract(tiny_images, "s3://bucket/x.acts", **tiny_model, **wanted, on_progress=kill)
    assert "\n" not in str(caught.value)
    for call in (describe, verify, ActivationStore.open):
        with pytest.raises(PipelineError, match="cannot be reached") as caught:
            call("s3://bucket/x.acts")
        assert "\n" not in str(caught.value)


def test_the_bounds_are_those_of_every_file_system_that_is_opened() -> None:
    import fsspec

    object_store.register_s3()
    files = fsspec.filesystem("s3", key="a", secret="b", endpoint_url="http://127.0.0.1:1")
    assert (files.retries, files.connect_timeout, files.read_timeout) == (3, 5, 15)
    assert files.config_kwargs["retries"] == {"max_attempts": 0}
