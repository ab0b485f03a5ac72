"""M4 `sparse_probing_auc`: the accuracy of probes on the k best latents, and its area over k.

The latents are ranked on all images, those of the test part included, and the area is taken over k itself, so half of
it lies between 50 and 100 latents.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from analysis.benchmark.measured import Measured
from analysis.benchmark.visaebench.images import ProtocolImages
from analysis.benchmark.visaebench.pairs import Columns, Totals
from analysis.benchmark.visaebench.probes import measure_f, rank, score

NAME = "sparse_probing_auc"
GRID = (1, 5, 10, 20, 50, 100)


def choose_best(totals: Totals, k: int) -> NDArray[np.int64]:
    """The k latents with the largest F over the classes, the largest first."""
    return rank(measure_f(totals.counts, totals.sums, totals.squares.sum(0)))[:k]


def measure_probing(columns: Columns, images: ProtocolImages, grid: Sequence[int] = GRID) -> Measured:
    """`columns`: of at least max(grid) latents if there are as many, the best first, on all images."""
    assert images.labels is not None
    accuracy = {k: score(columns.values[:, :k], images.labels, images.split) for k in grid if k <= len(columns.latents)}
    ks, accuracies = list(accuracy), list(accuracy.values())
    auc = float(np.trapezoid(accuracies, x=ks) / (ks[-1] - ks[0])) if len(ks) > 1 else accuracies[0]
    facts: dict[str, object] = {
        "k_accuracies": {str(k): value for k, value in accuracy.items()},
        "num_images": len(images),
    }
    return Measured(NAME, auc, None, True, facts)
