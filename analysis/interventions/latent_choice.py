"""Which latents a mask holds: the top latents of each class and of the dataset, and random ones of equal frequency.

In: codes of the images that latents are chosen on. Out: lists of latents, best first, [C, k] with -1 behind the last.
numpy only. Shapes: C classes, F latents.

Source: PatchSAE (arXiv 2412.05276) equations 4-5: a_c[s] is the number of tokens of class c's images on which latent s
is above tau; a_D[s] is its sum over the classes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saetrain import CodeStore

JITTER = 0.1
"""Standard deviation, in ln(frequency), of the noise on a control's target frequency; it makes the draws differ."""


@dataclass
class LatentCounts:
    """a_c[s], added up entry by entry."""

    by_class: NDArray[np.int32]  # [C, F]

    @classmethod
    def empty(cls, n_classes: int, n_latents: int) -> "LatentCounts":
        return cls(np.zeros((n_classes, n_latents), dtype=np.int32))

    def add(self, classes: NDArray[np.int64], latents: NDArray[np.int64]) -> None:
        """Count entries [N] above tau, given the class of each entry's image; -1 is not counted."""
        counted = classes >= 0
        key = classes[counted] * self.by_class.shape[1] + latents[counted]
        np.add.at(self.by_class.reshape(-1), key, 1)

    @property
    def by_dataset(self) -> NDArray[np.int64]:
        """a_D[s], [F]."""
        return np.asarray(self.by_class.sum(0, dtype=np.int64))


def count_in_codes(
    codes: CodeStore, labels: NDArray[np.int64], n_classes: int, *, tokens: str, tau: float
) -> LatentCounts:
    """Count the entries of stored codes.

    Args:
        labels: [I] class of each image, -1 for those that are not counted.
    """
    counts = LatentCounts.empty(n_classes, codes.n_latents)
    for number in range(codes.n_shards):
        shard = codes.read_shard(number)
        image, token = np.divmod(shard.row.astype(np.int64), codes.n_tokens)
        above = shard.latent_value.astype(np.float32) > tau
        if tokens != "all":
            above &= (token == 0) == (tokens == "cls")
        latent = np.repeat(np.arange(codes.n_latents), np.diff(shard.latent_indptr))
        counts.add(labels[image[above]], latent[above])
    return counts


def rank_latents(counts: NDArray[np.integer], k: int) -> NDArray[np.int64]:
    """The k latents with the largest counts in each row of [C, F], largest first, ties by number: [C, k].

    A latent that is never counted is in no list; its place holds -1.
    """
    k = min(k, counts.shape[1])
    order = np.argsort(-counts.astype(np.int64), axis=1, kind="stable")[:, :k]
    return np.where(np.take_along_axis(counts, order, 1) > 0, order, -1)


def match_frequency(
    lists: NDArray[np.int64], frequency: NDArray[np.integer], *, rng: np.random.Generator
) -> NDArray[np.int64] | None:
    """For each list, the same number of other latents with about the same frequencies, without repetition.

    The target frequencies are jittered on a log scale; each takes the nearest latent that is neither in the list nor
    taken yet.

    Args:
        lists: [C, k], -1 behind the last.
        frequency: [F]; latents with 0 are never drawn.

    Returns:
        [C, k], -1 where the list has -1; None if any list leaves too few other live latents to draw from.
    """
    drawn = np.full_like(lists, -1)
    logs = np.log(np.maximum(frequency, 1))
    by_frequency = np.argsort(logs + 1e-9 * rng.random(len(logs)), kind="stable")
    by_frequency = by_frequency[frequency[by_frequency] > 0]
    for c, row in enumerate(lists):
        mine = row[row >= 0]
        free = by_frequency[~np.isin(by_frequency, mine)]
        n, k = len(free), len(mine)
        if k > n:
            return None
        target = np.sort(logs[mine] + rng.normal(0, JITTER, k))
        above = np.searchsorted(logs[free], target).clip(max=n - 1)
        below = (above - 1).clip(min=0)
        place = np.where(target - logs[free[below]] < logs[free[above]] - target, below, above)
        steps = np.arange(k)  # strictly increasing places, within 0..n - 1: no latent twice
        place = np.minimum(np.maximum.accumulate(place - steps) + steps, n - k + steps)
        drawn[c, :k] = free[place]
    return drawn


def split_halves(labels: NDArray[np.int64], *, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Two halves of the images with a label >= 0: each class is cut in two by a seeded permutation. Positions ascend.

    If a class has an odd number of images, the second half, which is judged, gets the extra image.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    first, second = [], []
    for number in range(int(labels.max(initial=-1)) + 1):
        mine = rng.permutation(np.flatnonzero(labels == number))
        first.append(mine[: len(mine) // 2])
        second.append(mine[len(mine) // 2 :])
    return np.sort(np.concatenate(first)), np.sort(np.concatenate(second))
