"""benchmark_runs(): what runs are worth, beside baselines, on the same images, with intervals.

In: runs of one hook point, and a store of their model. Out: a result with four tables, the paired differences between
runs and to each baseline, and what runs that differ only in their seed have in common. Whatever cannot be measured is
left out with the reason. Baselines and codes are kept in the work folder beside the result (work.py).
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

from actcache import SettingsError, open_stores
from actcache.models import read_templates
from actcache.store import StoreGroup, Stores
from analysis.benchmark.image_pairs import ImagePairs, read_pairs
from analysis.benchmark.inputs import describe_inputs, name_given
from analysis.benchmark.judging import choose_judged
from analysis.benchmark.kept import KeptMeasures
from analysis.benchmark.measured import Measured, Skipped
from analysis.benchmark.measures import Bench, list_measures
from analysis.benchmark.pca_curve import measure_pca_curve
from analysis.benchmark.resamples import interval
from analysis.benchmark.summary import compare_subjects, describe_subjects, gather_seeds, merge_skipped
from analysis.benchmark.task import find_judge
from analysis.benchmark.transfer import Transfer
from analysis.benchmark.work import (
    Report,
    Workshop,
    check_codes,
    name_work_folder,
    no_report,
)
from analysis.classifier import describe_config
from analysis.config import BenchmarkConfig, ModelOptions, StudyConfig
from analysis.lineage import find_runs, name_parents, open_same_images
from analysis.results import (
    Benchmark,
    BenchmarkSkipped,
    BenchmarkValue,
    describe_result,
    find_result,
    finish_result,
)
from saetrain import CodeStore, Run


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
    if config.embeddings is not None:
        open_same_images(group, config.embeddings, flag="--embeddings")
    parents = name_parents(opened, group) | name_given(config)
    settings = describe_config(study) | describe_inputs(config)
    head = describe_result(Benchmark, settings, parents)
    if (earlier := find_result(Benchmark, out, head, overwrite=overwrite)) is not None:
        return earlier
    pairs = read_pairs(config.pairs, group)
    judged, counted = choose_judged(opened, group, study, pairs=pairs if isinstance(pairs, ImagePairs) else None)
    check_codes(made, opened, judged)
    work = name_work_folder(out)
    if work.exists() and not work.is_dir():
        raise SettingsError(f"{work} is a file, where the baselines are to be kept. Choose another OUT.")
    shop = Workshop(work, judged, opened, names, model.device, on_step)
    subjects = shop.make_subjects(made)
    described = describe_subjects(subjects)
    bench = Bench(judged, shop, subjects, described, pairs, config, study, model)
    pca = next(subject.run for subject in subjects if subject.baseline == "pca")
    curve = measure_pca_curve(pca, judged, shop.tokens, lambda done, total: on_step("project", done, total))
    kept = KeptMeasures(work, bench, settings, reuse=not overwrite)
    values: list[BenchmarkValue] = []
    skipped: list[BenchmarkSkipped] = []
    known: dict[tuple[str, str], Measured] = {}
    for subject, measure in product(subjects, list_measures(bench)):
        what = f"{measure.what} {subject.name}"
        for found in kept.take(measure, subject, lambda done, total, what=what: on_step(what, done, total)):  # type: ignore[misc]
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
        seen=(counted, bench.transfer.seen) if isinstance(bench.transfer, Transfer) else (counted,),
        judge=find_judge(known.values()),
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
