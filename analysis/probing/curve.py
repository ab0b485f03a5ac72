"""The k-sparse curve: probes on the k best latents, on random ones that fire as often, and with shuffled labels.

All of them are judged on the same images, so their differences have paired intervals.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache import SettingsError
from actcache.progress import Progress
from analysis.intervals import LEVELS, resample_means
from analysis.interventions import match_frequency
from analysis.probing.fitting import Probed, Task
from analysis.probing.scores import Ranked, rank_latents, read_columns
from saetrain import CodeStore

Condition = tuple[str, int]
"""(selection, k); ("raw", 0) is the probe on raw activations."""


@dataclass(frozen=True)
class Curve:
    """What was measured.

    Attributes:
        outcomes: [m] of each condition, the mean over its draws. weights: those of the chosen latents, by k.
        latents: the chosen latents, best first.
    """

    ranked: Ranked
    latents: NDArray[np.int64]
    outcomes: Mapping[Condition, NDArray[np.float64]]
    weights: Mapping[int, NDArray[np.float64]]


def measure_curve(
    codes: CodeStore, task: Task, grid: tuple[int, ...], *, score: str, n_random: int, n_shuffled: int, seed: int,
    on_progress: Progress | None = None,
) -> Curve:  # fmt: skip
    """Choose latents, fit probes on them, and judge these. Two passes over the codes.

    Args:
        n_random, n_shuffled: draws of random latents, and of shuffled labels.
        grid: k; cut to the latents that fire on the images that are fitted.
        on_progress: called with (tasks done, tasks in all) of each pass, and then of the probes.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    tasks = [task, *(task.shuffle(rng) for _ in range(n_shuffled))]
    n_classes = None if task.split.names is None else len(task.split.names)
    targets = [each.targets[~task.held_out] for each in tasks]
    ranked = rank_latents(codes, task.fitted, targets, n_classes, score, on_progress)
    if not ranked.n_images.any():
        raise SettingsError(
            f"No latent of {codes.path} fires on the images that are fitted. Give codes of other images."
        )
    grid = cut_grid(grid, int((ranked.n_images > 0).sum()))
    lists: dict[Condition, list[tuple[Task, NDArray[np.int64]]]] = {}
    for k in grid:
        chosen = ranked.best(0, k)
        lists["chosen", k] = [(task, chosen)]
        for _ in range(n_random):
            drawn = match_frequency(chosen[None], ranked.n_images, rng=rng)
            if drawn is not None:  # there are enough others that fire
                lists.setdefault(("random", k), []).append((task, drawn[0]))
        if n_shuffled:
            lists["shuffled", k] = [(tasks[i], ranked.best(i, k)) for i in range(1, len(tasks))]
    wanted = np.unique(np.concatenate([latents for pairs in lists.values() for _, latents in pairs]))
    columns = read_columns(codes, wanted, score, on_progress)
    outcomes: dict[Condition, NDArray[np.float64]] = {}
    weights: dict[int, NDArray[np.float64]] = {}
    n_done, n_probes = 0, sum(map(len, lists.values()))
    for (selection, k), pairs in lists.items():
        probed: list[Probed] = []
        for each, latents in pairs:
            probed.append(each.probe(partial(columns.dense, latents)))
            n_done += 1
            if on_progress:
                on_progress(n_done, n_probes)
        outcomes[selection, k] = np.mean([each.outcomes for each in probed], axis=0)
        if selection == "chosen":
            weights[k] = probed[0].weights
    return Curve(ranked, ranked.best(0, max(grid)), outcomes, weights)


def cut_grid(grid: tuple[int, ...], n_firing: int) -> tuple[int, ...]:
    """The numbers of latents, ascending, none above the number of latents that fire."""
    return tuple(sorted({min(k, n_firing) for k in grid}))


Resample = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Numbers of the judged images [m, M] -> [1 + resamples, M]: their means, then those on each resample of the images."""


def resample_images(values: NDArray[np.float64], *, seed: int) -> NDArray[np.float64]:
    """A `Resample` of 1,000 resamples."""
    return np.concatenate([values.mean(0)[None], resample_means([values], [np.arange(len(values))], seed=seed)])


class Scores:
    """Accuracy, or R^2, of each condition and of its resamples."""

    def __init__(
        self, outcomes: Mapping[Condition, NDArray[np.float64]], truth: NDArray[Any] | None, resample: Resample
    ):
        """truth: [m] the numbers; None for classes."""
        self.conditions = list(outcomes)
        values = np.stack([outcomes[each] for each in self.conditions], axis=1)
        if truth is not None:
            centered = truth - truth.mean()
            values = np.column_stack([values, centered, centered**2])
        means = resample(values)
        n = len(self.conditions)
        self.table = means[:, :n]  # [1 + resamples, conditions]
        if truth is not None:
            variance = means[:, n + 1] - means[:, n] ** 2
            with np.errstate(divide="ignore", invalid="ignore"):  # a resample of one image has no variance
                self.table = np.where(variance[:, None] > 0, 1 - self.table / variance[:, None], np.nan)

    def of(self, condition: Condition) -> NDArray[np.float64]:
        """[1 + resamples]: the score, then those of the resamples."""
        return np.asarray(self.table[:, self.conditions.index(condition)])

    def mean(self, selection: str) -> NDArray[np.float64] | None:
        """The mean of a curve over log k, by the trapezoid rule; None where a k is missing in it."""
        every = sorted({k for name, k in self.conditions if name == "chosen"})
        if any((selection, k) not in self.conditions for k in every):
            return None
        points = np.stack([self.of((selection, k)) for k in every], axis=1)
        if len(every) == 1:
            return np.asarray(points[:, 0])
        steps = np.diff(np.log(every))
        return np.asarray(((points[:, 1:] + points[:, :-1]) / 2 * steps).sum(1) / steps.sum())


def sum_up(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """(score, low, high) of [1 + resamples]: a 95 % interval over images."""
    known = values[1:][np.isfinite(values[1:])]
    low, high = np.percentile(known, LEVELS) if len(known) else (np.nan, np.nan)
    return float(values[0]), float(low), float(high)


def judge_difference(low: float, high: float) -> str:
    return "higher" if low > 0 else "lower" if high < 0 else "no difference"
