"""A benchmark with known numbers: three variants, two widths, three seeds, and the baselines beside them."""

from analysis.results import (
    Benchmark,
    BenchmarkDifference,
    BenchmarkSeeds,
    BenchmarkSubject,
    BenchmarkTable,
    BenchmarkValue,
    RankPoint,
)

SETTINGS = [
    ("topk", 1536, 8), ("topk", 1536, 16), ("topk", 1536, 32), ("topk", 384, 16), ("batchtopk", 1536, 16),
    ("matryoshka topk", 1536, 16),
]  # fmt: skip
MEASURES: list[tuple[BenchmarkTable, str, bool]] = [
    ("reconstruction", "fvu", False), ("reconstruction", "l0", False), ("reconstruction", "fvu cls", False),
    ("reconstruction", "dead", False), ("labeled", "k-sparse accuracy", True),
]  # fmt: skip
SHIFTS = {"topk": 0.0, "batchtopk": -0.01, "matryoshka topk": 0.02}


def truth(subject: BenchmarkSubject, measure: str) -> float:
    """The planted number."""
    k, seed = subject.k or 1, subject.seed or 0
    fvu = 0.9 / k + SHIFTS.get(subject.variant, 0) + 40 / subject.n_latents + 0.002 * seed
    fvu *= {None: 1.0, "untrained": 4.0, "pca": 2.5, "raw": 5.0, "k-means": 0.5}[subject.baseline]
    return {
        "fvu": fvu, "l0": k + 0.1 * seed, "fvu cls": fvu / 2, "dead": 0.01 * seed, "k-sparse accuracy": 0.6 - fvu / 4,
    }[measure]  # fmt: skip


def make_subjects(n_seeds: int = 3) -> list[BenchmarkSubject]:
    runs = []
    for variant, n_latents, k in SETTINGS:
        names = [f"{variant.replace(' ', '-')}-{n_latents}-k{k}-seed{seed}" for seed in range(n_seeds)]
        group = ", ".join(names) if n_seeds > 1 else None
        runs += [BenchmarkSubject(name, variant, n_latents, k, i, group=group) for i, name in enumerate(names)]
    untrained = [
        BenchmarkSubject(
            f"untrained {run.name}", run.variant, run.n_latents, run.k, run.seed, "untrained", run.name,
            run.group and f"untrained {run.group}",
        )
        for run in runs
    ]  # fmt: skip
    fixed = [
        BenchmarkSubject(f"{title} k {k}", "topk", 384, k, 0, kind)
        for k in (8, 16, 32)
        for kind, title in (("pca", "pca"), ("raw", "raw dimensions"))
    ]
    return [*runs, *untrained, *fixed, BenchmarkSubject("k-means 1,536", "topk", 1536, 1, 0, "k-means")]


def make_benchmark(n_seeds: int = 3) -> Benchmark:
    """Every interval is the value ± 0.01; `dead` has none. A difference counts where it is larger than 0.004."""
    subjects = make_subjects(n_seeds)
    values = []
    for subject in subjects:
        for table, measure, rises in MEASURES:
            value = truth(subject, measure)
            ends = (None, None) if measure == "dead" else (value - 0.01, value + 0.01)
            values.append(BenchmarkValue(subject.name, table, measure, rises, value, *ends))
    settings = {subject.group or subject.name: subject for subject in subjects}  # the last seed stands for all
    runs = [name for name, subject in settings.items() if subject.baseline is None]
    differences = []
    for i, first in enumerate(runs):
        for second in (*runs[i + 1 :], *(name for name in settings if name not in runs)):
            for _, measure, rises in MEASURES:
                if measure == "dead":
                    continue
                d = truth(settings[first], measure) - truth(settings[second], measure)
                low, high = d - 0.004, d + 0.004
                verdict = "no difference" if low <= 0 <= high else "better" if (d > 0) == rises else "worse"
                differences.append(BenchmarkDifference(first, second, measure, d, low, high, verdict))  # type: ignore[arg-type]
    seeds = []
    if n_seeds > 1:
        for group in dict.fromkeys(each.group for each in subjects if each.group):
            for _, measure, _ in MEASURES:
                found = [truth(each, measure) for each in subjects if each.group == group]
                mean = sum(found) / n_seeds
                spread = (sum((each - mean) ** 2 for each in found) / (n_seeds - 1)) ** 0.5
                seeds.append(BenchmarkSeeds(group, measure, mean, spread, n_seeds))
    return Benchmark(
        "benchmark", 1, "0" * 16, {}, {}, hook_point="blocks.4.hook_resid_post", tokens="all", n_judged=1000,
        n_choosing=5000, n_resamples=200, subjects=tuple(subjects), values=tuple(values),
        differences=tuple(differences), seeds=tuple(seeds),
        pca_curve=tuple(RankPoint(rank, 1 - rank**0.5 / 14, None, None) for rank in (1, 4, 16, 64, 192)),
    )  # fmt: skip
