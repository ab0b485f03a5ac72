"""Kernels of `query --group`: the scores of a latent's pairs as sortable numbers, and two groups compared.

A key is `score << 1 | in group a`, where the score is a whole number of `unit`; with the latent above these bits, the
keys of several latents can be sorted together. Values are the bits of positive float16.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"

import math

import numpy as np

from actcache.compiler import compiled
from analysis.entry_kernels import BLOCK, SHORT, U, gather, to_units

DIGIT, FEW = 11, 600
"""Bits of a digit of many keys, whose counts fit into the processor's nearest cache; few keys are sorted by bytes."""

LONG = 4
"""Entries of an image from which a run of them is worth a branch."""


@compiled
def contrast_latents(pointers, rows, values, n_tokens, group, by_peak, n_a, n_b, unit, latents, columns):
    """Compare two groups latent by latent, as `rank_groups`; returns how many latents fire in either.

    What belongs to a latent stays in the processor's cache from its entries to its row of the result.

    Args:
        pointers: [n + 1, shards] int64, where the entries of each latent begin.
        rows: [N] uint32, image * n_tokens + token, ascending within a latent and shard; n_tokens below 2^19.
        values: [N] uint16.
        group: [I] int8, 1 in group a, 0 in group b, -1 in neither.
        by_peak: whether a score is the maximum over tokens, not the sum.
        latents: [n] int64, to be filled. columns: [7, n] float64, those of a `Contrast` in order, to be filled.
    """
    n_latents, room = np.int64(0), np.int64(0)
    for latent in range(pointers.shape[0] - 1):
        room = max(room, (pointers[latent + 1] - pointers[latent]).sum())
    key, spare, counts = np.empty(room + 1, np.int64), np.empty(room + 1, np.int64), np.empty(1 << DIGIT, U)
    n_shards = pointers.shape[1]
    n_near = SHORT * n_shards + BLOCK
    near_rows, near_values = np.empty(n_near, np.uint32), np.empty(n_near, np.uint16)
    for latent in range(pointers.shape[0] - 1):
        starts, stops, n = pointers[latent], pointers[latent + 1], np.int64(0)
        n_entries = (stops - starts).sum()
        if n_entries <= SHORT * n_shards:
            stop = gather(starts, stops, rows, values, near_rows, near_values)
            n = add_keys(near_rows, near_values, 0, stop, n_tokens, group, by_peak, np.int64(0), key, n)
        else:
            for shard in range(n_shards):
                at = starts[shard], stops[shard]
                if n_entries > LONG * len(group):
                    n = add_long_keys(rows, values, *at, n_tokens, group, by_peak, np.int64(0), key, n)
                else:
                    n = add_keys(rows, values, *at, n_tokens, group, by_peak, np.int64(0), key, n)
        if n:
            ordered = spare if sort_keys(key, spare, n, counts) else key
            rank_latent(ordered[:n], n_a, n_b, unit, columns[:, n_latents])
            latents[n_latents] = latent
            n_latents += 1
    return n_latents


@compiled
def key_pairs(pointers, rows, values, n_tokens, group, bits, by_peak, key):
    """Fill `key` [N + 1] with the keys of all pairs whose image is in a group; returns how many there are.

    Args:
        bits: of a key; above them stands the latent. The others as for `contrast_latents`.
    """
    n = np.int64(0)
    for latent in range(pointers.shape[0] - 1):
        for shard in range(pointers.shape[1]):
            n = add_keys(
                rows, values, pointers[latent, shard], pointers[latent + 1, shard], n_tokens, group, by_peak,
                np.int64(latent) << bits, key, n,
            )  # fmt: skip
    return n


@compiled
def rank_latents(key, bits, n_a, n_b, unit, latents, columns):
    """As `contrast_latents`, for the keys of `key_pairs` of whole latents, sorted."""
    n_latents, i = np.int64(0), np.int64(0)
    while i < len(key):
        latent = key[i] >> bits
        first = latent << bits
        end = i
        while end < len(key) and key[end] >> bits == latent:
            key[end] -= first
            end += 1
        rank_latent(key[i:end], n_a, n_b, unit, columns[:, n_latents])
        latents[n_latents] = latent
        n_latents += 1
        i = end
    return n_latents


@compiled
def add_keys(rows, values, i, stop, n_tokens, group, by_peak, first_key, key, n):
    """Write the keys of the entries i to stop - 1, which are of one latent, from `key[n]` on; returns n.

    There is no branch: of most latents, it cannot be predicted which entries share an image.
    """
    inverse = 1.0 / n_tokens
    last, total, most, counts, to = np.int64(-1), np.int64(0), np.int64(0), U(0), U(n)
    for at in range(U(i), U(stop)):
        image = np.int64((np.float64(rows[at]) + 0.5) * inverse)  # exact
        units = to_units(np.int64(values[at]))
        same = np.int64(image == last)
        total = units + same * total
        most = max(units, same * most)
        to += counts & U(1 - same)
        member = group[U(image)]
        key[to] = first_key | ((most if by_peak else total) << 1) | (member == 1)
        counts = U(member >= 0)
        last = image
    return np.int64(to + counts)


@compiled
def add_long_keys(rows, values, i, stop, n_tokens, group, by_peak, first_key, key, n):
    """As `add_keys`, for a latent that fires at many tokens of an image: 2 ns an entry instead of 8."""
    inverse = 1.0 / n_tokens
    while i < stop:
        image = np.int64((np.float64(rows[i]) + 0.5) * inverse)
        first, total, most = image * n_tokens, np.int64(0), np.int64(0)
        while i < stop and 0 <= np.int64(rows[i]) - first < n_tokens:
            units = to_units(np.int64(values[i]))
            total += units
            most = max(most, units)
            i += 1
        key[n] = first_key | ((most if by_peak else total) << 1) | (group[image] == 1)
        n += group[image] >= 0
    return n


@compiled
def sort_keys(key, spare, n, counts):
    """Sort n keys by their scores, the smallest first, digit by digit; returns whether the result is in `spare`.

    Only digits in which the keys differ are looked at: a float16 has eleven of them above its lowest bit that is set.
    Keys of equal scores keep no order.
    """
    same, some = key[0], key[0]
    for i in range(1, n):
        same &= key[i]
        some |= key[i]
    differ, shift = (some & ~same) >> 1, np.int64(1)
    while differ and not differ & 1:
        differ >>= 1
        shift += 1
    digit = np.int64(DIGIT if n > FEW else 8)
    mask, there = (np.int64(1) << digit) - 1, False
    while differ:
        source, target = (spare, key) if there else (key, spare)
        counts[: mask + 1] = 0
        for i in range(n):
            counts[U((source[i] >> shift) & mask)] += U(1)
        before = U(0)
        for place in range(mask + 1):
            here = counts[place]
            counts[place] = before
            before += here
        for i in range(n):
            place = U((source[i] >> shift) & mask)
            target[counts[place]] = source[i]
            counts[place] += U(1)
        there = not there
        differ >>= digit
        shift += digit
    return there


@compiled
def rank_latent(key, n_a, n_b, unit, column):
    """Fill the seven numbers of a `Contrast` from the sorted keys of one latent; all other images score 0."""
    n_total, n = n_a + n_b, len(key)
    n_zero = n_total - n
    ties, rank_sum = float(n_zero) ** 3 - n_zero, 0.0
    total_a, total, fired_a, runs_a, runs_b = 0.0, 0.0, np.int64(0), np.int64(0), np.int64(0)
    at = 0
    while at < n:
        run, tied_a = at, np.int64(0)
        while at < n and key[at] >> 1 == key[run] >> 1:
            tied_a += key[at] & 1
            at += 1
        tied = at - run
        score = (key[run] >> 1) * unit
        rank_sum += (run + (tied + 1) / 2 + n_zero) * tied_a
        ties += float(tied) ** 3 - tied
        total_a += score * tied_a
        total += score * tied
        fired_a += tied_a
        runs_a += tied_a > 0
        runs_b += tied > tied_a
    fired_b = n - fired_a
    mean_a, mean_b = total_a / n_a, (total - total_a) / n_b
    within = (n_a - fired_a) * mean_a**2 + (n_b - fired_b) * mean_b**2
    for at in range(n):  # in a second pass: a difference of large sums would leave rounding errors
        within += ((key[at] >> 1) * unit - (mean_a if key[at] & 1 else mean_b)) ** 2
    one_a, one_b = fired_a == n_a and runs_a == 1, fired_b == n_b and runs_b == 1
    constant = (fired_a == 0 or one_a) and (fired_b == 0 or one_b)
    pooled = 0.0 if constant else math.sqrt(within / (n_total - 2))
    u = rank_sum + (n_a - fired_a) * (n_zero + 1) / 2 - n_a * (n_a + 1) / 2
    spread = math.sqrt(n_a * n_b / 12 * ((n_total + 1) - ties / (n_total * (n_total - 1.0))))
    z = (u - n_a * n_b / 2) / spread if spread > 0 else 0.0
    column[0] = u / (n_a * n_b)
    column[1] = (mean_a - mean_b) / pooled if pooled > 0 else np.nan
    column[2] = math.erfc(abs(z) / math.sqrt(2.0))
    column[3], column[4] = mean_a, mean_b
    column[5], column[6] = fired_a / n_a, fired_b / n_b
