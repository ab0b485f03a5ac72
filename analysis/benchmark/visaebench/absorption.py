"""M7 `absorption_rate`: how often one latent does not tell a class from its siblings, or a class looks like its group.

    F1 gap    F1 of a probe on the 4 best latents minus that on the best one, on the images that they were fitted on
    overlap   Jaccard index of the 10 latents with the largest mean c on the class and on its group

A class is absorbed if its gap is above 0.1 or its overlap above 0.5.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.benchmark.measured import Measured
from analysis.benchmark.visaebench.images import ProtocolImages
from analysis.benchmark.visaebench.pairs import Take, Totals
from analysis.benchmark.visaebench.probes import fit_probe, measure_f, rank

NAME = "absorption_rate"
LEAST_CLASSES, LEAST_GROUP, LEAST_CLASS = 3, 10, 3
N_MEAN, NARROW, WIDE = 10, 1, 4
LARGEST_GAP, LARGEST_OVERLAP = 0.1, 0.5


class Siblings:
    """The images of a group, and c of the latents that its tests ask for: `values` [n, k] float32.

    Attributes:
        classes: those of the group that occur, counted from 0. places: [n] numbers of their images, ascending.
        latents: [k], ascending.
    """

    def __init__(self, classes: list[int], places: NDArray[np.int64], latents: NDArray[np.int64]) -> None:
        self.classes, self.places, self.latents = classes, places, latents
        self.values = np.zeros((len(places), len(latents)), np.float32)

    def columns(self, latents: NDArray[np.int64]) -> NDArray[np.float32]:
        """[n, len(latents)] of some of its latents, in the order given."""
        return self.values[:, np.searchsorted(self.latents, latents)]

    def add(self, latent: NDArray[np.int64], place: NDArray[np.int64], c: NDArray[np.float32]) -> None:
        """Pairs of images of the group, with any latents."""
        column = np.searchsorted(self.latents, latent)
        wanted = self.latents[np.minimum(column, len(self.latents) - 1)] == latent
        self.values[np.searchsorted(self.places, place[wanted]), column[wanted]] = c[wanted]


class Test(NamedTuple):
    """A class against its siblings. `ranked`: the best latents. `y`: [n] which of the group's images are of it."""

    siblings: Siblings
    group: str
    depth: int
    number: int
    overlap: float
    ranked: NDArray[np.int64]
    y: NDArray[np.int64]


@dataclass(frozen=True)
class Outcome:
    group: str
    depth: int
    number: int
    overlap: float
    f1_narrow: float
    f1_wide: float

    @property
    def gap(self) -> float:
        return self.f1_wide - self.f1_narrow

    @property
    def absorbed(self) -> bool:
        return self.gap > LARGEST_GAP or self.overlap > LARGEST_OVERLAP


def choose_tests(
    totals: Totals, images: ProtocolImages, groups: Mapping[str, tuple[tuple[int, ...], int]]
) -> list[Test]:
    """The tests of all groups; the columns of their siblings are still to be read."""
    numbers, index = images.classes
    known = {int(number): place for place, number in enumerate(numbers)}
    tests = []
    for name, (given, depth) in groups.items():
        present = sorted({known[number] for number in given if number in known})
        n_group = int(totals.counts[present].sum())
        if len(given) < LEAST_CLASSES or n_group < LEAST_GROUP:
            continue
        sums, squares = totals.sums[present].sum(0), totals.squares[present].sum(0)
        of_group = _largest(sums / n_group)
        chosen = []
        for number in given:
            n = int(totals.counts[known[number]]) if number in known else 0
            if n < LEAST_CLASS or n_group - n < LEAST_CLASS:
                continue
            own = totals.sums[known[number]]
            of_class = _largest(own / n)
            f = measure_f(np.array([n_group - n, n]), np.stack([sums - own, own]), squares)
            chosen.append((number, len(of_class & of_group) / len(of_class | of_group), rank(f)[:WIDE]))
        if chosen:
            places = np.flatnonzero(np.isin(index, present))
            siblings = Siblings(present, places, np.unique(np.concatenate([ranked for *_, ranked in chosen])))
            tests += [
                Test(siblings, name, depth, number, overlap, ranked, (index[places] == known[number]).astype(np.int64))
                for number, overlap, ranked in chosen
            ]
    return tests


def make_taker(tests: list[Test], images: ProtocolImages) -> tuple[NDArray[np.int64], Take]:
    """What `read_pairs` fills the columns of all groups with."""
    groups = {id(test.siblings): test.siblings for test in tests}.values()
    latents = np.unique(np.concatenate([each.latents for each in groups]))
    numbers, index = images.classes

    def take(latent: NDArray[np.int64], place: NDArray[np.int64], c: NDArray[np.float32]) -> None:
        order = np.argsort(index[place], kind="stable")
        edges = np.searchsorted(index[place[order]], np.arange(len(numbers) + 1))
        for siblings in groups:
            mine = np.concatenate([order[edges[each] : edges[each + 1]] for each in siblings.classes])
            siblings.add(latent[mine], place[mine], c[mine])

    return latents, take


def _largest(means: NDArray[np.float64]) -> set[int]:
    return set(np.argsort(means)[-N_MEAN:].tolist())


def run_tests(tests: list[Test], on_progress: Callable[[int, int], None]) -> list[Outcome]:
    """Fit the probes. `on_progress`: called with (tests done, in all)."""
    outcomes = []
    for done, test in enumerate(tests, start=1):
        narrow, wide = (_fit_f1(test.siblings.columns(test.ranked[:k]), test.y) for k in (NARROW, WIDE))
        outcomes.append(Outcome(test.group, test.depth, test.number, test.overlap, narrow, wide))
        on_progress(done, len(tests))
    return outcomes


def _fit_f1(x: NDArray[np.float32], y: NDArray[np.int64]) -> float:
    said = fit_probe(x, y, 500).predict(x)
    right = int((said & y).sum())
    return 2 * right / int(said.sum() + y.sum()) if right else 0.0


def describe_absorption(outcomes: list[Outcome], n_groups: int) -> Measured:
    absorbed = np.array([each.absorbed for each in outcomes])
    depths: dict[str, object] = {}
    for depth in sorted({each.depth for each in outcomes}):
        of_depth = [each for each in outcomes if each.depth == depth]
        depths[str(depth)] = {
            "num_tests": len(of_depth),
            "absorption_rate": float(np.mean([each.absorbed for each in of_depth])),
        }
    facts: dict[str, object] = {
        "num_groups": n_groups, "num_tests": len(outcomes), "num_absorbed": int(absorbed.sum()),
        "mean_overlap": float(np.mean([each.overlap for each in outcomes])),
        "mean_f1_k1": float(np.mean([each.f1_narrow for each in outcomes])),
        "mean_f1_k4": float(np.mean([each.f1_wide for each in outcomes])),
        "mean_f1_gap": float(np.mean([each.gap for each in outcomes])), "depth_breakdown": depths,
    }  # fmt: skip
    return Measured(NAME, float(absorbed.mean()), None, False, facts)
