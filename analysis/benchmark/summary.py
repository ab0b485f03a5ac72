"""What is made of measured numbers: which runs differ only in their seed, paired differences, and what is left out."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from analysis.benchmark.measured import Measured
from analysis.benchmark.resamples import Resamples, average, compare
from analysis.benchmark.subject import Subject
from analysis.benchmark.work import key_without_seed
from analysis.results import BenchmarkDifference, BenchmarkSeeds, BenchmarkSkipped, BenchmarkSubject


def describe_subjects(subjects: Sequence[Subject]) -> tuple[BenchmarkSubject, ...]:
    """What the result says of each, with the group of runs that differ only in their seed."""
    alike: dict[object, list[Subject]] = {}
    for subject in subjects:
        if subject.baseline is None:
            alike.setdefault(key_without_seed(subject.run), []).append(subject)
    groups = {each.name: ", ".join(m.name for m in members)
              for members in alike.values() if len(members) > 1 for each in members}  # fmt: skip
    described = []
    for subject in subjects:
        config, group = subject.run.sae_config, groups.get(subject.of or subject.name)
        described.append(
            BenchmarkSubject(
                subject.name, f"matryoshka {config.variant}" if config.prefixes else config.variant, config.n_latents,
                config.k if config.top_k else None, subject.run.train_config.seed, subject.baseline, subject.of,
                f"untrained {group}" if group and subject.baseline else group,
            )
        )  # fmt: skip
    return tuple(described)


def compare_subjects(
    subjects: Sequence[Subject],
    described: Sequence[BenchmarkSubject],
    known: Mapping[tuple[str, str], Measured],
    n_active: Mapping[str, int],
    resamples: Resamples,
) -> list[BenchmarkDifference]:
    """The paired differences of every two settings, and of every setting to its baselines.

    A setting is a run, or the mean over runs that differ only in their seed. Its baselines are its own untrained SAEs,
    k-means, and PCA and raw dimensions with as many active latents.

    Args:
        n_active: that number for each run, by name.
    """
    settings: dict[str, list[Subject]] = {}
    for subject, facts in zip(subjects, described, strict=True):
        settings.setdefault(facts.group or facts.name, []).append(subject)
    measures = list(dict.fromkeys(name for _, name in known))
    means: dict[tuple[str, str], Measured] = {}
    for setting, members in settings.items():
        for name in measures:
            found = [known[member.name, name] for member in members if (member.name, name) in known]
            if len(found) == len(members) and (mean := average(found, resamples)) is not None:
                means[setting, name] = mean
    runs = [setting for setting, members in settings.items() if members[0].baseline is None]

    def belongs(setting: str, other: Subject) -> bool:
        names = [member.name for member in settings[setting]]
        if other.baseline == "untrained":
            return other.of in names
        return other.baseline == "k-means" or (
            other.baseline in ("pca", "raw") and other.run.sae_config.k == n_active[names[0]]
        )

    beside = [(run, other) for run in runs for other, members in settings.items() if belongs(run, members[0])]
    differences = []
    for first, second in (*combinations(runs, 2), *beside):
        for name in measures:
            a, b = means.get((first, name)), means.get((second, name))
            if a is not None and b is not None and (compared := compare(a, b)) is not None:
                differences.append(BenchmarkDifference(first, second, name, *compared))  # type: ignore[arg-type]
    return differences


def gather_seeds(subjects: Sequence[BenchmarkSubject], known: dict[tuple[str, str], Measured]) -> list[BenchmarkSeeds]:
    """Mean and standard deviation (ddof 1) over the seeds of each group.

    A measure that compares a run with the others of its group (it has `partners`) is left out: its values share pairs.
    """
    gathered = []
    for group in dict.fromkeys(subject.group for subject in subjects if subject.group is not None):
        members = [subject.name for subject in subjects if subject.group == group]
        for measure in dict.fromkeys(name for _, name in known):
            found = [known[name, measure] for name in members if (name, measure) in known]
            numbers = [each.value for each in found if each.value is not None and "partners" not in each.details]
            if len(numbers) > 1:
                mean, spread = float(np.mean(numbers)), float(np.std(numbers, ddof=1))
                gathered.append(BenchmarkSeeds(group, measure, mean, spread, len(numbers)))
    return gathered


def merge_skipped(skipped: Sequence[BenchmarkSkipped], n_subjects: int) -> list[BenchmarkSkipped]:
    """What is missing of all subjects for the same reason is said once."""
    counts: dict[tuple[str, str], int] = {}
    for each in skipped:
        counts[each.measure, each.reason] = counts.get((each.measure, each.reason), 0) + 1
    merged = [
        BenchmarkSkipped(
            "" if counts[each.measure, each.reason] == n_subjects else each.subject, each.measure, each.reason
        )
        for each in skipped
    ]
    return list(dict.fromkeys(merged))
