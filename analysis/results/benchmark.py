"""The result of benchmark: subjects and what was measured of them, their differences, and what was left out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import ClassVar, Literal

from analysis.results.result import Result, Row

BENCHMARK_TABLES = {
    "reconstruction": "Reconstruction", "labeled": "Concepts, with labels", "unlabeled": "Concepts, without labels",
    "reliability": "Reliability", "visaebench": "Compatibility: visaebench 0.1.0",
}  # fmt: skip
"""The tables of a benchmark, with their titles."""
KINDS = (" cls", " patch")
"""How the name of a measure ends that is taken over one kind of tokens only."""
UNTRAINED = "untrained "
"""How the name of an untrained SAE, or of a group of them, begins."""
FEW_IMAGES = 30
BenchmarkTable = Literal["reconstruction", "labeled", "unlabeled", "reliability", "visaebench"]


@dataclass(frozen=True)
class BenchmarkSubject:
    """A run, or a baseline (untrained, pca, raw or k-means).

    variant: that of its SAE; `matryoshka topk` and the like where dictionaries are nested.
    of: the run that an untrained SAE belongs to.

    group: what runs that differ in nothing but their seed have in common; None where there is no other such run.
    """

    name: str
    variant: str
    n_latents: int
    k: int | None
    seed: int | None
    baseline: str | None = None
    of: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class BenchmarkValue:
    """One measure of one subject, with its 95 % interval over images if it has one."""

    subject: str
    table: BenchmarkTable
    measure: str
    higher_is_better: bool
    value: float | None
    low: float | None = None
    high: float | None = None
    details: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchmarkDifference:
    """A paired difference, first minus second, with its 95 % interval over images.

    first, second: subjects, or groups of runs that differ only in their seed. Then it is the difference of the means
        over seeds, and the interval is over images and seeds.
    verdict: whether the first is better or worse; `no difference` where 0 lies inside the interval.
    """

    first: str
    second: str
    measure: str
    difference: float
    low: float
    high: float
    verdict: Literal["better", "worse", "no difference"]


@dataclass(frozen=True)
class BenchmarkSeeds:
    """A measure of runs that differ only in their seed: mean, and standard deviation over seeds (ddof 1)."""

    group: str
    measure: str
    mean: float
    spread: float
    n_seeds: int


@dataclass(frozen=True)
class BenchmarkSkipped:
    """What could not be measured of a subject, or of all of them (""), and why."""

    subject: str
    measure: str
    reason: str


@dataclass(frozen=True)
class RankPoint:
    """The fvu of PCA with the first `n_components` directions for all tokens, with its 95 % interval over images."""

    n_components: int
    fvu: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Benchmark(Result):
    """What runs and baselines are worth, by every measure that could be taken.

    Attributes:
        n_judged, n_choosing: images that are judged, and that baselines and probes are fitted on.
        n_resamples: bootstrap samples of the images, of which the 95 % intervals are made.
        subjects: what was measured: runs, and baselines.
        values: one for each subject and measure.
        differences: paired differences of two subjects, with intervals.
        seeds: mean and spread over runs that differ only in their seed.
        skipped: measures that were left out, and why.
        pca_curve: the fvu of principal components by their number.
    """

    KIND: ClassVar[str] = "benchmark"

    hook_point: str
    tokens: str
    n_judged: int
    n_choosing: int
    n_resamples: int
    subjects: tuple[BenchmarkSubject, ...]
    values: tuple[BenchmarkValue, ...]
    differences: tuple[BenchmarkDifference, ...] = ()
    seeds: tuple[BenchmarkSeeds, ...] = ()
    skipped: tuple[BenchmarkSkipped, ...] = ()
    pca_curve: tuple[RankPoint, ...] = ()

    def measures(self, table: str) -> list[str]:
        """The measures of a table, in their order."""
        return list(dict.fromkeys(value.measure for value in self.values if value.table == table))

    def find(self, subject: str, measure: str) -> BenchmarkValue | None:
        """A value, if it was measured."""
        found = (value for value in self.values if (value.subject, value.measure) == (subject, measure))
        return next(found, None)

    def labels(self) -> dict[str, str]:
        """Each subject, or group of runs that differ only in their seed, with what the tables call it."""
        names = list(dict.fromkeys(subject.group or subject.name for subject in self.subjects))
        short = [shorten(name) for name in names]
        return {name: label if short.count(label) == 1 else name for name, label in zip(names, short, strict=True)}

    def rows(self, table: str, *, by_tokens: bool = False, by_seeds: bool = False) -> list[Row]:
        """A row per subject, a column per measure; an arrow says which direction is better.

        Args:
            by_tokens: the measures of CLS alone and of the patches alone, in place of all others.
            by_seeds: one row for runs that differ only in their seed, with the mean and the spread over seeds.
        """
        names = [name for name in self.measures(table) if name.endswith(KINDS) == by_tokens]
        columns = {name: name + (" ↑" if self._rises(name) else " ↓") for name in names}
        over_seeds = {(each.group, each.measure): each for each in self.seeds}
        labels = self.labels()
        settings: dict[str, list[str]] = {}
        for subject in self.subjects:
            settings.setdefault(subject.group if by_seeds and subject.group else subject.name, []).append(subject.name)
        rows: list[Row] = []
        for setting, members in settings.items():
            cells = {
                column: show_seeds(over_seeds[setting, name]) if (setting, name) in over_seeds
                else show_mean([self.find(member, name) for member in members])
                for name, column in columns.items()
            }  # fmt: skip
            if any(cell is not None for cell in cells.values()):
                rows.append({"subject": labels.get(setting, setting), **cells})
        return rows

    def tables(self) -> list[list[Row]]:
        """The tables as far as they were measured, seeds together; then the differences."""
        shown = [
            self.rows(table, by_tokens=part, by_seeds=True) for table in BENCHMARK_TABLES for part in (False, True)
        ]
        return [rows for rows in (*shown, self.difference_rows()) if rows]

    def difference_rows(self) -> list[Row]:
        """A row per pair of subjects that is compared, a column per measure of all tokens."""
        pairs = list(dict.fromkeys((each.first, each.second) for each in self.differences))
        measures = list(dict.fromkeys(each.measure for each in self.differences if not each.measure.endswith(KINDS)))
        known = {(each.first, each.second, each.measure): each for each in self.differences}
        labels = self.labels()
        return [
            {"difference": f"{labels.get(first, first)} minus {labels.get(second, second)}",
             **{measure: show_difference(known.get((first, second, measure))) for measure in measures}}
            for first, second in pairs
        ]  # fmt: skip

    def seed_rows(self) -> list[Row]:
        """A row per group of runs that differ only in their seed."""
        measures = list(dict.fromkeys(each.measure for each in self.seeds if not each.measure.endswith(KINDS)))
        known = {(each.group, each.measure): each for each in self.seeds}
        rows: list[Row] = []
        for group in dict.fromkeys(each.group for each in self.seeds):
            found = [known.get((group, measure)) for measure in measures]
            n_seeds = max(each.n_seeds for each in found if each is not None)
            cells = {m: None if each is None else show_seeds(each) for m, each in zip(measures, found, strict=True)}
            rows.append({"over seeds": group, "seeds": n_seeds, **cells})
        return rows

    def notes(self) -> list[str]:
        """What the tables are about, what was left out, and what every result says of its images."""
        head = (
            f"judged on {self.n_judged:,} images ({self.tokens} tokens of {self.hook_point}); chosen and fitted on "
            f"{self.n_choosing:,} others; 95 % intervals from {self.n_resamples} resamples of the images"
        )
        few = [] if self.n_judged >= FEW_IMAGES else [f"{self.n_judged} images are too few for intervals to mean much"]
        about = [*self._seed_lines(), *self._pca_lines(), *self._task_lines()]
        about += [*self._embedding_lines(), *self._transfer_lines()]
        return [head, *few, *about, *skipped_lines(self.skipped), *super().notes()]

    def _seed_lines(self) -> list[str]:
        """Which runs stand together in a row."""
        if not self.seeds:
            return []
        return ["runs that differ only in their seed share a row, named with *: mean ± standard deviation over seeds"]

    def _pca_lines(self) -> list[str]:
        """What linear subspaces of fixed dimension leave out, beside which the fvu of an SAE is to be read."""
        points = ", ".join(f"{each.n_components:,}: {each.fvu:.4g}" for each in self.pca_curve)
        return [f"fvu of PCA by the number of components that all tokens share: {points}"] if points else []

    def _task_lines(self) -> list[str]:
        """What the judge achieves without an SAE, beside which its accuracy with one is to be read."""
        of_task = next((value.details for value in self.values if value.measure == "task accuracy"), {})
        accuracy = of_task.get("accuracy")
        if not isinstance(accuracy, Mapping):
            return []
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in accuracy.items())
        return [f"task accuracy without an SAE, on {of_task.get('n_images')} labeled images: {numbers}"]

    def _transfer_lines(self) -> list[str]:
        """The second data set, and how many of its images are judged."""
        there = next((value.details for value in self.values if value.measure == "transfer fvu"), None)
        if there is None:
            return []
        return [
            f"transfer is judged on {there.get('n_judged'):,} images of {there.get('store')}; probes there are fitted "
            f"on {there.get('n_choosing'):,} others"
        ]

    def _embedding_lines(self) -> list[str]:
        """By which model monosemanticity was judged, and what it would be for images at random."""
        ours = [value for value in self.values if value.table == "unlabeled"]  # visaebench has one of that name, too
        chance = {value.measure: value.details for value in ours if value.measure.startswith("monosemanticity")}
        if not chance:
            return []
        facts = next(iter(chance.values()))
        own = ", the runs' own model, which judges itself" if facts.get("own_model") else ""
        numbers = ", ".join(f"{name} {details.get('chance'):.3g}" for name, details in chance.items())
        return [
            f"images are alike by the embeddings of {facts.get('embeddings')}{own}; two images at random: {numbers}"
        ]

    def _rises(self, measure: str) -> bool:
        return next(value.higher_is_better for value in self.values if value.measure == measure)


def show_value(value: BenchmarkValue | None) -> str | None:
    """0.1072 (0.1051-0.1094)."""
    if value is None or value.value is None:
        return None
    if value.low is None or value.high is None:
        return f"{value.value:.4g}"
    return f"{value.value:.4g} ({value.low:.4g} to {value.high:.4g})"


def show_seeds(each: BenchmarkSeeds) -> str:
    """0.1072 ± 0.0011: mean and standard deviation over seeds."""
    return f"{each.mean:.4g} ± {each.spread:.2g}"


def shorten(group: str) -> str:
    """What the names of a group of runs have in common: k16-seed* of "k16-seed0, k16-seed1". Other names stay."""
    if group.startswith(UNTRAINED):
        return UNTRAINED + shorten(group.removeprefix(UNTRAINED))
    names = group.split(", ")
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    start = "".join(letters[0] for letters in same).rstrip("0123456789")
    return f"{start}*" if len(names) > 1 and start else group


def show_mean(values: Sequence[BenchmarkValue | None]) -> str | None:
    """One value with its interval, or the mean of several without, as of pairs of seeds, whose spread says nothing."""
    if len(values) == 1:
        return show_value(values[0])
    known = [each.value for each in values if each is not None and each.value is not None]
    return f"{sum(known) / len(known):.4g}" if known else None


def show_difference(difference: BenchmarkDifference | None) -> str | None:
    """+0.012 (+0.010 to +0.014), or no difference."""
    if difference is None:
        return None
    if difference.verdict == "no difference":
        return "no difference"
    return f"{difference.difference:+.3g} ({difference.low:+.3g} to {difference.high:+.3g})"


def skipped_lines(skipped: Sequence[BenchmarkSkipped]) -> list[str]:
    """One line for each reason, with the measures that it stands for."""
    measures: dict[str, list[str]] = {}
    for each in skipped:
        measures.setdefault(each.reason, []).append(
            f"{each.measure} of {each.subject}" if each.subject else each.measure
        )
    return [f"without {', '.join(dict.fromkeys(names))}: {reason.rstrip('.')}" for reason, names in measures.items()]
