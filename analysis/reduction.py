"""Statistics as (chunk, combine, finalize) triples, reduced over shards by dask.

Promises: the tree has a fixed shape (fan-in 8, shard order), so sums do not depend on the scheduler; integers and top
lists do not depend on the cut either; memory holds a few partial results, not the codes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import dask

from analysis.join import map_shards
from analysis.pairs import Pairs, find_pairs
from saetrain import CodeStore

FAN_IN = 8


@dataclass(frozen=True)
class Statistic:
    """A reduction over shards.

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
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Compute several statistics in one pass: each shard is read, and its pairs are found, once.

    Runs on dask's threads, or on the active `dask.distributed` client.

    Args:
        tau: what `Pairs.n_above` counts against.
        on_progress: called with (shards done, shards in all), in the order they finish; threads only.
    """
    finished = count(1)  # its `next` is atomic

    def chunk(opened: CodeStore, shard: int) -> dict[str, Any]:
        pairs = find_pairs(opened.read_shard(shard), opened.n_tokens, tau=tau)
        parts = {name: statistic.chunk(opened, shard, pairs) for name, statistic in statistics.items()}
        if on_progress:
            on_progress(next(finished), codes.n_shards)
        return parts

    combine = dask.delayed(_combine_all, pure=False)
    level = map_shards(codes, chunk)
    while len(level) > 1:
        level = [combine(level[i : i + FAN_IN], dict(statistics)) for i in range(0, len(level), FAN_IN)]
    (total,) = dask.compute(level[0])
    return {name: statistic.finalize(total[name]) for name, statistic in statistics.items()}


def _combine_all(parts: Sequence[Mapping[str, Any]], statistics: Mapping[str, Statistic]) -> dict[str, Any]:
    return {name: statistic.combine([part[name] for part in parts]) for name, statistic in statistics.items()}
