"""Kernels that those of the statistics and of the groups share: the entries of a latent from all shards, and units.

Values are the bits of positive float16; a unit is 2^-24, the smallest of them.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import numpy as np

from actcache.compiler import compiled

SHORT, BLOCK = 32, 8


@compiled
def gather(starts, stops, rows, values, near_rows, near_values):
    """Copy the entries of a latent from all shards; returns how many there are.

    Where there are few in each, the processor then waits for many of them at once: some more than needed are copied at
    a time, so that no branch depends on their number.

    Args:
        starts, stops: [shards] int64, where the entries begin and end in `rows` and `values`.
        near_rows, near_values: room for BLOCK more than all of them.
    """
    n = np.int64(0)
    for shard in range(len(starts)):
        start, stop = starts[shard], stops[shard]
        if stop + BLOCK <= len(rows):
            for at in range(start, stop, BLOCK):
                for i in range(BLOCK):
                    near_rows[n + at - start + i] = rows[at + i]
                    near_values[n + at - start + i] = values[at + i]
        else:
            for at in range(start, stop):
                near_rows[n + at - start], near_values[n + at - start] = rows[at], values[at]
        n += stop - start
    return n


@compiled
def to_units(bits):
    """A float16 as a whole number of 2^-24, from its bits (int64)."""
    exponent = bits >> 10
    normal = np.int64(exponent > 0)
    return ((bits & 1023) | (normal << 10)) << (exponent - normal)
