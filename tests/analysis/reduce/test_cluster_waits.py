"""Every wait for a dask cluster ends: real sockets, real schedulers and workers, each broken in its own way."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dask
import pytest

import analysis.reduce.cluster as cluster
from actcache import IncompleteError, SettingsError
from analysis import open_scheduler
from analysis.reduce import compute

ROOT = Path(__file__).parents[3]


@contextmanager
def process(*command: str, folder: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(
        [sys.executable, "-m", *command], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    try:
        yield child
    finally:
        child.kill()
        child.wait()


@contextmanager
def scheduler(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = ("--host", "127.0.0.1", "--port", str(port), "--no-dashboard", "--no-show")
    with process("distributed.cli.dask_scheduler", *where, folder=folder) as child:
        for _ in range(300):
            with socket.socket() as knock:
                if knock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield child, f"tcp://127.0.0.1:{port}"


WORKER = ("distributed.cli.dask_worker", "--nthreads", "1", "--no-dashboard", "--no-nanny")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_S", 2)


@pytest.mark.parametrize("banner", [b"", b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=repr)
def test_a_port_that_is_no_scheduler_is_given_up(banner: bytes) -> None:
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    kept.append(server.accept()[0])
                    kept[-1].sendall(banner)
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        started = time.monotonic()
        with (
            pytest.raises(SettingsError, match=f"No dask scheduler answers at {address} .*Start one") as caught,
            open_scheduler(scheduler=address, on_wait=said.append),
        ):
            pass
        assert time.monotonic() - started < 20
        assert "\n" not in str(caught.value)
        assert said == [f"waiting for the scheduler {address}"]
        server.shutdown(socket.SHUT_RDWR)
    for each in kept:
        each.close()


def test_a_scheduler_without_workers_is_given_up(tmp_path: Path) -> None:
    said: list[str] = []
    with scheduler(tmp_path) as (_, address):
        started = time.monotonic()
        with (
            pytest.raises(SettingsError, match=f"{address} has had no workers for 2 s. Start some") as caught,
            open_scheduler(scheduler=address, on_wait=said.append),
        ):
            pass
        assert time.monotonic() - started < 20
    assert "\n" not in str(caught.value)
    assert said[-1] == "waiting for workers"


def test_workers_that_lack_the_package_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_S", 40)
    (tmp_path / "analysis").mkdir()  # it hides the package
    (tmp_path / "analysis" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'actcache'\")")
    with (
        scheduler(tmp_path) as (_, address),
        process(*WORKER, address, folder=tmp_path, PYTHONPATH=str(tmp_path)),
        pytest.raises(SettingsError, match=r"1 of 1 workers of .* cannot import patchsae .*'actcache'.* Install it"),
        open_scheduler(scheduler=address),
    ):
        pass


def test_a_scheduler_that_dies_in_the_middle_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "CONNECT_S", 40)
    task = dask.delayed(time.sleep)(30)
    with scheduler(tmp_path) as (child, address), process(*WORKER, address, folder=tmp_path):
        killer = threading.Timer(6, child.kill)
        killer.start()
        with (
            pytest.raises(IncompleteError, match=f"The dask scheduler at {address} stopped .*repeat the same command"),
            open_scheduler(scheduler=address),
        ):
            compute(task)
        killer.join()
    assert "Traceback" not in capfd.readouterr().err


SCRIPT = """
from analysis import open_scheduler
{}
"""
UNGUARDED = {
    "with": "with open_scheduler(n_workers=2):\n    print('computed')",
    "a function": "def work():\n    with open_scheduler(n_workers=2):\n        print('computed')\nwork()",
    "another if": "import os\nif os.name:\n    with open_scheduler(n_workers=2):\n        print('computed')",
}
GUARDED = {
    "with": "if __name__ == '__main__':\n    with open_scheduler(n_workers=1):\n        print('computed')",
    "a function": "def work():\n    with open_scheduler(n_workers=1):\n        print('computed')\n"
    "if '__main__' == __name__:\n    work()",
}


def run_script(tmp_path: Path, text: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "my script.py").write_text(SCRIPT.format(text))
    return subprocess.run(
        [sys.executable, "my script.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("text", UNGUARDED.values(), ids=UNGUARDED)
def test_a_script_without_a_main_guard_is_told_so(text: str, tmp_path: Path) -> None:
    done = run_script(tmp_path, text)
    last = done.stderr.strip().splitlines()[-1]
    assert done.stdout == ""
    assert "my script.py starts worker processes at line" in last
    assert 'outside of `if __name__ == "__main__":`' in last
    assert done.stderr.count("Traceback") == 1  # of our one error, and none of the workers


@pytest.mark.parametrize("text", GUARDED.values(), ids=GUARDED)
def test_a_script_with_a_main_guard_runs(text: str, tmp_path: Path) -> None:
    done = run_script(tmp_path, text)
    assert (done.returncode, done.stdout) == (0, "computed\n"), done.stderr
