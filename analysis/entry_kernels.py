"""Kernels that those of the statistics and of the groups share: the entries of a latent from all shards, and units.

Values are the bits of positive float16; a unit is 2^-24, the smallest of them. Indices on the hot way are unsigned,
because numba asks of every signed one whether it counts from the end: `gather` takes 3.4 ns an entry with those, 1.5
with these (one of 2 cores AMD EPYC, AVX2). A sum of a signed and an unsigned integer would be a float.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import numpy as np

from actcache.compiler import compiled

SHORT, BLOCK, U = 32, 8, np.uint64


@compiled
def gather(starts, stops, rows, values, near_rows, near_values):
    """Copy the entries of a latent from all shards; returns how many there are.

    Where there are few in each, the processor then waits for many of them at once: some more than needed are copied at
    a time, so that no branch depends on their number.

    Args:
        starts, stops: [shards] int64, where the entries begin and end in `rows` and `values`.
        near_rows, near_values: room for BLOCK more than all of them.
    """
    n, block, room = U(0), U(BLOCK), U(len(rows))
    for shard in range(len(starts)):
        at, stop, to = U(starts[shard]), U(stops[shard]), n
        n += stop - at
        if stop + block <= room:
            while at < stop:
                for i in range(BLOCK):
                    near_rows[to + U(i)] = rows[at + U(i)]
                for i in range(BLOCK):
                    near_values[to + U(i)] = values[at + U(i)]
                at += block
                to += block
        else:
            while at < stop:
                near_rows[to], near_values[to] = rows[at], values[at]
                at += U(1)
                to += U(1)
    return np.int64(n)


@compiled
def to_units(bits):
    """A float16 as a whole number of 2^-24, from its bits (int64)."""
    exponent = bits >> 10
    normal = np.int64(exponent > 0)
    return ((bits & 1023) | (normal << 10)) << (exponent - normal)
