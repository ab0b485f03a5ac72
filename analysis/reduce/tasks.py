"""Dask tasks over codes: one task for each shard. Codes are cut into shards as the activations were.

A task carries a path, an id and a shard number; what all tasks share, such as a function, is in the graph once. Each
task opens the codes itself, so it can be retried, and the same code runs on threads or on any cluster that can read
the files.
"""

import sys
from collections.abc import Callable, Sequence
from copy import copy
from functools import lru_cache, partial
from typing import Any

import dask
from dask import threaded
from dask.callbacks import Callback
from dask.delayed import Delayed

from actcache import IncompleteError, ParentMismatchError
from actcache.progress import Progress
from saetrain import CodeStore


def map_shards(codes: CodeStore, function: Callable[..., Any], *shared: Any) -> list[Delayed]:
    """One lazy `function(codes, shard, *shared)` for each shard, in shard order. `shared` is in the graph once."""
    task = dask.delayed(_open_and_apply, pure=False)
    once = [dask.delayed(value, pure=False, traverse=False) for value in (function, *shared)]
    return [task(str(codes.path.absolute()), codes.codes_id, shard, *once) for shard in range(codes.n_shards)]


def compute(
    root: Delayed,
    *,
    parts: Sequence[Delayed] = (),
    on_progress: Progress | None = None,
    on_part: Callable[[int, Any], None] | None = None,
) -> Any:
    """Compute the value of `root` on the scheduler that is open.

    Args:
        parts: the tasks below it that count as progress.
        on_progress: called with (parts done, parts in all), as they finish.
        on_part: called with (number of a part, its value), as they finish, where tasks are threads of this process.

    Raises:
        IncompleteError: workers died repeatedly at one task. An error that a task raises passes through unchanged.
    """
    client = _active_client()
    if client is None:
        numbers = {part.key: number for number, part in enumerate(parts)}
        report = partial(_report_finished, numbers, on_progress, on_part, [])
        scheduler = dask.config.get("scheduler", None) or threaded.get  # dask would import `distributed` to look for it
        with Callback(posttask=report):
            (value,) = dask.compute(root, scheduler=scheduler)
        return value
    from distributed import KilledWorker, as_completed

    *counted, last = client.compute([*parts, root])
    finished, total = as_completed(counted), len(counted)  # the cluster forgets a part once nothing refers to it
    del counted
    try:
        for done, part in enumerate(finished, start=1):
            if part.status == "error":
                break
            del part
            if on_progress:
                on_progress(done, total)
        return last.result()
    except KilledWorker as error:
        raise IncompleteError(
            f"dask's workers died several times at one task ({error.task}). Give them more memory, or start fewer of "
            "them, and run the same command again; it starts from the beginning."
        ) from error
    finally:
        last.cancel()


def _report_finished(
    numbers: dict[str, int], on_progress: Progress | None, on_part: Callable[[int, Any], None] | None, seen: list[str],
    key: str, value: Any, *_: object,
) -> None:  # fmt: skip
    if key not in numbers:
        return
    seen.append(key)
    if on_part:
        on_part(numbers[key], value)
    if on_progress:
        on_progress(len(seen), len(numbers))


def _active_client() -> Any:
    """The `distributed` client that is open, if any. This does not import `distributed`."""
    distributed = sys.modules.get("distributed")
    try:
        return distributed.default_client() if distributed else None
    except ValueError:
        return None


def _open_and_apply(path: str, codes_id: str, shard: int, function: Callable[..., Any], *shared: Any) -> Any:
    return function(open_codes(path, codes_id), shard, *shared)


@lru_cache(maxsize=8)
def open_codes(path: str, codes_id: str) -> CodeStore:
    """Codes as a worker sees them, opened once per process because their image table may be large."""
    codes = CodeStore.open(path)
    if codes.codes_id != codes_id:
        raise ParentMismatchError(
            f"A worker found codes {codes.codes_id} at {path}, but expected {codes_id}. "
            "All workers must see the same files."
        )
    return codes


def fold_pieces(
    codes: CodeStore,
    function: Callable[[CodeStore, Any], Any],
    combine: Callable[[Sequence[Any]], Any],
    pieces: Sequence[Any],
    *,
    on_progress: Progress | None = None,
) -> Any:
    """Combine the results of `function(codes, piece)`, one task per piece, in a tree of fixed shape and order.

    A piece is what one task reads: some images of a shard, or a block of latents. The fan-in of the tree is 8. The
    bytes that tasks read are added to `codes.bytes_read`.

    Args:
        on_progress: called with (pieces done, pieces in all), in the order they finish.
    """
    task, join = dask.delayed(_apply_and_count, pure=False), dask.delayed(_combine_and_add, pure=False)
    once, merge = (dask.delayed(value, pure=False, traverse=False) for value in (function, combine))
    level = parts = [task(str(codes.path.absolute()), codes.codes_id, piece, once) for piece in pieces]
    while len(level) > 1:
        level = [join(level[i : i + 8], merge) for i in range(0, len(level), 8)]
    result, n_bytes = compute(level[0], parts=parts, on_progress=on_progress)
    codes.bytes_read += n_bytes
    return result


def _apply_and_count(
    path: str, codes_id: str, piece: Any, function: Callable[[CodeStore, Any], Any]
) -> tuple[Any, int]:
    codes = copy(open_codes(path, codes_id))  # a counter of its own
    codes.bytes_read = 0
    return function(codes, piece), codes.bytes_read


def _combine_and_add(parts: Sequence[tuple[Any, int]], combine: Callable[[Sequence[Any]], Any]) -> tuple[Any, int]:
    return combine([part for part, _ in parts]), sum(n_bytes for _, n_bytes in parts)
