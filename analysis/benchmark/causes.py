"""What causal use is measured on, the same for all subjects: classes, images, the class means, and chosen latents.

Classes are those that the judge predicts most often among the judged images. Latents are chosen on choosing images of
each class, by attribution (the sum over tokens of z dy/dz, y for the class; analysis/interventions/attribution.py), and
beside each stands a random latent that fires on about as many tokens of these images.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from actcache.models import precise_dtype
from analysis.benchmark.measured import Skipped
from analysis.benchmark.subject import Judged
from analysis.benchmark.task import Task
from analysis.classifier import Classifier, as_numpy, batches, choose_tokens, label_names, sample_images
from analysis.interventions import Study, attribute, match_frequency
from saetrain import Run

NAME = "causal use"
N_CLASSES = 16
N_IMAGES = 128
"""Judged images whose latents are deleted and inserted, at most."""
N_STEERED = 32
"""Those of them that are steered: each toward up to 15 other classes."""
N_CHOOSING = 256
"""Choosing images of all classes together, on which latents are chosen and class means taken, at most."""
LEAST = 2
"""Choosing images that a class needs."""
STRENGTH = 2.0
"""How far the stream is moved, in lengths of the DiffMean direction: the difference of the class from the others.

On CIFAR-10 (block 4 of 6) DiffMean then adds 0.05 to p(class) and random latents -0.01: enough to tell them apart, and
far from 1, where directions would no longer differ.
"""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Causes:
    """Shapes: I judged images, S steered ones, N choosing ones, C classes.

    Attributes:
        tokens: the kind of tokens that are edited.
        classes: [C] numbers of the classes among those of the judge.
        images: [I] stored positions; `targets`: [I] place in `classes` of what the judge predicts for each.
        steered: [S] stored positions; `own`: [S] place of their label in `classes`, -1 for another class.
        choosing: [N] stored positions; `labels`: [N] place of their class in `classes`.
        diff_mean: [C, D] mean token of the class minus the mean over the other classes of their mean tokens.
        by_diff_mean: [S, C] change of the probability of each class when moved along `diff_mean`, see `steer`.
    """

    task: Task
    tokens: str
    classes: NDArray[np.int64]
    images: NDArray[np.int64]
    targets: NDArray[np.int64]
    steered: NDArray[np.int64]
    own: NDArray[np.int64]
    choosing: NDArray[np.int64]
    labels: NDArray[np.int64]
    diff_mean: Tensor
    by_diff_mean: Array

    @property
    def facts(self) -> dict[str, object]:
        """What a result says of the images and classes."""
        names = self.task.classifier.names
        return {
            "n_judged": len(self.images), "n_steered": len(self.steered), "n_choosing": len(self.choosing),
            "classes": [names[number] for number in self.classes],
        }  # fmt: skip


@torch.no_grad()
def open_causes(
    task: Task | Skipped, judged: Judged, run: Run, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Causes | Skipped:
    """Choose classes and images, and measure the DiffMean direction, to which every subject is compared.

    Args:
        run: one of the runs; all read the same tokens.
        on_progress: called with (images steered, in all).

    Returns:
        Why there is nothing to measure: that there is no task, or fewer than two classes to tell apart.
    """
    if isinstance(task, Skipped):
        return Skipped(NAME, task.reason)
    classifier, seed = task.classifier, judged.seed
    tokens = choose_tokens(run, judged.store.layout, task.config.tokens)
    number = {name: i for i, name in enumerate(classifier.names)}
    names = label_names(judged.store)[judged.choosing]
    of_choosing = np.array([number.get(name, -1) for name in names], dtype=np.int64)
    n_choosing = np.bincount(of_choosing[of_choosing >= 0], minlength=len(number))
    predicted = task.references["original"].predicted
    often = np.bincount(predicted, minlength=len(number)) * (n_choosing >= LEAST)
    classes = np.sort(np.argsort(-often, kind="stable")[: min(N_CLASSES, int((often > 0).sum()))])
    if len(classes) < 2:
        return Skipped(
            NAME,
            f"of the classes that the judge predicts, {len(classes)} has {LEAST} choosing images, and two are needed; "
            "give more images of each class",
        )
    place = np.full(len(number), -1)
    place[classes] = np.arange(len(classes))
    images = sample_images(classifier.images[place[predicted] >= 0], N_IMAGES, seed)
    steered = sample_images(images, N_STEERED, seed)
    each = max(LEAST, N_CHOOSING // len(classes))
    choosing = np.sort(np.concatenate([sample_images(judged.choosing[of_choosing == c], each, seed) for c in classes]))
    labels = place[of_choosing[np.searchsorted(judged.choosing, choosing)]]
    means = _mean_tokens(classifier, tokens, choosing, labels, len(classes), task.batch_size)
    diff_mean = (means - (means.sum(0) - means) / (len(classes) - 1)).float()
    causes = Causes(
        task, tokens, classes, images, place[predicted[np.searchsorted(classifier.images, images)]],
        steered, place[classifier.labels[steered]], choosing, labels, diff_mean, np.empty((0, len(classes))),
    )  # fmt: skip
    return replace(causes, by_diff_mean=steer(causes, diff_mean, on_progress))


def _mean_tokens(
    classifier: Classifier, tokens: str, images: NDArray[np.int64], labels: NDArray[np.int64], n_classes: int,
    batch_size: int,
) -> Tensor:  # fmt: skip
    """[C, D] float64: the mean of the tokens that are edited, over the images of each class."""
    part, dtype = places_of(classifier, tokens), precise_dtype(classifier.vision.device)
    means = torch.cat([classifier.read(some)[:, part].to(dtype).mean(1) for some in batches(images, batch_size)])
    return torch.stack([means[torch.from_numpy(labels == c).to(means.device)].mean(0) for c in range(n_classes)])


def places_of(classifier: Classifier, tokens: str) -> Tensor:
    """The places in the stream of the tokens that are edited."""
    slices = classifier.store.layout.token_places(tokens)
    return torch.cat([torch.arange(each.start, each.stop) for each in slices]).to(classifier.vision.device)


@torch.no_grad()
def steer(
    causes: Causes, directions: Tensor, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Array:
    """[S, C]: by how much the probability of a class changes when every token is moved along the class's direction.

    NaN for images of the class itself. Each direction is brought to STRENGTH times the length of the class's DiffMean;
    one of length 0 changes nothing.

    Args:
        directions: [C, D].
    """
    classifier, part = causes.task.classifier, places_of(causes.task.classifier, causes.tokens)
    lengths = STRENGTH * causes.diff_mean.norm(dim=1, keepdim=True)
    moves = F.normalize(directions.float()).to(part.device) * lengths
    shifts = []
    for images in batches(causes.steered, causes.task.batch_size, on_progress):
        x = classifier.read(images)
        own = causes.own[np.searchsorted(causes.steered, images)]
        before = as_numpy(classifier.logits(x).cpu().double().softmax(1))
        shift = np.full((len(images), len(causes.classes)), np.nan)
        for c, number in enumerate(causes.classes.tolist()):
            if (others := np.flatnonzero(own != c)).size:
                moved = x[torch.from_numpy(others).to(x.device)]  # a copy
                moved[:, part] += moves[c]
                after = as_numpy(classifier.logits(moved).cpu().double().softmax(1))
                shift[others, c] = after[:, number] - before[others, number]
        shifts.append(shift)
    return np.concatenate(shifts)


@dataclass(frozen=True)
class ChosenLatents:
    """Latents of each class, the strongest attribution first, and random ones in their places; -1 behind the last.

    Attributes:
        chosen, random: [C, k]. frequency: [F] tokens of the choosing images on which a latent fires.
    """

    chosen: NDArray[np.int64]
    random: NDArray[np.int64]
    frequency: NDArray[np.int64]


@torch.no_grad()
def choose_latents(study: Study, causes: Causes, k: int) -> ChosenLatents | Skipped:
    """At most k latents of each class that speak for it on the choosing images.

    No list is longer than half of the latents that fire, so that there are as many others to draw from.
    """
    n_latents, n_classes = study.sae.config.n_latents, len(causes.classes)
    device = study.classifier.vision.device
    sums = torch.zeros(n_classes * n_latents, dtype=precise_dtype(device), device=device)
    frequency = np.zeros(n_latents, dtype=np.int64)
    for images, spliced in study.batches(causes.choosing):
        labels = causes.labels[np.searchsorted(causes.choosing, images)]
        targets = torch.from_numpy(causes.classes[labels]).to(sums.device)
        place = torch.from_numpy(labels).to(sums.device)[spliced.images] * n_latents + spliced.latents
        sums.index_add_(0, place, attribute(study.classifier, spliced, targets).to(sums.dtype))
        frequency += np.bincount(as_numpy(spliced.latents), minlength=n_latents)
    table = as_numpy(sums).reshape(n_classes, n_latents)
    order = np.argsort(-table, axis=1, kind="stable")[:, : min(k, int((frequency > 0).sum()) // 2)]
    chosen = np.where(np.take_along_axis(table, order, 1) > 0, order, -1)
    drawn = match_frequency(chosen, frequency, rng=np.random.Generator(np.random.Philox(study.config.seed)))
    if drawn is None or not (chosen >= 0).any():
        return Skipped(NAME, "too few latents fire on the choosing images to draw random ones beside the chosen")
    random = np.full_like(chosen, -1)
    for row, mine, others in zip(random, chosen, drawn, strict=True):  # the draws ascend in frequency
        there = mine >= 0
        by_frequency = np.argsort(frequency[mine[there]], kind="stable")
        row[by_frequency] = others[there]
    return ChosenLatents(chosen, random, frequency)
