"""M6 `cross_domain`: the mean of four unlike numbers on a second set of images, each of which is in the details.

reconstruction   1 - fvu, clipped to 0..1, with the formula of `visaebench fvu`
coverage         share of the latents that fire on the first set and do so on the second, too
overlap          Jaccard index of the latents that fire on either
probe            accuracy on the 10 best latents, which are ranked on the training part here
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from analysis.benchmark.measured import Measured
from analysis.benchmark.visaebench.decoding import decode_patches
from analysis.benchmark.visaebench.images import ProtocolImages
from analysis.benchmark.visaebench.pairs import Columns, Totals, read_pairs, sum_pairs
from analysis.benchmark.visaebench.probes import score
from analysis.benchmark.visaebench.sparse_probing import choose_best
from saetrain import CodeStore, Run

NAME = "cross_domain"
K = 10


def measure_cross_domain(
    run: Run,
    totals: Totals,
    codes: CodeStore,
    images: ProtocolImages,
    on_progress: Callable[[int, int], None],
) -> Measured:
    """`totals`: of the first set. `codes`, `images`: the second set. Raises SettingsError where it has no split."""
    train, _ = images.split
    numbers, index = images.classes
    of_train: NDArray[np.int64] = np.full(len(images), -1)
    of_train[train] = np.unique(index[train], return_inverse=True)[1]
    second = sum_pairs(codes, images, of_train, int(of_train.max()) + 1)
    columns = Columns(choose_best(second, K), np.arange(len(images)), codes.n_latents, len(images))
    read_pairs(codes, images, [(columns.latents, columns.add)])
    residual, whole = decode_patches(run, codes, images, np.empty(0, np.int64), on_progress).variances()
    fvu = max(0.0, residual) / whole if whole > 0 else 1.0
    first, both, either = totals.alive.sum(), (totals.alive & second.alive).sum(), (totals.alive | second.alive).sum()
    dead = float((first - both) / first) if first else 0.0
    jaccard = float(both / either) if either else 0.0
    assert images.labels is not None
    accuracy = score(columns.values, images.labels, images.split)
    quality = max(0.0, min(1.0, 1 - fvu))
    facts: dict[str, object] = {
        "ood_fvu": fvu, "reconstruction_quality": quality, "dead_feature_fraction": dead, "jaccard_overlap": jaccard,
        "probe_accuracy_k10": accuracy, "num_images": len(images), "num_classes": len(numbers),
        "id_active_features": int(first), "ood_active_features": int(second.alive.sum()),
        "dataset": images.store.path.name,
    }  # fmt: skip
    return Measured(NAME, float(np.mean([quality, 1 - dead, jaccard, accuracy])), None, True, facts)
