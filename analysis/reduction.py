"""Statistics as (chunk, combine, finalize) triples, reduced over shards by dask.

Promises: the tree has a fixed shape (fan-in 4, shard order), so nothing depends on the scheduler or on retries;
integers and top lists do not depend on the cut into shards either, sums of values up to their last bits; memory holds a
few partial results a level of the tree, not the codes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dask

from analysis.join import OnProgress, compute, map_shards
from analysis.pairs import Pairs, find_pairs
from saetrain import CodeStore

FAN_IN = 4
"""Of 1,250 shards 15 partial results may wait at once; with 8 they would be 24, with 2 twice as many are read."""


@dataclass(frozen=True)
class Statistic:
    """A reduction over shards. All three must be picklable, and free of state: a task may run twice.

    Attributes:
        chunk: (codes, shard number, the shard's pairs) -> partial result.
        combine: several partial results -> one. Associative.
        finalize: the last partial result -> what is returned.
    """

    chunk: Callable[[CodeStore, int, Pairs], Any]
    combine: Callable[[Sequence[Any]], Any]
    finalize: Callable[[Any], Any]


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
    level = shards
    while len(level) > 1:
        level = [combine(level[i : i + FAN_IN], shared) for i in range(0, len(level), FAN_IN)]
    total = compute(level[0], parts=shards, on_progress=on_progress)
    return {name: statistic.finalize(total[name]) for name, statistic in statistics.items()}


def _chunk_all(codes: CodeStore, shard: int, statistics: Mapping[str, Statistic], tau: float) -> dict[str, Any]:
    pairs = find_pairs(codes.read_by_latent(shard), codes.n_tokens, tau=tau)
    return {name: statistic.chunk(codes, shard, pairs) for name, statistic in statistics.items()}


def _combine_all(parts: Sequence[Mapping[str, Any]], statistics: Mapping[str, Statistic]) -> dict[str, Any]:
    return {name: statistic.combine([part[name] for part in parts]) for name, statistic in statistics.items()}
