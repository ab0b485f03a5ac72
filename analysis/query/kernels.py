"""Kernels of `query --group`: the pairs of a block of latents as sortable numbers, and the comparison of two groups.

Keys are described in groups.py; values are the bits of positive float16, as in analysis/concepts/kernels.py.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, assignment"

import math

import numpy as np

from actcache.compiler import compiled


@compiled
def key_pairs(pointers, rows, values, n_tokens, group, bits, by_peak, key):
    """Fill `key` [N] with one int64 for each pair whose image is in a group; returns how many there are.

    Args:
        pointers: [n + 1, shards] int64, where the entries of each latent begin.
        rows: [N] uint32, image * n_tokens + token, ascending within a latent and shard; n_tokens below 2^19.
        values: [N] uint16.
        group: [I] int8, 1 in group a, 0 in group b, -1 in neither.
        bits: of a score. by_peak: whether a score is the maximum over tokens, not the sum, in units of 2^-24.
    """
    n = np.int64(0)
    inverse = 1.0 / n_tokens
    for latent in range(pointers.shape[0] - 1):
        for shard in range(pointers.shape[1]):
            i, stop = pointers[latent, shard], pointers[latent + 1, shard]
            while i < stop:
                image = np.int64((np.float64(rows[i]) + 0.5) * inverse)  # exact
                first, total, most = image * n_tokens, np.int64(0), np.int64(0)
                while i < stop and 0 <= np.int64(rows[i]) - first < n_tokens:
                    value = np.int64(values[i])
                    exponent = value >> 10
                    normal = np.int64(exponent > 0)
                    units = ((value & 1023) | (normal << 10)) << (exponent - normal)
                    total += units
                    most = max(most, units)
                    i += 1
                key[n] = (latent << (bits + 1)) | ((most if by_peak else total) << 1) | (group[image] == 1)
                n += group[image] >= 0
    return n


@compiled
def rank_latents(key, bits, n_a, n_b, unit, latents, columns):
    """Compare two groups latent by latent, as `rank_groups`; returns how many latents there are.

    Args:
        key: [N] int64, sorted.
        latents: [L] int64, to be filled. columns: [7, L] float64, those of a `Contrast` in order, to be filled.
    """
    n_total = n_a + n_b
    n_latents, i = np.int64(0), np.int64(0)
    while i < len(key):
        latent = key[i] >> (bits + 1)
        end = i
        while end < len(key) and key[end] >> (bits + 1) == latent:
            end += 1
        n_zero = n_total - (end - i)
        ties, rank_sum = float(n_zero) ** 3 - n_zero, 0.0
        total_a, total, fired_a, runs_a, runs_b = 0.0, 0.0, np.int64(0), np.int64(0), np.int64(0)
        at = i
        while at < end:
            run, tied_a = at, np.int64(0)
            while at < end and key[at] >> 1 == key[run] >> 1:
                tied_a += key[at] & 1
                at += 1
            tied = at - run
            score = ((key[run] >> 1) & ((np.int64(1) << bits) - 1)) * unit
            rank_sum += ((run - i) + (tied + 1) / 2 + n_zero) * tied_a
            ties += float(tied) ** 3 - tied
            total_a += score * tied_a
            total += score * tied
            fired_a += tied_a
            runs_a += tied_a > 0
            runs_b += tied > tied_a
        fired_b = end - i - fired_a
        mean_a, mean_b = total_a / n_a, (total - total_a) / n_b
        within = (n_a - fired_a) * mean_a**2 + (n_b - fired_b) * mean_b**2
        for at in range(i, end):  # in a second pass: a difference of large sums would leave rounding errors
            score = ((key[at] >> 1) & ((np.int64(1) << bits) - 1)) * unit
            within += (score - (mean_a if key[at] & 1 else mean_b)) ** 2
        one_a, one_b = fired_a == n_a and runs_a == 1, fired_b == n_b and runs_b == 1
        constant = (fired_a == 0 or one_a) and (fired_b == 0 or one_b)
        pooled = 0.0 if constant else math.sqrt(within / (n_total - 2))
        u = rank_sum + (n_a - fired_a) * (n_zero + 1) / 2 - n_a * (n_a + 1) / 2
        spread = math.sqrt(n_a * n_b / 12 * ((n_total + 1) - ties / (n_total * (n_total - 1.0))))
        z = (u - n_a * n_b / 2) / spread if spread > 0 else 0.0
        latents[n_latents] = latent
        columns[0, n_latents] = u / (n_a * n_b)
        columns[1, n_latents] = (mean_a - mean_b) / pooled if pooled > 0 else np.nan
        columns[2, n_latents] = math.erfc(abs(z) / math.sqrt(2.0))
        columns[3, n_latents], columns[4, n_latents] = mean_a, mean_b
        columns[5, n_latents], columns[6, n_latents] = fired_a / n_a, fired_b / n_b
        n_latents += 1
        i = end
    return n_latents
