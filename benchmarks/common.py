"""Shared by the benchmarks: arguments, paired timings, and one JSON object as the result.

Importing it, before torch, gives a benchmark and what it starts the threads and the memory of the command line.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# As in cli.py. Threads that spin keep a processor from our kernels: with 4,096 latents a step takes 1.12 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with --json and one flag per default, of the default's type; a list takes several values."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true", help="print one JSON object")
    for name, default in defaults.items():
        first, n_values = (default[0], "+") if isinstance(default, list) else (default, None)
        arguments.add_argument(f"--{name.replace('_', '-')}", type=type(first), nargs=n_values, default=default)
    return arguments


def timed(function: Callable[[], object]) -> float:
    """Seconds that a call takes, and what it started on a GPU."""
    finish_device()
    started = time.perf_counter()
    function()
    finish_device()
    return time.perf_counter() - started


def finish_device() -> None:
    """Wait until a GPU has done what it was told to. Without one, do nothing."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def pairs(first: Callable[[], object], second: Callable[[], object], n: int) -> tuple[float, float, float]:
    """Median seconds of `first` and of `second`, and the median of second / first. They alternate: speed drifts."""
    times = [(timed(first), timed(second)) for _ in range(n)]
    ratios = [b / a for a, b in times]
    return statistics.median(a for a, _ in times), statistics.median(b for _, b in times), statistics.median(ratios)


def memcpy_gb_s(n_bytes: int, n_threads: int) -> float:
    """GB per second copied in memory by this many threads: the best of five, with both arrays touched before."""
    source, target = np.ones(n_bytes, np.uint8), np.zeros(n_bytes, np.uint8)
    step = -(-n_bytes // n_threads)

    def copy() -> None:
        parts = [slice(i, i + step) for i in range(0, n_bytes, step)]
        threads = [threading.Thread(target=np.copyto, args=(target[part], source[part])) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return n_bytes / min(timed(copy) for _ in range(5)) / 1e9


def machine() -> str:
    cpu = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), platform.machine()
    )
    return f"{os.cpu_count()} x {cpu.split(':')[-1].strip()}"


def emit(options: argparse.Namespace, **result: Any) -> None:
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items() if name != "json"}
    whole = {"machine": machine(), "settings": settings, **result}
    if options.json:
        print(json.dumps(whole))
    else:
        for name, value in whole.items():
            print(f"{name:28} {value:,.3f}" if isinstance(value, float) else f"{name:28} {value}")
