"""Measure 10, causal use: what the judge says when the latents that were chosen for a class are taken away or put in.

    deletion area           under p against the number of deleted latents, the error term kept; low if they are used
    deletion below random   the same with random latents that fire as often, minus it
    insertion area          under p when only the latents are kept, without the error term; high if they suffice
    insertion above random  it, minus the same with random latents that fire as often
    steering                change of p(class) on images of other classes, when every token is moved along the decoder
                            row of the class's first latent
    steering above random   it, minus that of a random latent that fires as often
    steering above diffmean it, minus that of DiffMean, the class's mean token minus that of the other classes

p is the probability of what the judge predicts for the unedited image, by softmax. The number of latents is counted on
a log scale, log(1 + n), and the area divided by its length. A list has the latents with the largest attribution for the
class on the choosing images, the same for all images of the class (causes.py). All moves have the same length, so that
they are compared at equal strength: between subjects, with random latents and with DiffMean.

Source: Petsiuk et al. 2018 (arXiv 1806.07421) for both areas; Dreyer et al. 2025 (arXiv 2505.20229) for latents.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache.models import precise_dtype
from analysis.benchmark.causes import STRENGTH, Causes, ChosenLatents, choose_latents, steer
from analysis.benchmark.measured import Measured, Skipped
from analysis.benchmark.subject import Judged, Subject
from analysis.benchmark.task import study_of
from analysis.classifier import as_numpy
from analysis.interventions import Study

GRID = (1, 4, 16, 64, 256)
"""Numbers of latents, besides none. Where a list is shorter, all of it stands for the rest."""

Array = NDArray[np.float64]


def measure_causal_use(
    subject: Subject,
    judged: Judged,
    causes: Causes | Skipped,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Measured | Skipped]:
    """The seven numbers of a subject.

    Args:
        causes: from `open_causes`, the same for all subjects.
        on_progress: called with (images done, in all).
    """
    if isinstance(causes, Skipped):
        return [causes]
    study = study_of(causes.task, subject.run)
    lists = choose_latents(study, causes, max(GRID))
    if isinstance(lists, Skipped):
        return [lists]
    areas = measure_areas(study, causes, lists, on_progress)
    rows = study.sae.decoder.detach()
    shifts = [steer(causes, _directions(rows, of[:, 0])) for of in (lists.chosen, lists.random)]
    return describe_causes(judged, causes, lists, areas, *shifts)


def _directions(decoder: Tensor, latents: NDArray[np.int64]) -> Tensor:
    """[C, D]: the decoder row of each class's latent; zeros for a class without one."""
    rows = decoder[torch.from_numpy(latents.clip(min=0)).to(decoder.device)]
    return rows * torch.from_numpy(latents >= 0).to(rows)[:, None]


@torch.no_grad()
def measure_areas(
    study: Study, causes: Causes, lists: ChosenLatents,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Array:  # fmt: skip
    """[I, 2, 2]: deletion and insertion, each with the chosen latents and with the random ones."""
    classifier, device = study.classifier, study.classifier.vision.device
    tables = [[_table(of[:, :n], study.sae.config.n_latents).to(device) for n in GRID]
              for of in (lists.chosen, lists.random)]  # fmt: skip
    parts = []
    for images, spliced in study.batches(causes.images, on_progress):
        place = causes.targets[np.searchsorted(causes.images, images)]
        target = torch.from_numpy(causes.classes[place]).to(device)[:, None]
        row = torch.from_numpy(place).to(device)

        def read(x: Tensor, target: Tensor = target) -> Array:
            return as_numpy(classifier.logits(x).to(precise_dtype(device)).softmax(1).gather(1, target)[:, 0])

        p = np.empty((len(images), 2, 2, 1 + len(GRID)))
        p[:, 0, :, 0] = read(spliced.x)[:, None]
        p[:, 1, :, 0] = read(spliced.stream(spliced.nothing + torch.zeros_like(spliced.old)))[:, None]
        for which, of_grid in enumerate(tables):
            for i, table in enumerate(of_grid, start=1):
                kept = spliced.keep(table[row])
                p[:, 0, which, i] = read(spliced.stream(spliced.drop(kept) + spliced.error))
                p[:, 1, which, i] = read(spliced.stream(kept))
        parts.append(p)
    x = np.log1p(np.array([0, *GRID]))
    return np.asarray(np.trapezoid(np.concatenate(parts), x, axis=3) / x[-1])


def _table(lists: NDArray[np.int64], n_latents: int) -> Tensor:
    """[C, F]: true for the latents of each class's list."""
    table = np.zeros((len(lists), n_latents + 1), dtype=bool)  # one extra column takes the -1
    np.put_along_axis(table, lists, True, axis=1)
    return torch.from_numpy(table[:, :n_latents])


def describe_causes(
    judged: Judged, causes: Causes, lists: ChosenLatents, areas: Array, chosen: Array, random: Array
) -> list[Measured | Skipped]:
    """The numbers, with replicates over images, from areas [I, 2, 2] and shifts [S, C]."""
    deleted, inserted = areas[:, 0], areas[:, 1]
    columns = np.stack(
        [deleted[:, 0], deleted[:, 1] - deleted[:, 0], inserted[:, 0], inserted[:, 0] - inserted[:, 1]], axis=1
    )
    values, replicates = judged.resamples.means(columns, np.searchsorted(judged.images, causes.images))
    steered = np.stack(
        [np.nanmean(each, axis=1) for each in (chosen, chosen - random, chosen - causes.by_diff_mean)], 1
    )
    moved, moved_again = judged.resamples.means(steered, np.searchsorted(judged.images, causes.steered))
    n_latents = (lists.chosen >= 0).sum(1)
    facts: dict[str, object] = {**causes.facts, "n_latents": n_latents.tolist(), "grid": [0, *GRID]}
    used = lists.chosen[:, 0]
    of_steering: dict[str, object] = {
        **causes.facts, "latents": used.tolist(), "random": lists.random[:, 0].tolist(), "strength": STRENGTH,
        "length": causes.diff_mean.norm(dim=1).mul(STRENGTH).tolist(),
        "diffmean": float(np.nanmean(causes.by_diff_mean, axis=1).mean()),
    }  # fmt: skip
    names = ("deletion area", "deletion below random", "insertion area", "insertion above random")
    found: list[Measured | Skipped] = [
        Measured(name, float(values[i]), replicates[:, i], i > 0, facts) for i, name in enumerate(names)
    ]
    for i, name in enumerate(("steering", "steering above random", "steering above diffmean")):
        found.append(Measured(name, float(moved[i]), moved_again[:, i], True, of_steering))
    return found
