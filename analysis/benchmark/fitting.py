"""What baselines are fitted on: the mean, the covariance and a sample of the tokens of the choosing images."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from actcache import HookPoint, SettingsError
from actcache.store import StoreGroup, Tokens

N_FIT = 1 << 20
"""Tokens that the covariance is taken from at most; the error of a principal direction is far below 1 % then."""
N_CLUSTERED = 1 << 16
"""Tokens that k-means sees at most: 0.2 GB at width 768."""
TOKENS_PER_CENTROID = 8
N_ROUNDS = 10
BATCH_ROWS = 4096


@dataclass(frozen=True)
class FittingTokens:
    """The tokens of some images.

    Attributes:
        tokens: all, patch or cls, as the store's layout has them.
        images: stored positions.
    """

    store: StoreGroup
    hook_point: HookPoint
    tokens: Tokens
    images: NDArray[np.int64]

    def sample(self, n_tokens: int, seed: int) -> "FittingTokens":
        """The tokens of as many random images as hold `n_tokens`."""
        n_images = max(1, -(-n_tokens // self.store.n_read_tokens(self.tokens)))
        if n_images >= len(self.images):
            return self
        chosen = np.random.Generator(np.random.Philox(seed)).permutation(self.images)[:n_images]
        return FittingTokens(self.store, self.hook_point, self.tokens, np.sort(chosen))

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Rows [B, D], some images at a time."""
        step = self.store.layout.chunk_images
        for first in range(0, len(self.images), step):
            part = self.store.read(
                self.hook_point, images=self.images[first : first + step], tokens=self.tokens,
                check=self.store.checks_cheaply,
            )  # fmt: skip
            yield part.reshape(-1, part.shape[-1]).astype(np.float32)

    def rows(self, n_rows: int) -> Tensor:
        """The first rows [n, D] float32, at most `n_rows`."""
        parts, count = [], 0
        for block in self.blocks():
            parts.append(torch.from_numpy(block))
            count += len(block)
            if count >= n_rows:
                break
        return torch.cat(parts)[:n_rows]


@dataclass(frozen=True)
class Moments:
    """Mean [D] and covariance [D, D] of some tokens, float64, and their number."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    count: int

    @property
    def components(self) -> NDArray[np.float64]:
        """[D, D]: the principal directions as rows, that of the largest variance first.

        The sign of each is fixed: its largest element is positive.
        """
        _, vectors = np.linalg.eigh(self.covariance)
        rows = vectors.T[::-1]
        largest = np.take_along_axis(rows, np.abs(rows).argmax(1)[:, None], axis=1)
        return np.ascontiguousarray(rows * np.where(largest < 0, -1.0, 1.0))


def measure_moments(tokens: FittingTokens) -> Moments:
    """Mean and covariance in one pass: sums of x - c and of its outer products, c being the mean of the first block."""
    count, shift = 0, None
    for block in tokens.blocks():
        rows = block.astype(np.float64)
        if shift is None:
            shift = rows.mean(0)
            total, outer = np.zeros_like(shift), np.zeros((len(shift), len(shift)))
        rows -= shift
        total += rows.sum(0)
        outer += rows.T @ rows
        count += len(rows)
    if shift is None:
        raise SettingsError("There is no image to fit the baselines on. Give a store with more images.")
    mean = total / count
    return Moments(shift + mean, outer / count - np.outer(mean, mean), count)


def fit_centroids(rows: Tensor, n_centroids: int, seed: int) -> Tensor:
    """[K, D]: gain-shape k-means, unit directions c such that each row is close to (x c) c for one of them.

    A round assigns each row to the direction with the largest product s, and turns the direction to the sum of s x over
    its rows, which lowers the squared error. A direction without rows starts again at a random row. Source: Coates and
    Ng 2012, "Learning feature representations with k-means", the spherical variant.

    Args:
        rows: [n, D], centered.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randperm(len(rows), generator=generator)[:n_centroids]
    centroids = F.normalize(rows[start])
    for _ in range(N_ROUNDS):
        sums, counts = torch.zeros_like(centroids), torch.zeros(len(centroids), dtype=torch.int64)
        for part in torch.split(rows, BATCH_ROWS):
            gain, nearest = (part @ centroids.T).max(1)
            gain = gain.relu()
            sums.index_add_(0, nearest, gain[:, None] * part)
            counts += torch.bincount(nearest[gain > 0], minlength=len(centroids))
        empty = torch.nonzero(counts == 0).squeeze(1)
        sums[empty] = rows[torch.randint(len(rows), (len(empty),), generator=generator)]
        centroids = F.normalize(sums)
    return centroids
