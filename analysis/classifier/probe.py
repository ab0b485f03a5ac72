"""The linear probe, a judge for every tower: logistic regression on what the tower makes of an image.

    logits = W (features - mean) / deviation + b

In: images with labels that are not judged (`ProbeTraining`). Out: `LinearProbe`, a linear layer through which gradients
flow. Features are read after the last block and the last norm: CLS, the mean of the patches, and the vector that the
tower itself pools. The fit is scikit-learn's multinomial logistic regression in float64. C, the inverse weight of the
penalty, is raised until the loss on a fifth of the training images, on which the probe is not fitted, gets worse.

Source of the features and of the grid over C: the linear evaluations of DINOv2 and DINOv3.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from actcache import SettingsError
from actcache.models import VisionTower
from analysis.classifier.embeddings import last_output
from analysis.classifier.logistic import choose_validation, fit_logistic, standardize
from analysis.classifier.probe_training import ProbeTraining
from analysis.classifier.streams import BATCH_IMAGES, as_numpy, batches, read_stream
from analysis.results import JudgeFacts, ProbeFacts

STANDARDIZED = "standardized"


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe.

    Attributes:
        names: class names, sorted.
        parts: what the features are, in their order: cls, patch, pooled.
        mean, deviation: [E], of the features of the images it was fitted on.
        weight, bias: [C, E] and [C].
    """

    names: tuple[str, ...]
    parts: tuple[str, ...]
    mean: Tensor
    deviation: Tensor
    weight: Tensor
    bias: Tensor
    fit: ProbeFacts

    @property
    def facts(self) -> JudgeFacts:
        return JudgeFacts("probe", "softmax", self.fit)

    def among(self, names: Sequence[str]) -> "LinearProbe":
        """The probe with some of its classes."""
        if tuple(names) == self.names:
            return self
        rows = torch.tensor([self.names.index(name) for name in names], device=self.weight.device)
        return replace(self, names=tuple(names), weight=self.weight[rows], bias=self.bias[rows])

    def embed(self, vision: VisionTower, x: Tensor) -> Tensor:
        """The stream after the last block [B, T, D] -> features [B, E], not yet standardized."""
        return read_features(vision, x, self.parts)

    def classify(self, features: Tensor) -> Tensor:
        """Features [B, E] -> logits [B, C]."""
        return F.linear((features - self.mean) / self.deviation, self.weight, self.bias)

    def evidence(self, features: Tensor) -> Tensor:
        return self.classify(features)


def choose_parts(vision: VisionTower, asked: str) -> tuple[str, ...]:
    """The parts of "cls+patch" that the tower has. Raises SettingsError if that leaves none."""
    parts = tuple(part for part in asked.split("+") if part != "cls" or "cls" in vision.prefix)
    if not parts:
        raise SettingsError(
            "This model has no CLS token, so a probe cannot read it. Use --probe-features patch or pooled."
        )
    return parts


def read_features(vision: VisionTower, x: Tensor, parts: Sequence[str]) -> Tensor:
    """The stream after the last block [B, T, D] -> features [B, E] float32, one part after the other."""
    columns = []
    for part in parts:
        if part == "pooled":
            columns.append(vision.pool(x))
            continue
        normed = vision.final_norm(x)
        if part == "cls":
            columns.append(normed[:, vision.prefix.index("cls")])
        else:  # prompts behind the patches are not the image's
            columns.append(normed[:, len(vision.prefix) : vision.n_tokens].mean(1))
    return torch.cat(columns, dim=1).float()


@torch.no_grad()
def fit_probe(
    training: ProbeTraining, names: Sequence[str], vision: VisionTower, *, batch_size: int = BATCH_IMAGES
) -> LinearProbe:
    """Fit a probe to tell some classes apart.

    Args:
        names: class names, sorted.

    Raises:
        SettingsError: a class without enough training images, or features that the tower does not have.
    """
    parts = choose_parts(vision, training.features)
    images, classes = training.of(names)
    store, hook = training.store, last_output(training.store)
    features = []
    for chosen in batches(images, batch_size):
        x = read_stream(store, hook, chosen).to(vision.device)
        x = vision.run_blocks(x, hook.layer + 1, vision.n_layers)
        features.append(as_numpy(read_features(vision, x, parts)))
    rows = np.concatenate(features).astype(np.float64)
    judged = choose_validation(classes, training.seed)
    mean, deviation = standardize(rows[~judged])
    fit = fit_logistic((rows - mean) / deviation, classes, judged)
    facts = ProbeFacts(
        features="+".join(parts), normalization=STANDARDIZED, c=fit.c, seed=training.seed, n_images=len(images),
        n_validation=int(judged.sum()), accuracy=fit.accuracy, images=training.digest(images),
    )  # fmt: skip

    def tensor(values: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).float().to(vision.device)

    return LinearProbe(
        tuple(names), parts, tensor(mean), tensor(deviation), tensor(fit.weight), tensor(fit.bias), facts
    )  # fmt: skip
