"""Real processes that start warm: `python WORDS...` in a hundredth of a second.

A new Python takes seconds to import torch, open_clip and timm. Here one process has imported them and every module of
the project, with warnings as errors, and forks a child for each run. The child has its own folder, environment, files
and exit code. What is read before the first line of a program runs (PYTHON* variables) and what a library reads when it
is imported (OMP_*, HF_*) is that of the first process: tests of these, and of imports, start a new Python.
"""

import gc
import importlib
import json
import os
import pkgutil
import runpy
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Client, Listener
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARIES = ("open_clip", "timm", "sklearn.linear_model", "zarr", "distributed", "bokeh.plotting", "bokeh.embed")
"""What modules of the project import late, and what takes a tenth of a second or more."""


class WarmProcess:
    """warm.run("cli.py", "info", "a.acts", cwd=folder), warm.run("-c", "import cli; ...", cwd=folder)"""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        )  # fmt: skip

    def run(self, *words: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """What `python WORDS...` in this folder would have returned; paths of scripts are those of the checkout."""
        assert self._process.stdin
        assert self._process.stdout
        script, *arguments = map(str, words)
        if script != "-c":
            script = str(ROOT / script)
        with tempfile.TemporaryDirectory() as folder:
            files = [str(Path(folder) / name) for name in ("stdout", "stderr")]
            request = {"words": [script, *arguments], "files": files, "cwd": str(cwd)}
            request["environment"] = os.environ | variables
            print(json.dumps(request), file=self._process.stdin, flush=True)
            code = int(self._process.stdout.readline())
            out, err = (Path(file).read_bytes().decode(errors="replace") for file in files)
        return subprocess.CompletedProcess([sys.executable, *map(str, words)], code, out, err)

    @contextmanager
    def as_command(self) -> Iterator[str]:
        """A command that does the same for a shell script: it takes the words that `run` takes."""
        with tempfile.TemporaryDirectory() as folder, Listener(str(Path(folder) / "socket")) as listener:

            def answer() -> None:
                while True:
                    with listener.accept() as connection:
                        if (request := connection.recv()) is None:
                            return
                        words, cwd = request
                        done = self.run(*words, cwd=cwd)
                        connection.send((done.returncode, done.stdout, done.stderr))

            thread = threading.Thread(target=answer)
            thread.start()
            try:
                yield f"{sys.executable} -S {__file__} {listener.address}"
            finally:
                with Client(listener.address) as connection:
                    connection.send(None)
                thread.join()

    def close(self) -> None:
        self._process.communicate()


@contextmanager
def open_warm_process() -> Iterator[WarmProcess]:
    process = WarmProcess()
    try:
        yield process
    finally:
        process.close()


def serve() -> None:
    """One request per line on stdin, one exit code per line on stdout; negative for a signal."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for name in ("cli", *LIBRARIES, *find_modules()):
            importlib.import_module(name)
        gc.collect()
        gc.freeze()  # a child's collector would copy every page
        for line in sys.stdin:
            child = os.fork()
            if child == 0:
                os._exit(run(**json.loads(line)))
            _, status = os.waitpid(child, 0)
            print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def find_modules() -> Iterator[str]:
    for package in ("actcache", "saetrain", "analysis"):
        folder = str(ROOT / package)
        for module in pkgutil.walk_packages([folder], f"{package}."):
            yield module.name


def run(words: list[str], files: list[str], cwd: str, environment: dict[str, str]) -> int:
    """In the child: run a script or code as the main program, and return its exit code."""
    script, *arguments = words
    code = arguments.pop(0) if script == "-c" else ""
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, file in enumerate(files, 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = [script, *arguments]
        sys.path[0] = os.path.dirname(script)
        if script == "-c":
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def ask(address: str, words: list[str]) -> int:
    """What a shell script runs: hand the words on, and say and return what came back."""
    with Client(address) as connection:
        connection.send((words, os.getcwd()))
        code, out, err = connection.recv()
    sys.stdout.write(out)
    sys.stderr.write(err)
    return int(code)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        os._exit(ask(sys.argv[1], sys.argv[2:]))
    serve()
    os._exit(0)
