"""Statistics as (chunk, combine, finalize) triples, reduced by dask over pieces: some latents in one shard.

Two ways through the same triples. `reduce_latents`: a task takes a range of latents through all shards, in order, and
holds the statistics of that range alone, so memory grows with neither tokens nor shards: what `analyze` does.
`reduce_shards`: a task takes a whole shard, and partial results meet in a tree (fan-in 4, shard order): for results
that need all latents together.

Promises: the order of work is fixed, so nothing depends on the scheduler or on retries; integers and top lists do not
depend on the cut into shards or ranges either, sums of values up to their last bits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import dask
import numpy as np

from analysis.reduce.pairs import Piece
from analysis.reduce.tasks import OnProgress, compute, map_shards, open_codes
from saetrain import CodeStore, LatentCodes

R = TypeVar("R")

FAN_IN = 4
"""Of 1,250 shards 15 partial results may wait at once; with 8 they would be 24, with 2 twice as many are read."""

FIRST_ENTRIES, HELD_ENTRIES = 1 << 17, 1 << 20
"""Entries after which the partial results of a range are combined; until then they may refer to all of them. The first
time is sooner: once there are top lists, little of what follows has to be sorted."""


@dataclass(frozen=True)
class Statistic:
    """A reduction over pieces of the same latents. All three must be picklable, and free of state: tasks may run twice.

    Attributes:
        chunk: piece -> partial result.
        combine: several partial results, in shard order -> one. Associative.
        finalize: the last partial result -> what is returned.
    """

    chunk: Callable[[Piece], Any]
    combine: Callable[[Sequence[Any]], Any]
    finalize: Callable[[Any], Any]


# ---------------------------------------------------------------------------------------------------------------------
# By ranges of latents


def reduce_latents(
    codes: CodeStore,
    ranges: Sequence[range],
    statistics: Mapping[str, Statistic],
    finish: Callable[[CodeStore, range, Any], R],
    *,
    tau: float = 0.0,
    on_progress: OnProgress | None = None,
) -> list[R]:
    """Compute several statistics in one pass, a range of latents at a time: each entry is read once.

    Runs on dask's threads, or on the workers of `open_scheduler`.

    Args:
        ranges: see `cut_latents`.
        finish: (codes, latents, statistic -> its value) -> what is kept of a range. It is called in the task.
        tau: what `Pairs.n_above` counts against.
        on_progress: called with (ranges done, ranges in all), in the order they finish.

    Returns:
        what `finish` returned, a range each.
    """
    task = dask.delayed(_reduce_range, pure=False)
    shared = dask.delayed((dict(statistics), finish), pure=False, traverse=False)
    parts = [task(str(codes.path.absolute()), codes.codes_id, latents, shared, tau) for latents in ranges]
    rows: list[R] = compute(dask.delayed(list, pure=False)(parts), parts=parts, on_progress=on_progress)
    return rows


def cut_latents(codes: CodeStore, n_entries: int, *, at_most: int | None = None) -> list[range]:
    """All latents in ranges of about `n_entries`, or of a single latent that has more.

    Images lie in random order, so eight shards tell how often each latent fires.

    Args:
        at_most: latents of a range.
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


def _reduce_range(path: str, codes_id: str, latents: range, shared: tuple[Any, Any], tau: float) -> Any:
    codes = open_codes(path, codes_id)
    statistics, finish = shared
    parts: list[dict[str, Any]] = []
    held, enough = 0, FIRST_ENTRIES
    for shard in range(codes.n_shards):
        entries = codes.read_latents(shard, latents.start, latents.stop)
        piece = Piece(codes, shard, latents, entries, tau)
        parts.append({name: statistic.chunk(piece) for name, statistic in statistics.items()})
        held += len(entries.row)
        if held >= enough or shard == codes.n_shards - 1:
            parts, held, enough = [_combine_all(parts, statistics)], 0, min(2 * enough, HELD_ENTRIES)
    return finish(codes, latents, {name: statistic.finalize(parts[0][name]) for name, statistic in statistics.items()})


# ---------------------------------------------------------------------------------------------------------------------
# By shards


def reduce_shards(
    codes: CodeStore,
    statistics: Mapping[str, Statistic],
    *,
    tau: float = 0.0,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Compute several statistics in one pass: each shard is read, and its pairs are found, once.

    Runs on dask's threads, or on the workers of `open_scheduler`.

    Args:
        tau: what `Pairs.n_above` counts against.
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


def _chunk_all(codes: CodeStore, shard: int, statistics: Mapping[str, Statistic], tau: float) -> dict[str, Any]:
    entries: LatentCodes = codes.read_by_latent(shard)
    piece = Piece(codes, shard, range(codes.n_latents), entries, tau)
    return {name: statistic.chunk(piece) for name, statistic in statistics.items()}


def _combine_all(parts: Sequence[Mapping[str, Any]], statistics: Mapping[str, Statistic]) -> dict[str, Any]:
    return {name: statistic.combine([part[name] for part in parts]) for name, statistic in statistics.items()}
