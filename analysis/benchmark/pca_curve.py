"""PCA by rank, beside measure 1: what the best linear subspace of each dimension leaves out of the judged activations.

    fvu of rank K = sum ||(I - V_K^T V_K) (x - m)||^2 / sum ||x - mean x||^2

m and the rows of V_K, the K principal directions, are those of the PCA baseline, which was fitted on choosing images.
The baseline itself lets each token choose its k directions; here all tokens share the first K. One pass over the judged
images adds up the squares of the coefficients, from which every rank follows (evaluation of saev's trait_discovery,
arXiv 2511.17735, table of PCA baselines).
"""

from collections.abc import Callable

import numpy as np

from actcache.store import Tokens
from analysis.benchmark.resamples import divide, interval
from analysis.benchmark.subject import Judged
from analysis.results import RankPoint
from saetrain import Run

RANKS = (1, 4, 16, 64, 256, 1024)


def measure_pca_curve(
    pca: Run, judged: Judged, tokens: Tokens, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[RankPoint, ...]:
    """The fvu of PCA with 1, 4, 16, 64, 256 and 1,024 components, at most the width; none if activations do not vary.

    Args:
        pca: a PCA baseline, whatever its k.
        tokens: the kind of tokens, as in `fvu`.
        on_progress: called with (images done, in all).
    """
    sae, store = pca.sae(), judged.store
    ranks = sorted({min(rank, sae.d_model) for rank in RANKS})
    most = max((rank for rank in ranks if rank < sae.d_model), default=0)  # with all directions, nothing is left out
    directions = sae.encoder[:most].double().numpy()
    mean = sae.mean.double().numpy()
    n = judged.resamples.n + 1
    count, squares, total, explained = np.zeros(n), np.zeros(n), np.zeros((n, sae.d_model)), np.zeros((n, most))
    step = store.layout.chunk_images
    for first in range(0, len(judged.images), step):
        images = judged.images[first : first + step]
        drawn = judged.resamples.weights(first, first + len(images))
        weights = np.concatenate([np.ones((1, len(images))), drawn])
        part = store.read(pca.hook_point, images=images, tokens=tokens, check=store.checks_cheaply)
        x = part.reshape(len(images), -1, part.shape[-1]) - mean
        count += weights.sum(1) * x.shape[1]
        squares += weights @ np.square(x).sum((1, 2))
        total += weights @ x.sum(1)
        explained += weights @ np.square(x @ directions.T).sum(1)
        on_progress(first + len(images), len(judged.images))
    variance = squares - np.square(total).sum(1) / count
    if not variance[0] > 1e-12:
        return ()
    left = squares[:, None] - np.cumsum(explained, axis=1)
    points = []
    for rank in ranks:
        error = left[:, rank - 1] if rank < sae.d_model else np.zeros(n)
        fvu = divide(error, variance, variance > 1e-12)
        low, high = interval(fvu[1:]) or (None, None)
        points.append(RankPoint(rank, float(fvu[0]), low, high))
    return tuple(points)
