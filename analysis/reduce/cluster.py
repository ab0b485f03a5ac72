"""open_scheduler(): where dask's tasks run. Every wait for a cluster has a limit, and says what it waits for."""

import ast
import asyncio
import linecache
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import dask

from actcache import IncompleteError, SettingsError
from actcache.options import check_number

CONNECT_S = 10
"""Seconds to wait for a dask scheduler, and then for its first worker."""
IMPORT_S = 60
"""Seconds in which all workers must have imported this package; on a cold network disk that takes 20."""


@contextmanager
def open_scheduler(
    n_workers: int | None = None, scheduler: str | None = None, *, on_wait: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Choose where dask's tasks run inside this `with`: on threads, or in processes.

    Args:
        n_workers: start this many processes on this machine, with one thread each, for the duration of the `with`.
        scheduler: the address of a running dask scheduler, e.g. tcp://10.0.0.1:8786.
        on_wait: called with what is waited for, such as "waiting for workers".

    Raises:
        SettingsError: both were given, no scheduler answers, it has no workers, they cannot import this package,
            `distributed` is not installed, or a script starts processes outside its main guard.
        IncompleteError: the scheduler is gone in the middle.
    """
    if n_workers is None and scheduler is None:
        yield
        return
    if n_workers is not None and scheduler is not None:
        raise SettingsError(
            "--n-workers starts processes here, and --scheduler names a cluster elsewhere. Give only one of them."
        )
    if n_workers is not None:
        n_workers = check_number("n_workers", n_workers, int, at_least=1)
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise SettingsError(
            "Workers need dask's `distributed`, which is not installed: pip install 'patchsae[cluster]'."
        ) from error
    say = on_wait or (lambda what: None)
    with ExitStack() as stack:
        address: Any = scheduler
        if n_workers is not None:
            _check_main_guard()
            say("waiting for workers")
            cluster = LocalCluster(
                n_workers=n_workers, threads_per_worker=1, processes=True, dashboard_address=None,
                scheduler_kwargs={"dashboard_address": ":0"},  # any free port: another cluster may have dask's own
            )  # fmt: skip
            address = stack.enter_context(cluster)
        try:
            if scheduler is not None:
                say(f"waiting for the scheduler {scheduler}")
                _check_answer(scheduler)
            # not set_as_default: a client stays the default even if it could not connect
            client = Client(address, timeout=CONNECT_S, set_as_default=False)
            stack.enter_context(client)
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"No dask scheduler answers at {scheduler} ({str(error).splitlines()[0]}). "
                "Start one with `dask scheduler`, or leave --scheduler out."
            ) from error
        if scheduler is not None:
            say("waiting for workers")
            _check_workers(client, scheduler)
        stack.enter_context(client.as_current())
        stack.enter_context(_quiet_loggers())
        try:
            yield
        except CancelledError as error:
            where = "The local cluster" if scheduler is None else f"The dask scheduler at {scheduler}"
            raise IncompleteError(
                f"{where} stopped while it was needed. Start it again and repeat the same command; it starts from the "
                "beginning."
            ) from error


def _check_answer(address: str) -> None:
    """Raise OSError unless something at the address answers dask's handshake in time.

    `Client` itself waits without end for a port that accepts and stays silent, whatever its timeout is.
    """
    from distributed.comm import connect
    from distributed.security import Security

    async def greet() -> None:
        try:
            comm = await connect(address, timeout=CONNECT_S, **Security().get_connection_args("client"))
        except MemoryError as error:  # the first bytes of another protocol, read as a length
            raise OSError("it answers, but not as a dask scheduler does") from error
        await comm.close()

    _within(CONNECT_S + 1, lambda: asyncio.run(greet()), "it accepts connections and stays silent")


def _check_workers(client: Any, address: str) -> None:
    """Raise SettingsError unless there are workers, and each can import this package."""
    try:
        client.wait_for_workers(1, timeout=CONNECT_S)
    except TimeoutError as error:
        raise SettingsError(
            f"The dask scheduler at {address} has had no workers for {CONNECT_S} s. Start some with "
            f"`dask worker {address}`, or leave --scheduler out."
        ) from error
    answers: dict[str, object] = {}
    needs = "import analysis.reduce"

    def ask() -> None:
        answers.update(client.run(exec, needs, on_error="return"))

    try:
        _within(IMPORT_S, ask, f"its workers did not answer within {IMPORT_S} s")
    except OSError as error:
        raise SettingsError(f"The dask cluster at {address} cannot be used: {error}. Restart its workers.") from error
    failed = [(worker, reason) for worker, reason in answers.items() if reason is not None]
    if failed:
        worker, reason = failed[0]
        raise SettingsError(
            f"{len(failed)} of {len(answers)} workers of {address} cannot import patchsae "
            f"({worker}: {' '.join(str(reason).split())[:100]}). Install it where they run."
        )


def _within(seconds: float, call: Callable[[], Any], otherwise: str) -> None:
    """Run a call that has no time limit of its own. Raises TimeoutError, or what the call raises."""
    outcome: list[BaseException | None] = []

    def attempt() -> None:
        try:
            call()
        except BaseException as error:
            outcome.append(error)
        else:
            outcome.append(None)

    thread = threading.Thread(target=attempt, name="wait for dask", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(otherwise)
    if outcome[0] is not None:
        raise outcome[0]


@contextmanager
def _quiet_loggers() -> Iterator[None]:
    """Leave it to our one line to tell that a scheduler was lost; dask's client logs a traceback of 30 lines."""
    loggers = [logging.getLogger(name) for name in ("distributed.client", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check_main_guard() -> None:
    """Raise SettingsError if the script that runs would start itself again in every worker.

    A process that is spawned imports the script, so what stands outside `if __name__ == "__main__":` runs there too.
    """
    main = sys.modules["__main__"]
    if (
        getattr(main, "__file__", None) is None
        or dask.config.get("distributed.worker.multiprocessing-method") == "fork"
    ):
        return  # a notebook, or nothing is imported again
    frame = sys._getframe()
    while frame.f_back is not None and not (
        frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "__main__"
    ):
        frame = frame.f_back
    if frame.f_code.co_name != "<module>" or frame.f_globals.get("__name__") != "__main__":
        return  # another thread
    lines = linecache.getlines(frame.f_code.co_filename)
    try:
        body = ast.parse("".join(lines)).body
    except (SyntaxError, ValueError):
        return
    for statement in body:
        if statement.lineno <= frame.f_lineno <= (statement.end_lineno or statement.lineno):
            guarded = isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test)
            if not guarded:
                raise SettingsError(
                    f"{Path(frame.f_code.co_filename).name} starts worker processes at line {frame.f_lineno}, outside "
                    'of `if __name__ == "__main__":`, so that each of them would start the script again. Put the line '
                    "under this guard."
                )
