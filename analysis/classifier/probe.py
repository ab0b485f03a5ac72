"""The linear probe, a judge for every tower: logistic regression on what the tower makes of an image.

    logits = W (features - mean) / deviation + b

In: images with labels that are not judged (`ProbeTraining`). Out: `LinearProbe`, a linear layer through which gradients
flow. Features are read after the last block and the last norm: CLS, the mean of the patches, and the vector that the
tower itself pools. The fit is scikit-learn's multinomial logistic regression in float64. C, the inverse weight of the
penalty, is raised until the loss on a fifth of the training images, on which the probe is not fitted, gets worse.

Source of the features and of the grid over C: the linear evaluations of DINOv2 and DINOv3.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from actcache import SettingsError
from actcache.models import VisionTower
from analysis.classifier.embeddings import last_output
from analysis.classifier.probe_training import ProbeTraining
from analysis.classifier.streams import BATCH_IMAGES, as_numpy, batches, read_stream
from analysis.results import JudgeFacts, ProbeFacts

VALIDATION_SHARE = 0.2
GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Values of C; on standardized features the best one lies between 1e-3 and 0.1 for 1,000 to 20,000 images."""
N_ITERATIONS = 1000
TOLERANCE = 1e-6
"""Largest element of the gradient of the mean loss at which a fit ends."""
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
    mean, deviation = rows[~judged].mean(0), rows[~judged].std(0)
    deviation = np.where(deviation > 1e-8, deviation, 1.0)  # a feature that is the same everywhere says nothing
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


@dataclass(frozen=True)
class Fit:
    """Logistic regression: weight [C, E], bias [C], C, and the accuracy on the images that it was not fitted on."""

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    c: float
    accuracy: float


def fit_logistic(rows: NDArray[np.float64], classes: NDArray[np.int64], judged: NDArray[np.bool_]) -> Fit:
    """Multinomial logistic regression with the last C of GRID that makes the loss on the judged rows smaller.

    Args:
        rows: [n, E]. classes: [n], 0..C-1, all of them among the rows that are fitted.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    best, smallest = None, np.inf
    # each fit starts where the last one ended, so it has to end where the loss is smallest, wherever it started
    model: Any = LogisticRegression(max_iter=N_ITERATIONS, warm_start=True, tol=TOLERANCE)
    for c in GRID:
        with warnings.catch_warnings():  # of separable classes the largest C need not converge
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.set_params(C=c).fit(rows[~judged], classes[~judged])
        weight, bias = model.coef_.copy(), model.intercept_.copy()
        if len(weight) == 1:  # of two classes it keeps one logit, the second minus the first
            weight, bias = np.concatenate([np.zeros_like(weight), weight]), np.array([0.0, bias[0]])
        logits = rows[judged] @ weight.T + bias
        top = logits.max(1, keepdims=True)
        wrong = np.log(np.exp(logits - top).sum(1)) + top[:, 0] - logits[np.arange(len(logits)), classes[judged]]
        if (loss := float(wrong.mean())) >= smallest:
            break  # a weaker penalty fits the noise, and its fit takes longest
        smallest = loss
        best = Fit(weight, bias, c, float((logits.argmax(1) == classes[judged]).mean()))
    assert best is not None
    return best


def choose_validation(classes: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """[n]: a fifth of each class at random, rounded down, but at least one image."""
    rng = np.random.Generator(np.random.Philox(seed))
    judged = np.zeros(len(classes), dtype=bool)
    order = rng.permutation(len(classes))
    for number in np.unique(classes):
        mine = order[classes[order] == number]
        judged[mine[: max(1, int(VALIDATION_SHARE * len(mine)))]] = True
    return judged
