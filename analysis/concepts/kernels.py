"""Kernels of `analyze`: one pass over the entries of a range of latents counts all that is told of them.

Values are the bits of float16 that are finite and above 0, whose order is that of the values; they are added up as
whole numbers of 2^-24, the smallest float16. Each call has arrays of its own, so any number of threads may count.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import math

import numpy as np

from actcache.compiler import compiled
from analysis.entry_kernels import BLOCK, SHORT, U, gather, to_units

UNIT = 2.0**-24


@compiled
def count_entries(pointers, rows, values, n_tokens, last, place, divisor, by_peak, counts, cells, classes):
    """Add the entries of some shards to the counts of a range of latents; returns how many rows of classes there are.

    The entries of a latent follow one another here, shard after shard, so what is counted of it stays in the
    processor's cache. If they are few in each shard, they are gathered first: then waiting for memory overlaps. An
    entry takes 8 ns where latents fire often, 40 where every entry is a pair (one of 2 cores AMD EPYC, AVX2).

    Args:
        pointers: [n + 1, shards] int64, where the entries of each latent begin in `rows`.
        rows: [N] uint32, image * n_tokens + token, ascending within a latent and from shard to shard.
        values: [N] uint16.
        n_tokens: tokens of an image, fewer than 2^19; the first one is CLS.
        last: bits of the largest float16 that is not above tau.
        place: [I] int32, the class of each image; -1 for none.
        divisor: what the sum of an image is divided by to give its score.
        by_peak: whether the score of an image is its maximum instead.
        counts: `RangeCounts`, which are added to.
        cells: `ClassCounts` of every latent, which are added to; or zeros for one, if there are no more shards.
        classes: `ClassColumns`, which are filled; of no latents if more shards follow.
    """
    n_shards, room = pointers.shape[1], SHORT * pointers.shape[1] + BLOCK
    near_rows, near_values = np.empty(room, np.uint32), np.empty(room, np.uint16)
    fired = np.empty(cells.total.shape[1] + 1, np.int64)
    n_rows = np.int64(0)
    for latent in range(pointers.shape[0] - 1):
        n = np.int64(0)
        for shard in range(n_shards):
            n += pointers[latent + 1, shard] - pointers[latent, shard]
        cell = latent if len(cells.total) > 1 else 0
        class_tokens, class_images, class_total = cells.n_tokens[cell], cells.n_images[cell], cells.total[cell]
        near = n <= SHORT * n_shards
        if near:
            gather(pointers[latent], pointers[latent + 1], rows, values, near_rows, near_values)
        for run in range(1 if near else n_shards):
            count_run(
                near_rows if near else rows, near_values if near else values,
                np.int64(0) if near else pointers[latent, run], n if near else pointers[latent + 1, run],
                n_tokens, last, place, divisor, by_peak, counts.tally[latent], counts.total[latent],
                counts.strength[latent], counts.position[latent], class_tokens, class_images, class_total,
                counts.top_score[0, latent], counts.top_place[0, latent],
                counts.top_score[1, latent], counts.top_place[1, latent],
            )  # fmt: skip
        if len(classes.n_classes):
            n_listed = list_classes(
                class_tokens, class_images, class_total, fired, classes.labels, classes.place[n_rows:],
                classes.n_tokens[n_rows:], classes.n_images[n_rows:], classes.spread[1, latent],
            )  # fmt: skip
            classes.n_classes[latent] = n_listed
            n_rows += n_listed
            spread_top(
                counts.top_score[0, latent], counts.top_place[0, latent], n_tokens, place, class_total, classes.labels,
                classes.spread[0, latent],
            )  # fmt: skip
    return n_rows


@compiled
def count_run(
    rows, values, i, stop, n_tokens, last, place, divisor, by_peak, tally, totals, strength, position,
    class_tokens, class_images, class_total, scores, places, patch_scores, patch_places,
):  # fmt: skip
    """Count the entries i to stop - 1, which are of one latent. A pair (a latent and an image) is a run of them."""
    inverse = 1.0 / n_tokens
    tally[0] += stop - i
    i, stop = U(i), U(stop)
    n_images, n_cls, most_patch, most_cls = tally[1], tally[2], tally[3], tally[4]
    total, total_cls = totals[0], totals[1]
    while i < stop:
        image = np.int64((np.float64(rows[i]) + 0.5) * inverse)  # exact, and a third of a division
        first = image * n_tokens
        units, best, n_above, cls = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
        if np.int64(rows[i]) == first:
            cls = np.int64(values[i])
            units = to_units(cls)
            total_cls += units * UNIT
            most_cls = max(most_cls, cls)
            n_cls += 1
            n_above += cls > last
            strength[to_bin(cls)] += np.uint32(1)
            position[0] += np.uint32(1)
            i += U(1)
        while i < stop:
            token = np.int64(rows[i]) - first
            if not 0 < token < n_tokens:
                break
            bits = np.int64(values[i])
            units += to_units(bits)
            n_above += bits > last
            best = max(best, (bits << 32) - token)  # the first of the largest
            strength[to_bin(bits)] += np.uint32(1)
            position[U(token)] += np.uint32(1)
            i += U(1)
        patch = (best + (np.int64(1) << 32) - 1) >> 32
        summed = units * UNIT
        n_images += 1
        total += summed
        most_patch = max(most_patch, patch)
        label = place[U(image)]
        if label >= 0:
            class_tokens[label] += np.uint32(n_above)
            class_images[label] += np.uint32(n_above > 0)
            class_total[label] += summed
        peak = max(patch, cls)
        where = ((first + ((patch << 32) - best)) << 16) | peak  # the first token, which is CLS, if there is no patch
        score = to_units(peak) * UNIT if by_peak else summed / divisor
        if score > scores[-1]:
            keep_top(scores, places, score, where)
        if patch:
            score = to_units(patch) * UNIT
            if score > patch_scores[-1]:
                keep_top(patch_scores, patch_places, score, where)
    tally[1], tally[2], tally[3], tally[4] = n_images, n_cls, most_patch, most_cls
    totals[0], totals[1] = total, total_cls


@compiled
def to_bin(bits):
    """The bin of a float16, see histograms.py, from its bits."""
    return max((bits >> 7) - 39, np.int64(0))


@compiled
def keep_top(scores, places, score, where):
    """Put an image into a full list, whose last score is smaller. The first of equal scores comes first."""
    n = len(scores) - 1
    while n > 0 and scores[n - 1] < score:
        scores[n], places[n] = scores[n - 1], places[n - 1]
        n -= 1
    scores[n], places[n] = score, where


@compiled
def list_classes(class_tokens, class_images, class_total, fired, labels, place, n_tokens, n_images, spread):
    """List the classes of a latent, tell how widely it spreads over them, and set its cells to zero.

    See `label_spread`; 2 ns a class that does not occur, 12 one that does. Returns the number of rows.
    """
    n_rows, n_fired, total, mean, entropy, variance = np.int64(0), np.int64(0), 0.0, 0.0, 0.0, 0.0
    for label in range(len(class_total)):
        fired[n_fired] = label
        n_fired += class_total[label] > 0
    for i in range(n_fired):
        total += class_total[fired[i]]
    for i in range(n_fired):
        mean += class_total[fired[i]] / total * labels[fired[i]]
    for i in range(n_fired):
        label = fired[i]
        share = class_total[label] / total
        entropy -= share * math.log(share)
        variance += share * (labels[label] - mean) ** 2
        place[n_rows], n_tokens[n_rows], n_images[n_rows] = label, class_tokens[label], class_images[label]
        n_rows += class_tokens[label] > 0
    class_tokens[:], class_images[:], class_total[:] = 0, 0, 0
    spread[0] = max(entropy, 0.0) if n_fired else np.nan
    spread[1] = math.sqrt(variance) if n_fired else np.nan
    return n_rows


@compiled
def spread_top(scores, places, tokens, place, mass, labels, spread):
    """The same of the scores of the latent's top images; `mass` has a zero for each class, before and after."""
    n, total, mean, entropy, variance = np.int64(0), 0.0, 0.0, 0.0, 0.0
    base = np.nan  # the number of the first label: the deviation of a single label is then exactly 0
    while n < len(scores) and scores[n] > 0:
        label = place[(places[n] >> 16) // tokens]
        if label >= 0:
            mass[label] += scores[n]
            total += scores[n]
            base = labels[label] if math.isnan(base) else base
        n += 1
    for rank in range(n):
        label = place[(places[rank] >> 16) // tokens]
        if label >= 0:
            mean += scores[rank] / total * (labels[label] - base)
    for rank in range(n):
        label = place[(places[rank] >> 16) // tokens]
        if label >= 0 and mass[label] > 0:
            share = mass[label] / total
            mass[label] = 0
            entropy -= share * math.log(share)
            variance += share * (labels[label] - base - mean) ** 2
    spread[0] = max(entropy, 0.0) if total > 0 else np.nan
    spread[1] = math.sqrt(variance) if total > 0 else np.nan
