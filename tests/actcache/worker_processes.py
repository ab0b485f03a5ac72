"""Real worker processes of one extraction or encoding, slowed down so that a test can kill them in the middle."""

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

from actcache import IncompleteError


def start_workers(
    world_size: int, pause_s: float, verb: Callable[..., object], *args: object, **settings: object
) -> list[BaseProcess]:
    """Start `verb(*args, **settings)` as every rank of `world_size`.

    They exit with 0, or with 3 where others' shards are missing.

    Args:
        verb: an importable function that takes `on_progress`.
        pause_s: how long each waits after every batch.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    workers: list[BaseProcess] = [
        context.Process(target=_work, args=(rank, world_size, pause_s, verb, args, settings))
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    return workers


def _work(
    rank: int,
    world_size: int,
    pause_s: float,
    verb: Callable[..., object],
    args: tuple[object, ...],
    settings: dict[str, Any],
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}
    try:
        verb(*args, **settings, on_progress=lambda done, total: time.sleep(pause_s))
    except IncompleteError as error:
        os._exit(3 if f"Worker {rank} of {world_size} is done" in str(error) else 4)
    os._exit(0)
