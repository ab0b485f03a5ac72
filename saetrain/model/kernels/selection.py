"""Selection of the active latents in a block of pre-activations, while the block is in cache.

Pre-activations come as the bits of floats, int32 of float32 or int16 of bfloat16: positive floats have the same order
as their bits, and a NaN without a sign comes after infinity. One with a sign is negative, and never selected.
"""

import numpy as np

from actcache.compiler import compiled

GROUP = 32


@compiled
def keep_largest(keys, n, k):
    """Move the k largest of n different keys to the front, in any order (Hoare's selection)."""
    low, high = 0, n - 1
    while low < high:
        pivot = keys[(low + high) >> 1]
        i, j = low, high
        while i <= j:
            while keys[i] > pivot:
                i += 1
            while keys[j] < pivot:
                j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            break


@compiled
def sort_keys(keys, n):
    """Sort the first n keys (Shell's sort: k keys are few, and it compiles in a tenth of the time of numpy's)."""
    gap = 1
    while gap < n // 3:
        gap = 3 * gap + 1
    while gap > 0:
        for i in range(gap, n):
            key, j = keys[i], i
            while j >= gap and keys[j - gap] > key:
                keys[j] = keys[j - gap]
                j -= gap
            keys[j] = key
        gap //= 3


@compiled
def select_largest(bits, k, latents, values, counts):
    """The k largest positive pre-activations of each row, sorted by latent; among equal ones the first.

    Latents g, g + G, g + 2 G, ... form group g. The k-th largest of the maxima of G groups bounds the k-th largest
    entry from below, and only the groups whose maxima reach it, which are k but for ties, are looked at again.

    Args:
        bits: [b, F] int16 or int32.
        latents, values: [b, k] int64 and of the dtype of `bits`: the first counts[row] of each row are written.
        counts: [b] int64.
    """
    n_rows, n_latents = bits.shape
    size = max(1, min(GROUP, n_latents // (4 * k)))
    n_groups = -(-n_latents // size)
    maxima = np.empty(n_groups, bits.dtype)
    keys = np.empty(n_latents, np.int64)
    top = np.int64(np.iinfo(bits.dtype).max)
    guess = np.int64(0)
    for row in range(n_rows):
        line = bits[row]
        for group in range(n_groups):
            maxima[group] = line[group]
        for first in range(n_groups, n_latents, n_groups):
            part = line[first : first + n_groups]
            for i in range(len(part)):
                maxima[i] = max(maxima[i], part[i])
        # bisect: `low` is reached by k groups or more (or is 1), `high` by fewer
        low, high, middle = np.int64(1), top + 1, guess
        while high - low > 1:
            if middle <= low or middle >= high:
                middle = (low + high) >> 1
            floor, n = bits.dtype.type(middle), np.int32(0)
            for group in range(n_groups):
                n += np.int32(maxima[group] >= floor)
            if n < k:
                high = middle
            else:
                low = middle
                if n <= k + (k >> 3) + 2:
                    break
            middle = 0
        guess = low
        floor, n = bits.dtype.type(low), 0
        for group in range(n_groups):
            if maxima[group] >= floor:
                for latent in range(group, n_latents, n_groups):
                    value = line[latent]
                    keys[n] = np.int64(value) << 32 | np.int64(n_latents - latent)
                    n += value >= floor  # without a branch, which would be mispredicted
        if n > k:
            keep_largest(keys, n, k)
            n = k
        for i in range(n):  # by latent instead of by value
            keys[i] = (np.int64(n_latents) - (keys[i] & 0xFFFFFFFF)) << 32 | keys[i] >> 32
        sort_keys(keys, n)
        for i in range(n):
            latents[row, i] = keys[i] >> 32
            values[row, i] = keys[i] & 0xFFFFFFFF
        counts[row] = n


@compiled
def select_above(bits, floor, counts):
    """The entries above a floor that is not negative.

    Args:
        bits: [b, F] int16 or int32.
        floor: [b, 1], [1, F] or [1, 1] of the dtype of `bits`.
        counts: [b] int64, the number of entries of each row; written.

    Returns:
        Latents int64 and bits of the entries, row after row.
    """
    n_rows, n_latents = bits.shape
    by_latent = floor.shape[1] > 1
    mask = np.zeros((n_latents + 7) // 8 * 8, np.uint8)
    words = mask.view(np.uint64)
    room = 4 * n_latents
    latents, values, n = np.empty(room, np.int64), np.empty(room, bits.dtype), 0
    for row in range(n_rows):
        line, before = bits[row], n
        if by_latent:
            bounds = floor[0]
            for latent in range(n_latents):
                mask[latent] = line[latent] > bounds[latent]
        else:
            bound = floor[row if len(floor) > 1 else 0, 0]
            for latent in range(n_latents):
                mask[latent] = line[latent] > bound
        if n + n_latents + 8 > room:
            room *= 2
            more_latents, more_values = np.empty(room, np.int64), np.empty(room, bits.dtype)
            for i in range(n):
                more_latents[i], more_values[i] = latents[i], values[i]
            latents, values = more_latents, more_values
        for word in range(len(words)):
            if words[word]:
                for latent in range(8 * word, min(8 * word + 8, n_latents)):
                    latents[n], values[n] = latent, line[latent]
                    n += mask[latent]  # without a branch, which would be mispredicted
        counts[row] = n - before
    return latents[:n], values[:n]
