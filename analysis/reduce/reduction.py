"""Statistics as (chunk, combine, finalize) triples, which dask reduces over pieces: some latents in one shard.

There are two ways to reduce the same triples. With `reduce_latents`, a task takes a range of latents through all
shards, in order, and holds the statistics of that range alone, so memory grows with neither tokens nor shards; this is
what `analyze` uses. With `reduce_shards`, a task takes a whole shard, and partial results are combined in a tree
(fan-in 4, in shard order); this is for results that need all latents together.

The order of work is fixed, so results depend neither on the scheduler nor on retries. Integers and top lists do not
depend on how the codes are cut into shards or ranges; sums of values may differ in their last bits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar
from uuid import uuid4

import dask
import numpy as np

from actcache.progress import Progress
from analysis.reduce.pairs import Piece
from analysis.reduce.tasks import compute, map_shards, open_codes
from saetrain import CodeStore, LatentCodes

R = TypeVar("R")

Values = Mapping[str, Any]
"""The values of statistics, partial or final, by the statistic's name. Each statistic has a type of its own."""

RangeCounter = Callable[[CodeStore, range], Values | None]
"""Computes the values of all statistics of a range of latents at once; None where it cannot."""

FAN_IN = 4
"""With 1,250 shards, 15 partial results may wait at once. A fan-in of 8 makes that 24; 2 reads twice as many."""

FIRST_ENTRIES, HELD_ENTRIES = 1 << 17, 1 << 20
"""Number of entries after which the partial results of a range are combined; until then all of them stay in memory. The
first time comes sooner: once there are top lists, little of what follows has to be sorted."""


def _unchanged(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Statistic:
    """A reduction over pieces of the same latents. Its functions must be picklable and stateless: tasks may run twice.

    Attributes:
        chunk: piece -> partial result.
        combine: several partial results, in shard order -> one partial result. It must be associative.
        finalize: the last partial result -> the value that is returned; by default the partial result itself.
    """

    chunk: Callable[[Piece], Any]
    combine: Callable[[Sequence[Any]], Any]
    finalize: Callable[[Any], Any] = _unchanged


# ---------------------------------------------------------------------------------------------------------------------
# By ranges of latents


def reduce_latents(
    codes: CodeStore,
    ranges: Sequence[range],
    statistics: Mapping[str, Statistic],
    finish: Callable[[CodeStore, range, Any], R],
    *,
    tau: float = 0.0,
    counter: RangeCounter | None = None,
    on_progress: Progress | None = None,
    on_part: Callable[[int, R], None] | None = None,
) -> list[R]:
    """Compute several statistics in one pass, one range of latents at a time; each entry is read once.

    Runs on dask's threads, or on the workers of `open_scheduler`.

    Args:
        ranges: see `cut_latents`.
        finish: turns (codes, latents, the values of the statistics by name) into what is kept of a range. The task
            calls it.
        tau: the threshold that `Pairs.n_above` counts against.
        counter: a faster way to the same values, which is taken where there is one.
        on_progress: called with (ranges done, ranges in all), in the order they finish.
        on_part: called with (number of a range, what `finish` returned), once for each, as early as that is known here.

    Returns:
        What `finish` returned for each range.
    """
    task = dask.delayed(_reduce_range, pure=False)
    shared = dask.delayed((dict(statistics), finish, counter), pure=False, traverse=False)
    name, last = f"reduce-range-{uuid4().hex}", len(ranges) - 1
    keys = [f"{name}-{last - number:09d}" for number in range(len(ranges))]  # dask begins with the last one
    path, identity = str(codes.path.absolute()), codes.codes_id
    parts = [
        task(path, identity, latents, shared, tau, dask_key_name=key)
        for key, latents in zip(keys, ranges, strict=True)  # so that they are finished and written in order
    ]
    checks = map_shards(codes, _check_shard) if codes.fits_cache else []  # each shard once, whoever reads it
    both = dask.delayed(_first, pure=False)(parts, checks)
    early = set()

    def pass_on(number: int, row: R) -> None:
        early.add(number)
        if on_part:
            on_part(number, row)

    rows: list[R] = compute(both, parts=parts, on_progress=on_progress, on_part=pass_on)
    for number in set(range(len(rows))) - early:
        pass_on(number, rows[number])
    return rows


def _check_shard(codes: CodeStore, shard: int) -> None:
    codes.check_shard(shard)


def _first(parts: list[R], checks: list[None]) -> list[R]:
    return parts


def cut_latents(codes: CodeStore, n_entries: int, *, at_most: int | None = None) -> list[range]:
    """Cut all latents into ranges of about `n_entries` entries; a latent that has more is a range of its own.

    Images are stored in random order, so eight shards show how often each latent fires.

    Args:
        at_most: the largest number of latents in a range.
    """
    shards = np.unique(np.linspace(0, codes.n_shards - 1, min(8, codes.n_shards)).astype(int)).tolist()
    before = np.concatenate([[0], np.cumsum(sum(codes.count_latents(shard) for shard in shards))])
    n_ranges = max(1, round(codes.n_entries / n_entries))
    edges = np.searchsorted(before, np.linspace(0, before[-1], n_ranges + 1)[1:-1])
    ranges = []
    for start, stop in pairwise(np.unique([0, *edges, codes.n_latents]).tolist()):
        n = -(-(stop - start) // (at_most or codes.n_latents))
        cuts = np.linspace(start, stop, n + 1).astype(int).tolist()
        ranges += [range(first, last) for first, last in pairwise(cuts)]
    return ranges


def _reduce_range(path: str, codes_id: str, latents: range, shared: tuple[Any, Any, Any], tau: float) -> Any:
    codes = open_codes(path, codes_id)
    statistics, finish, counter = shared
    if counter is not None and (values := counter(codes, latents)) is not None:
        return finish(codes, latents, values)
    parts: list[Values] = []
    n_held, n_enough = 0, FIRST_ENTRIES
    for shard in range(codes.n_shards):
        entries = codes.read_latents(shard, latents.start, latents.stop)
        piece = Piece(codes, shard, latents, entries, tau)
        parts.append({name: statistic.chunk(piece) for name, statistic in statistics.items()})
        n_held += len(entries.row)
        if n_held >= n_enough or shard == codes.n_shards - 1:
            parts, n_held, n_enough = [_combine_all(parts, statistics)], 0, min(2 * n_enough, HELD_ENTRIES)
    return finish(codes, latents, {name: statistic.finalize(parts[0][name]) for name, statistic in statistics.items()})


# ---------------------------------------------------------------------------------------------------------------------
# By shards


def reduce_shards(
    codes: CodeStore, statistics: Mapping[str, Statistic], *, tau: float = 0.0, on_progress: Progress | None = None
) -> Values:
    """Compute several statistics in one pass; each shard is read, and its pairs are found, once.

    Runs on dask's threads, or on the workers of `open_scheduler`.

    Args:
        tau: the threshold that `Pairs.n_above` counts against.
        on_progress: called with (shards done, shards in all), in the order they finish.
    """
    shared = dask.delayed(dict(statistics), pure=False, traverse=False)
    shards = map_shards(codes, _chunk_all, shared, tau)
    combine = dask.delayed(_combine_all, pure=False)
    level = [combine(shards[i : i + FAN_IN], shared) for i in range(0, len(shards), FAN_IN)]
    while len(level) > 1:
        level = [combine(level[i : i + FAN_IN], shared) for i in range(0, len(level), FAN_IN)]
    total = compute(level[0], parts=shards, on_progress=on_progress)
    return {name: statistic.finalize(total[name]) for name, statistic in statistics.items()}


def _chunk_all(codes: CodeStore, shard: int, statistics: Mapping[str, Statistic], tau: float) -> Values:
    entries: LatentCodes = codes.read_by_latent(shard)
    piece = Piece(codes, shard, range(codes.n_latents), entries, tau)
    return {name: statistic.chunk(piece) for name, statistic in statistics.items()}


def _combine_all(parts: Sequence[Values], statistics: Mapping[str, Statistic]) -> Values:
    return {name: statistic.combine([part[name] for part in parts]) for name, statistic in statistics.items()}
