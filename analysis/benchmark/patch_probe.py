"""PatchProbe: a linear classifier of the mean of an image's patches, trained on original activations.

Its accuracy on reconstructions, over that on originals, says how much of what a linear reader uses is kept. visaebench
calls the ratio `downstream_preservation`; there the probe has a fixed C and is trained on 80 % of the judged images.
Here it is trained on the choosing images, C is chosen on a fifth of those, and features are standardized.
"""

import importlib.util
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actcache import HookPoint
from actcache.store import Tokens
from analysis.benchmark.measured import Skipped
from analysis.benchmark.subject import Judged
from analysis.classifier import choose_validation, fit_logistic, label_names, sample_images

NAME = "probe ratio"
N_IMAGES = 20_000
"""Choosing images that the probe is trained on at most."""


@dataclass(frozen=True)
class PatchProbe:
    """A fitted probe, and the labels of the judged images.

    Attributes:
        labels: [I] class of each judged image, -1 for one without a label or of a class that the probe does not know.
        tokens: the tokens whose mean it reads: patch, or cls where only CLS is encoded.
        mean, deviation: [D]. weight, bias: [C, D] and [C].
        c: inverse weight of the penalty. n_images: number of training images.
    """

    labels: NDArray[np.int64]
    tokens: Tokens
    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]
    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    c: float
    n_images: int

    def predict(self, features: NDArray[np.float64]) -> NDArray[np.int64]:
        """Mean activations [B, D] -> classes [B]."""
        logits = (features - self.mean) / self.deviation @ self.weight.T + self.bias
        return np.asarray(logits.argmax(1))


def fit_patch_probe(judged: Judged, hook_point: HookPoint, tokens: Tokens) -> PatchProbe | Skipped:
    """The probe, or why there is none.

    Args:
        tokens: the kind of tokens that the runs encode.
    """
    if importlib.util.find_spec("sklearn") is None:
        return Skipped(NAME, "a probe needs the package scikit-learn: pip install 'patchsae[quality]'")
    store = judged.store
    read: Tokens = "cls" if tokens == "cls" else "patch"
    names = label_names(store)
    images = judged.choosing[names[judged.choosing].astype(bool)]
    if not len(images):
        return Skipped(
            NAME, f"the choosing images of {store.path.name} have no labels; extract a folder of class folders"
        )
    images = sample_images(images, N_IMAGES, judged.seed)
    known, counts = np.unique(names[images], return_counts=True)
    known = known[counts >= 2]
    if len(known) < 2:
        return Skipped(NAME, f"fewer than two classes of {store.path.name} have two choosing images; give more images")
    number = {name: i for i, name in enumerate(known)}
    labels = np.array([number.get(name, -1) for name in names[judged.images]], dtype=np.int64)
    if not (labels >= 0).any():
        return Skipped(NAME, f"no judged image of {store.path.name} has a label of a class that the probe knows")
    images = images[np.isin(names[images], known)]
    classes = np.array([number[name] for name in names[images]], dtype=np.int64)
    rows = _read_means(judged, hook_point, read, images)
    validation = choose_validation(classes, judged.seed)
    mean, deviation = rows[~validation].mean(0), rows[~validation].std(0)
    deviation = np.where(deviation > 1e-8, deviation, 1.0)
    fit = fit_logistic((rows - mean) / deviation, classes, validation)
    return PatchProbe(labels, read, mean, deviation, fit.weight, fit.bias, fit.c, len(images))


def _read_means(
    judged: Judged, hook_point: HookPoint, tokens: Tokens, images: NDArray[np.int64]
) -> NDArray[np.float64]:
    store, step = judged.store, judged.store.layout.chunk_images
    parts = [
        store.read(hook_point, images=images[first : first + step], tokens=tokens, check=store.checks_cheaply)
        .astype(np.float64)
        .mean(1)
        for first in range(0, len(images), step)
    ]
    return np.concatenate(parts)
