"""benchmark_runs(): what runs are worth, beside baselines, on the same images, with intervals.

In: runs of one hook point, and a store of their model. Out: a result with four tables, the paired differences between
runs and to each baseline, and what runs that differ only in their seed have in common. Whatever cannot be measured is
left out with the reason. Baselines and codes are kept in the work folder beside the result (work.py).
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from actcache import SettingsError, open_stores
from actcache.models import read_templates
from actcache.store import StoreGroup, Stores
from analysis.benchmark.attributes import read_attributes
from analysis.benchmark.causal_use import measure_causal_use
from analysis.benchmark.causes import open_causes
from analysis.benchmark.coherence import measure_coherence
from analysis.benchmark.image_embeddings import embed_judged
from analysis.benchmark.image_pairs import ImagePairs, read_pairs
from analysis.benchmark.inputs import describe_inputs
from analysis.benchmark.judging import choose_judged
from analysis.benchmark.matching import NAME as MATCHING
from analysis.benchmark.matching import Matching, measure_matching
from analysis.benchmark.measured import Measured, Skipped
from analysis.benchmark.monosemanticity import measure_monosemanticity
from analysis.benchmark.patch_concepts import NAME as PATCH_CONCEPTS
from analysis.benchmark.patch_concepts import measure_patch_concepts
from analysis.benchmark.patch_labels import read_patch_labels
from analysis.benchmark.patch_probe import fit_patch_probe
from analysis.benchmark.pca_curve import measure_pca_curve
from analysis.benchmark.reconstruction import measure_reconstruction
from analysis.benchmark.resamples import Resamples, average, compare, interval
from analysis.benchmark.sparse_probing import measure_sparse_probing
from analysis.benchmark.stability import Stability, find_partners
from analysis.benchmark.subject import Subject
from analysis.benchmark.task import Task, measure_task, open_task
from analysis.benchmark.transfer import Transfer, measure_transfer, name_transfer, open_transfer
from analysis.benchmark.work import (
    Report,
    Workshop,
    check_codes,
    key_without_seed,
    name_work_folder,
    no_report,
)
from analysis.classifier import describe_config
from analysis.config import BenchmarkConfig, ModelOptions, StudyConfig
from analysis.lineage import find_runs, name_parents, open_same_images
from analysis.results import (
    Benchmark,
    BenchmarkDifference,
    BenchmarkSeeds,
    BenchmarkSkipped,
    BenchmarkSubject,
    BenchmarkTable,
    BenchmarkValue,
    describe_result,
    find_result,
    finish_result,
)
from saetrain import CodeStore, Run


class Measure(NamedTuple):
    """A measure that is taken of every subject, and the table in which it stands. `what`: its name in the progress."""

    table: BenchmarkTable
    what: str
    take: Callable[[Subject, Callable[[int, int], None]], list[Measured | Skipped]]


def benchmark_runs(
    runs: Run | str | Path | Sequence[Run | str | Path],
    store: Stores | StoreGroup,
    out: str | Path,
    config: BenchmarkConfig = BenchmarkConfig(),
    *,
    codes: Sequence[CodeStore | str | Path] = (),
    study: StudyConfig = StudyConfig(),
    model: ModelOptions = ModelOptions(),
    overwrite: bool = False,
    on_step: Report = no_report,
) -> Benchmark:
    """Measure runs and baselines.

    Args:
        runs: one or several runs, or folders of runs, that read the same hook point and kind of tokens.
        store: a store of their model. Images that a run has learned from are not judged.
        out: the JSON file of the result; the same call again returns what it holds. Baselines and codes are kept in a
            folder of the same name with the suffix .work, which is no longer needed once the result is there.
        config: what else there is to measure with; without masks or pairs, what needs them is left out.
        codes: codes of the runs on the store, which are otherwise made.
        on_step: called with (what, done, total).

    Raises:
        SettingsError: runs of different hook points or tokens, codes of another run, no image is left to judge, a file
            of the configuration that cannot be read.
        ParentMismatchError: a store of another model, or embeddings of other images.
    """
    listed = [runs] if isinstance(runs, Run | str | Path) else list(runs)
    opened, group = [run for item in listed for run in find_runs(item)], open_stores(store)
    made = [each if isinstance(each, CodeStore) else CodeStore.open(each) for each in codes]
    names = name_runs(opened)
    check_runs(opened, group)
    read_templates(study.templates)
    second = None if config.transfer is None else open_stores(config.transfer)
    other = None if config.embeddings is None else open_same_images(group, config.embeddings, flag="--embeddings")
    parents = name_parents(opened, group) | name_transfer(second)
    parents |= {} if other is None else {"embeddings": other.stores[0].artifact}
    head = describe_result(Benchmark, describe_config(study) | describe_inputs(config), parents)
    if (earlier := find_result(Benchmark, out, head, overwrite=overwrite)) is not None:
        return earlier
    pairs = None if config.pairs is None else read_pairs(config.pairs, group)
    judged, counted = choose_judged(opened, group, study, pairs if isinstance(pairs, ImagePairs) else None)
    check_codes(made, opened, judged)
    work = name_work_folder(out)
    if work.exists() and not work.is_dir():
        raise SettingsError(f"{work} is a file, where the baselines are to be kept. Choose another OUT.")
    shop = Workshop(work, judged, opened, names, model.device, on_step)
    subjects = shop.make_subjects(made)
    transfer = open_transfer(second, shop, study)
    probe = fit_patch_probe(judged, opened[0].hook_point, shop.tokens)
    task = open_task(judged, opened[0], study, model, lambda done, total: on_step("run the model", done, total))
    causes = open_causes(task, judged, opened[0], lambda done, total: on_step("steer by class means", done, total))
    described, stability = describe_subjects(subjects), Stability(judged)
    pca = next(subject.run for subject in subjects if subject.baseline == "pca")
    curve = measure_pca_curve(pca, judged, shop.tokens, lambda done, total: on_step("project", done, total))
    labels = read_patch_labels(
        subjects[0].codes, judged, config, PATCH_CONCEPTS, lambda done, total: on_step("read masks", done, total)
    )
    embeddings = embed_judged(
        other, judged, work, device=model.device, batch_size=model.batch_size,
        on_progress=lambda done, total: on_step("embed", done, total),
    )  # fmt: skip
    untrained = {each.of: each for each in subjects if each.of is not None}
    matching = Matching(judged, read_attributes(judged, labels, MATCHING), untrained, pairs)
    measures = [
        Measure("reconstruction", "decode", lambda subject, show: measure_reconstruction(subject, judged, probe, show)),
        Measure(
            "reconstruction", "run the model with", lambda subject, show: measure_task(subject, judged, task, show)
        ),
        Measure("labeled", "probe", lambda subject, show: measure_sparse_probing(subject, judged, show)),
        Measure(
            "labeled", "find concepts with",
            lambda subject, show: measure_patch_concepts(subject, judged, labels, show),
        ),
        Measure("labeled", "match", lambda subject, show: measure_matching(subject, matching, show)),
        Measure(
            "unlabeled", "measure the coherence of", lambda subject, show: measure_coherence(subject, judged, show)
        ),
        Measure(
            "unlabeled", "compare the images of",
            lambda subject, show: measure_monosemanticity(subject, judged, embeddings, show),
        ),
        Measure(
            "reliability", "match",
            lambda subject, show: stability.measure(subject, find_partners(subject, subjects, described), show),
        ),
        Measure("reliability", "intervene in", lambda subject, show: measure_causal_use(subject, judged, causes, show)),
        Measure("reliability", "transfer", lambda subject, show: measure_transfer(subject, transfer, shop, show)),
    ]  # fmt: skip
    values: list[BenchmarkValue] = []
    skipped: list[BenchmarkSkipped] = []
    known: dict[tuple[str, str], Measured] = {}
    for subject in subjects:
        for measure in measures:
            what = f"{measure.what} {subject.name}"
            for found in measure.take(subject, lambda done, total, what=what: on_step(what, done, total)):  # type: ignore[misc]
                if isinstance(found, Skipped):
                    skipped.append(BenchmarkSkipped(subject.name, found.name, found.reason))
                    continue
                known[subject.name, found.name] = found
                low, high = interval(found.replicates) or (None, None)
                values.append(
                    BenchmarkValue(
                        subject.name, measure.table, found.name, found.higher_is_better, found.value, low, high,
                        found.details,
                    )
                )  # fmt: skip
    result = Benchmark(
        *head,
        hook_point=str(opened[0].hook_point),
        tokens=shop.tokens,
        n_judged=len(judged.images),
        n_choosing=len(judged.choosing),
        n_resamples=judged.resamples.n,
        subjects=described,
        values=tuple(values),
        differences=tuple(compare_subjects(subjects, described, known, shop.n_active, judged.resamples)),
        seeds=tuple(gather_seeds(described, known)),
        skipped=tuple(merge_skipped(skipped, len(subjects))),
        pca_curve=curve,
        seen=(counted, transfer.seen) if isinstance(transfer, Transfer) else (counted,),
        judge=task.facts if isinstance(task, Task) else None,
    )
    return finish_result(out, result)


def check_runs(runs: Sequence[Run], store: StoreGroup) -> None:
    """Raise SettingsError unless the runs differ and read the same tokens, ParentMismatchError for another model."""
    if len({run.run_id for run in runs}) < len(runs):
        raise SettingsError("A run is given twice. Give runs that differ, e.g. in their seed.")
    for run in runs:
        run.check_store(store)
    for what, seen in (
        ("hook points", sorted({str(run.hook_point) for run in runs})),
        ("tokens", sorted({store.layout.token_kind(run.train_config.tokens) for run in runs})),
    ):
        if len(seen) > 1:
            raise SettingsError(
                f"The runs read different {what} ({', '.join(seen)}), which do not belong in one table. Benchmark them "
                "one after the other."
            )


def name_runs(runs: Sequence[Run]) -> list[str]:
    """The names of their folders, with the parent folder where two names are equal."""
    short = [run.path.name for run in runs]
    return short if len(set(short)) == len(short) else [f"{run.path.parent.name}/{run.path.name}" for run in runs]


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
    """Mean and standard deviation (ddof 1) over the seeds of each group."""
    gathered = []
    for group in dict.fromkeys(subject.group for subject in subjects if subject.group is not None):
        members = [subject.name for subject in subjects if subject.group == group]
        for measure in dict.fromkeys(name for _, name in known):
            found = [known[name, measure].value for name in members if (name, measure) in known]
            numbers = [value for value in found if value is not None]
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
