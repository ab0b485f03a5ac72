"""Measures reading a store larger than the page cache: through the cache, and past it (O_DIRECT).

Where permitted, the process puts itself into a memory control group (version 1) of `--cache-gb`, so that the kernel can
cache only that much of the file; elsewhere the cache is dropped for the file before each pass. Random chunks are read,
several at a time.
"""

import os
import statistics
import time
from pathlib import Path

from common import emit, parser

import numpy as np
from bench_read import read_chunks, temporary_store

from actcache.store import aligned_empty

GROUP = Path("/sys/fs/cgroup/memory/actcache-bench")


def limit_cache(n_bytes: int) -> bool:
    try:
        GROUP.mkdir(exist_ok=True)
        (GROUP / "memory.limit_in_bytes").write_text(str(n_bytes))
        (GROUP / "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        return False
    return True


def forget(folder: Path) -> None:
    """Drop all files below a folder from the page cache."""
    os.sync()
    for file in folder.rglob("c/**/*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def main() -> None:
    arguments = parser(
        __doc__, images=16384, grid=14, d_model=768, cache_gb=1.5, threads=[2, 8], passes=3, folder=Path()
    )
    options = arguments.parse_args()
    with temporary_store(options) as store:
        forget(store.path)
        limited = limit_cache(int(options.cache_gb * 1e9))
        layout = store.layout
        units = [(b, r) for b in range(-(-store.n_images // layout.chunk_images)) for r in range(layout.grid[0])]
        buffer = aligned_empty((64, *layout.chunk_shape("patches")), store.dtype)
        result: dict[str, float] = {}
        rates: dict[str, list[tuple[float, float]]] = {}
        for number in range(options.passes):
            for name, direct in (("cached", False), ("direct", True)):
                for threads in options.threads:
                    chunks = np.random.default_rng(number).permutation(np.array(units))[: max(1, len(units) // 4)]
                    if not limited:
                        forget(store.path)
                    started, used = time.perf_counter(), time.process_time()
                    for first in range(0, len(chunks), len(buffer)):
                        part = chunks[first : first + len(buffer)]
                        read_chunks(store, part, buffer, threads, past_cache=direct)
                    gigabytes = len(chunks) * buffer[0].nbytes / 1e9
                    seconds, used = time.perf_counter() - started, time.process_time() - used
                    rates.setdefault(f"{name}_{threads}", []).append((gigabytes / seconds, used / gigabytes))
        for name, values in rates.items():
            result[f"{name}_gb_s"] = statistics.median(rate for rate, _ in values)
            result[f"{name}_cpu_s_a_gb"] = statistics.median(cost for _, cost in values)
        n_bytes = len(units) * buffer[0].nbytes
    emit(options, n_bytes=n_bytes, cache_limited=limited, **result)


if __name__ == "__main__":
    main()
