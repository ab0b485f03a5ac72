"""benchmark: what it measures is what numpy computes from the activations, and the baselines are what they claim."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache import HookPoint, ParentMismatchError, SettingsError, open_stores
from analysis import ModelOptions, StudyConfig, benchmark_runs, read_result
from analysis.benchmark import work
from analysis.benchmark.baselines import find_floor, make_clusters, make_signed, make_untrained, measure_l0
from analysis.benchmark.benchmarking import compare_subjects
from analysis.benchmark.fitting import fit_centroids, measure_moments
from analysis.benchmark.judging import choose_judged
from analysis.benchmark.measured import Measured, Skipped
from analysis.benchmark.patch_probe import PatchProbe, fit_patch_probe
from analysis.benchmark.reconstruction import measure_reconstruction
from analysis.benchmark.resamples import BLOCK, Resamples, average, compare, interval
from analysis.benchmark.subject import Judged, Subject
from analysis.benchmark.task import describe_task
from analysis.classifier import Outcome
from analysis.config import BenchmarkConfig
from analysis.results import Benchmark
from saetrain import Run, SAEConfig, TrainConfig, encode, train
from saetrain.interop import write_imported
from saetrain.model import SAE

GOLDEN = Path(__file__).parents[2] / "golden" / "pipeline"
CPU = ModelOptions(device="cpu")
N_LATENTS, K = 64, 4


# ---------------------------------------------------------------------------------------------------------------------
# Resamples


@settings(max_examples=20, deadline=None)
@given(n_images=st.integers(1, 3000), seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 3000), max_size=3))
def test_weights_are_counts_of_as_many_draws_and_do_not_depend_on_how_they_are_read(
    n_images: int, seed: int, cuts: list[int]
) -> None:
    resamples = Resamples(n_images, n=7, seed=seed)
    whole = resamples.weights(0, n_images)
    assert whole.shape == (7, n_images)
    assert whole.min() >= 0
    assert (whole.sum(1) == n_images).all()
    edges = sorted({0, n_images, *(cut for cut in cuts if cut < n_images)})
    parts = [Resamples(n_images, n=7, seed=seed).weights(a, b) for a, b in itertools.pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    values = np.random.default_rng(seed).normal(size=(n_images, 2))
    means, replicates = resamples.means(values)
    np.testing.assert_allclose(means, values.mean(0))
    np.testing.assert_allclose(replicates, whole @ values / n_images)


def test_resampled_means_spread_as_the_standard_error_says() -> None:
    values = np.random.default_rng(0).normal(size=(2 * BLOCK + 100, 1))
    _, replicates = Resamples(len(values), n=2000, seed=1).means(values)
    assert replicates.std() == pytest.approx(values.std() / len(values) ** 0.5, rel=0.06)
    assert abs(replicates.mean() - values.mean()) < 3 * replicates.std() / 2000**0.5


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), shift=st.floats(-3, 3), higher=st.booleans())
def test_a_subject_never_differs_from_itself_and_a_shift_is_found(seed: int, shift: float, higher: bool) -> None:
    replicates = np.random.default_rng(seed).normal(size=50)
    one = Measured("m", 0.0, replicates, higher)
    same = compare(one, one)
    assert same == (0, 0, 0, "no difference")
    moved = compare(replace(one, value=shift, replicates=replicates + shift), one)
    assert moved is not None
    assert moved.difference == shift
    if abs(shift) > 1e-9:  # pairing takes the noise away
        assert moved.verdict == ("better" if (shift > 0) == higher else "worse")
    assert compare(one, Measured("m", 1.0, None, higher)) is None
    assert interval(np.array([0.0, np.nan])) is None


def test_the_mean_over_seeds_spreads_as_images_and_seeds_do() -> None:
    """Planted: seeds with a variance of their own. The mean varies as the images do, and by an n-th of it."""
    rng = np.random.default_rng(0)
    resamples = Resamples(50, n=4000, seed=2)
    shared, shifts = rng.normal(0, 0.3, 4000), rng.normal(0, 1.0, 5)
    seeds = [Measured("m", shift, shared + shift, True, {"seed": i}) for i, shift in enumerate(shifts)]
    mean = average(seeds, resamples)
    assert mean is not None
    assert mean.value == pytest.approx(shifts.mean())
    assert mean.replicates is not None
    assert mean.replicates.var() == pytest.approx(0.09 + shifts.var() / 5, rel=0.08)
    again = average(seeds, resamples)
    assert again is not None
    np.testing.assert_array_equal(again.replicates, mean.replicates)
    # what all seeds share goes away in a paired difference, what seeds have of their own does not
    moved = average([replace(each, replicates=shared + 2.0) for each in seeds], resamples)
    assert moved is not None
    assert moved.replicates is not None
    assert (mean.replicates - moved.replicates).var() == pytest.approx(shifts.var() / 5, rel=0.08)
    assert average(seeds[:1], resamples) is seeds[0]
    assert average([*seeds, Measured("m", 0.0, None, True)], resamples) is None


def test_runs_of_two_settings_are_compared_as_means_over_seeds() -> None:
    resamples = Resamples(30, n=100, seed=0)
    config: Any = SimpleNamespace(k=4)
    runs = [f"{name}{seed}" for name in "ab" for seed in range(2)]
    subjects: list[Any] = [SimpleNamespace(name=name, baseline=None, of=None, run=None) for name in runs]
    subjects += [SimpleNamespace(name=f"u {name}", baseline="untrained", of=name, run=None) for name in runs]
    fixed = SimpleNamespace(sae_config=config)
    subjects.append(SimpleNamespace(name="pca k 4", baseline="pca", of=None, run=fixed))
    described: list[Any] = [
        SimpleNamespace(name=s.name, group=None if s.baseline == "pca" else s.name[:-1]) for s in subjects
    ]
    base = {"a": 1.0, "b": 2.0, "u a": 5.0, "u b": 5.0, "pca k ": 3.0}
    noise = np.random.default_rng(1).normal(0, 0.01, 100)
    known = {(s.name, "fvu"): Measured("fvu", base[s.name[:-1]], base[s.name[:-1]] + noise, False) for s in subjects}
    n_active = {"a0": 4, "a1": 4, "b0": 9, "b1": 9}
    found = {(d.first, d.second): d for d in compare_subjects(subjects, described, known, n_active, resamples)}
    assert set(found) == {("a", "b"), ("a", "u a"), ("b", "u b"), ("a", "pca k 4")}
    assert found["a", "b"].difference == -1.0
    assert found["a", "b"].verdict == "better"


# ---------------------------------------------------------------------------------------------------------------------
# Baselines


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    rng = np.random.default_rng(3)
    return rng.normal(size=(500, 24)) @ rng.normal(size=(24, 24)) + 5 * rng.normal(size=24)


def moments_of(rows: np.ndarray) -> Any:
    blocks = SimpleNamespace(blocks=lambda: iter(np.array_split(rows, 7)))
    return measure_moments(blocks)  # type: ignore[arg-type]


def reconstruct(sae: SAE, x: np.ndarray) -> np.ndarray:
    given = torch.from_numpy(x).float()
    return sae.decode(*sae.encode(given), len(x)).numpy()


@pytest.mark.parametrize("k", [1, 3, 10, 24])
def test_pca_of_rank_k_is_numpys_truncated_svd(rows: np.ndarray, k: int) -> None:
    moments = moments_of(rows)
    np.testing.assert_allclose(moments.mean, rows.mean(0))
    np.testing.assert_allclose(moments.covariance, np.cov(rows.T, bias=True), rtol=1e-9, atol=1e-9)
    u, s, v = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    found = reconstruct(make_signed(moments.mean, moments.components[:k], k), rows)
    np.testing.assert_allclose(found, (u[:, :k] * s[:k]) @ v[:k] + rows.mean(0), atol=2e-4)
    largest = np.abs(moments.components).argmax(1)
    assert (np.take_along_axis(moments.components, largest[:, None], 1) > 0).all()


@pytest.mark.parametrize("basis", ["pca", "raw"])
def test_signed_directions_keep_the_k_largest_coefficients_of_each_token(rows: np.ndarray, basis: str) -> None:
    moments, k = moments_of(rows), 5
    directions = moments.components if basis == "pca" else np.eye(24)
    coefficients = (rows - moments.mean) @ directions.T
    kept = np.argsort(-np.abs(coefficients), axis=1)[:, :k]
    wanted = np.zeros_like(coefficients)
    np.put_along_axis(wanted, kept, np.take_along_axis(coefficients, kept, 1), 1)
    found = reconstruct(make_signed(moments.mean, directions, k), rows)
    np.testing.assert_allclose(found, wanted @ directions + moments.mean, atol=2e-4)


def test_k_means_puts_each_row_on_its_nearest_direction_and_finds_planted_ones() -> None:
    rng = np.random.default_rng(0)
    planted = np.linalg.qr(rng.normal(size=(16, 6)))[0].T
    member = rng.integers(6, size=600)
    x = planted[member] * rng.uniform(1, 4, (600, 1)) + rng.normal(0, 0.05, (600, 16))
    centroids = fit_centroids(torch.from_numpy(x).float(), 12, seed=2)
    np.testing.assert_allclose(centroids.norm(dim=1).numpy(), 1, rtol=1e-5)
    assert torch.equal(centroids, fit_centroids(torch.from_numpy(x).float(), 12, seed=2))
    found = reconstruct(make_clusters(np.zeros(16), centroids), x)
    products = x @ centroids.numpy().T
    nearest = products.argmax(1)
    np.testing.assert_allclose(found, products.max(1)[:, None] * centroids.numpy()[nearest], atol=1e-4)
    assert np.square(x - found).sum() < 0.02 * np.square(x).sum()


@pytest.mark.parametrize("variant", ["batchtopk", "relu", "jumprelu", "gated"])
def test_an_untrained_sae_has_the_same_l0(variant: str) -> None:
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(400, 32))).float()
    config = SAEConfig(variant=variant, n_latents=96, k=5).resolve(32)
    trained = SAE(config, 32, seed=9)
    trained.mean.fill_(0.1)
    run: Any = SimpleNamespace(sae=lambda: trained, d_model=32, train_config=TrainConfig(seed=4))
    for l0 in (1.0, 6.37, 20.0):
        made = make_untrained(run, x, l0)
        assert measure_l0(made, x) == pytest.approx(l0, abs=0.01)
    fresh = SAE(config, 32, seed=4)
    assert torch.equal(made.encoder, fresh.encoder)
    assert torch.equal(made.decoder, fresh.decoder)
    assert torch.equal(made.mean, trained.mean)
    assert find_floor(fresh, x, 96.0) == 0  # more than are positive


# ---------------------------------------------------------------------------------------------------------------------
# Reconstruction


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, middle_store: Path) -> tuple[Subject, Judged]:
    """A run on half of middle_store's images, and its codes."""
    folder = tmp_path_factory.mktemp("world")
    config = TrainConfig(n_steps=40, batch_size=128, lr=3e-3, where="label < 3")
    run = train(middle_store, folder / "run", layer=1, sae=SAEConfig(n_latents=N_LATENTS, k=K), config=config)
    codes = encode(run, middle_store, folder / "codes", device="cpu")
    judged, _ = choose_judged([run], open_stores(middle_store), StudyConfig(on_seen="use"))
    return Subject("run", None, None, run, codes), judged


def plain_measures(subject: Subject, x: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """fvu, l0, cosine, dead and dense of tokens x [I, T, D] whose images count `weights` times, from dense codes."""
    sae = subject.run.sae()
    w = {name: value.numpy().astype(np.float64) for name, value in sae.state_dict().items()}
    z = ((x - w["mean"]) * w["scale"] - w["b_dec"]) @ w["encoder"].T + w["b_enc"]
    floor = np.sort(z, axis=-1)[..., -K, None]
    dense = np.where((z >= floor) & (z > 0), z, 0).astype(np.float16).astype(np.float64)
    reconstruction = (dense @ w["decoder"] + w["b_dec"]) / w["scale"] + w["mean"]
    times = np.repeat(np.arange(len(x)), weights)
    x, r, dense = (part[times].reshape(-1, part.shape[-1]) for part in (x, reconstruction, dense))
    share = (dense > 0).mean(0)
    return {
        "fvu": np.square(x - r).sum() / np.square(x - x.mean(0)).sum(),
        "l0": (dense > 0).sum(1).mean(),
        "cosine": ((x * r).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(r, axis=1)).mean(),
        "dead": (share == 0).mean(),
        "dense": (share > 0.1).mean(),
    }


def test_the_decode_pass_measures_what_numpy_does_and_so_does_each_resample(world: tuple[Subject, Judged]) -> None:
    subject, judged = world
    measured = {found.name: found for found in measure_reconstruction(subject, judged, Skipped("probe ratio", "no"))}
    assert isinstance(measured.pop("probe ratio"), Skipped)
    x = judged.store.read(1, images=judged.images).astype(np.float64)
    weights = judged.resamples.weights(0, len(judged.images))
    for suffix, part in (("", slice(None)), (" cls", slice(0, 1)), (" patch", slice(1, None))):
        plain = plain_measures(subject, x[:, part], np.ones(len(x), int))
        again = plain_measures(subject, x[:, part], weights[11])
        names = ("fvu", "l0", "cosine", *(() if suffix else ("dense", "dead")))
        for name in names:
            found = measured[name + suffix]
            assert isinstance(found, Measured)
            assert found.value == pytest.approx(plain[name], rel=2e-4), name + suffix
            if name == "dead":
                assert found.replicates is None
                assert "third" in str(found.details["no_interval"])
            else:
                assert found.replicates is not None
                assert found.replicates[11] == pytest.approx(again[name], rel=2e-4), name + suffix


def test_the_probe_ratio_is_that_of_scikit_learn(world: tuple[Subject, Judged]) -> None:
    subject, judged = world
    probe = fit_patch_probe(judged, HookPoint(1), "all")
    assert isinstance(probe, PatchProbe)
    found = measure_reconstruction(subject, judged, probe)[-1]
    assert isinstance(found, Measured)
    names = np.array(judged.store.images["label_name"].to_pylist())
    x = judged.store.read(1, images=judged.choosing, tokens="patch").astype(np.float64).mean(1)
    from sklearn.linear_model import LogisticRegression

    from analysis.classifier import choose_validation

    classes, numbers = np.unique(names[judged.choosing], return_inverse=True)
    fitted = ~choose_validation(numbers, judged.seed)
    mean, deviation = x[fitted].mean(0), x[fitted].std(0)
    model = LogisticRegression(C=probe.c, max_iter=2000, tol=1e-6).fit((x[fitted] - mean) / deviation, numbers[fitted])
    sae = subject.run.sae()
    given = judged.store.read(1, images=judged.images, tokens="patch")
    flat = torch.from_numpy(given).float().flatten(0, 1)
    back = sae.decode(*sae.encode(flat), len(flat)).view(given.shape).double().numpy().mean(1)
    truth = np.searchsorted(classes, names[judged.images])
    right = [(model.predict((each - mean) / deviation) == truth).mean() for each in (given.astype(float).mean(1), back)]
    assert found.details["accuracy_original"] == pytest.approx(right[0], abs=1e-9)
    assert found.details["accuracy_reconstructed"] == pytest.approx(right[1], abs=1e-9)
    assert found.value == pytest.approx(right[1] / right[0])


def test_without_labels_the_probe_says_what_is_missing(world: tuple[Subject, Judged]) -> None:
    _, judged = world
    one = np.flatnonzero(np.array(judged.store.images["label_name"].to_pylist()) == "class0")
    said = fit_patch_probe(replace(judged, choosing=one), HookPoint(1), "all")
    assert isinstance(said, Skipped)
    assert "fewer than two classes" in said.reason


def test_the_task_numbers_are_those_of_a_plain_count() -> None:
    rng = np.random.default_rng(5)
    label, loss = rng.integers(3, size=40), rng.random(40)
    answers = {name: rng.integers(3, size=40) for name in ("sae", "original", "zero", "mean")}
    outcomes = {name: Outcome(label, answer, loss) for name, answer in answers.items()}
    outcomes["original"] = Outcome(label, np.where(rng.random(40) < 0.9, label, 0), loss)
    judged: Any = SimpleNamespace(resamples=Resamples(50, n=20, seed=1))
    places = np.sort(rng.permutation(50)[:40])
    found = {m.name: m for m in describe_task(outcomes["sae"], outcomes, places, judged)}
    weights = Resamples(50, n=20, seed=1).weights(0, 50)[3, places]
    right = {name: each.right.astype(float) for name, each in outcomes.items()}
    accuracy, agreement = found["task accuracy"], found["task agreement"]
    assert isinstance(accuracy, Measured)
    assert accuracy.value == right["sae"].mean()
    assert accuracy.replicates is not None
    assert accuracy.replicates[3] == pytest.approx(weights @ right["sae"] / weights.sum())
    assert isinstance(agreement, Measured)
    assert agreement.value == (answers["sae"] == outcomes["original"].predicted).mean()
    recovered = found["task recovered"]
    assert isinstance(recovered, Measured)
    of_sae, whole, none = (right[name].mean() for name in ("sae", "original", "mean"))
    assert recovered.value == pytest.approx((of_sae - none) / (whole - none))


# ---------------------------------------------------------------------------------------------------------------------
# The whole


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory, middle_store: Path) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    for seed in range(2):
        config = TrainConfig(n_steps=30, batch_size=128, lr=3e-3, seed=seed)
        train(middle_store, folder / f"seed{seed}", layer=1, sae=SAEConfig(n_latents=N_LATENTS, k=K), config=config)
    return folder


ANY = StudyConfig(on_seen="use")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, seeds: Path, middle_store: Path) -> tuple[Benchmark, Path]:
    out = tmp_path_factory.mktemp("made") / "b.json"
    return benchmark_runs(seeds, middle_store, out, study=ANY, model=CPU), out


def test_baselines_stand_beside_the_runs_with_intervals(made: tuple[Benchmark, Path]) -> None:
    result, out = made
    assert [subject.baseline for subject in result.subjects] == [
        None, None, "untrained", "untrained", "pca", "raw", "k-means",
    ]  # fmt: skip
    assert read_result(out, Benchmark) == result
    for subject in result.subjects:
        fvu = result.find(subject.name, "fvu")
        assert fvu is not None
        assert fvu.value is not None
        assert fvu.low is not None
        assert fvu.high is not None
        assert fvu.low <= fvu.value <= fvu.high
        accuracy = result.find(subject.name, "task accuracy")
        assert accuracy is not None
    l0 = {subject.name: result.find(subject.name, "l0") for subject in result.subjects}
    for name in ("seed0", "untrained seed0", "pca k 4", "raw dimensions k 4"):
        found = l0[name]
        assert found is not None
        assert found.value == pytest.approx(K, abs=0.05), name
    pca, raw = result.find("pca k 4", "fvu"), result.find("raw dimensions k 4", "fvu")
    assert pca is not None
    assert raw is not None
    assert pca.value is not None
    assert raw.value is not None
    assert pca.value < raw.value
    pairs = {(each.first, each.second) for each in result.differences}
    beside = ("untrained seed0, seed1", "pca k 4", "raw dimensions k 4", f"k-means {result.subjects[-1].n_latents}")
    assert pairs == {("seed0, seed1", other) for other in beside}  # the seeds are one setting, with its baselines


def test_differences_are_no_difference_exactly_where_0_lies_inside(made: tuple[Benchmark, Path]) -> None:
    result, _ = made
    assert result.differences
    for each in result.differences:
        assert (each.verdict == "no difference") == (each.low <= 0 <= each.high)
    (versus,) = (d for d in result.differences if (d.second, d.measure) == ("untrained seed0, seed1", "fvu"))
    assert versus.verdict == "better"
    found = [result.find(name, "fvu") for name in ("seed0", "seed1", "untrained seed0", "untrained seed1")]
    one, two, three, four = (each.value for each in found if each is not None and each.value is not None)
    assert versus.difference == pytest.approx((one + two - three - four) / 2)


def test_runs_that_differ_in_their_seed_are_shown_together(made: tuple[Benchmark, Path]) -> None:
    result, _ = made
    found = {(each.group, each.measure): each for each in result.seeds}
    one, two = (result.find(name, "fvu") for name in ("seed0", "seed1"))
    assert one is not None
    assert two is not None
    values = [value for value in (one.value, two.value) if value is not None]
    group = found["seed0, seed1", "fvu"]
    assert group.mean == pytest.approx(np.mean(values))
    assert group.spread == pytest.approx(np.std(values, ddof=1))
    assert ("untrained seed0, seed1", "fvu") in found


def test_the_tables_on_the_screen_hold_every_subject(made: tuple[Benchmark, Path]) -> None:
    result, _ = made
    main, by_tokens, labeled, unlabeled, reliability, differences = result.tables()
    assert [row["subject"] for row in result.rows("reconstruction")] == [subject.name for subject in result.subjects]
    named = ["seed*", "untrained seed*", *(subject.name for subject in result.subjects[4:])]
    assert [row["subject"] for row in main] == named
    assert " ± " in str(main[0]["fvu ↓"])
    assert "fvu ↓" in main[0]
    assert "fvu cls ↓" in by_tokens[0]
    assert "k-sparse accuracy ↑" in labeled[0]
    assert "spatial coherence ↑" in unlabeled[0]
    assert [row["subject"] for row in reliability] == ["seed*", "untrained seed*"]
    assert "stability jaccard ↑" in reliability[0]
    assert differences[0]["difference"] == "seed* minus untrained seed*"
    assert result.seed_rows()[0]["seeds"] == 2
    assert any("judged on" in note for note in result.notes())
    assert [each.n_components for each in result.pca_curve] == [1, 4, 16, 32]
    assert any(note.startswith("fvu of PCA by the number of components") for note in result.notes())


def test_the_same_command_again_reads_and_an_interrupted_one_goes_on(
    made: tuple[Benchmark, Path], seeds: Path, middle_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, out = made
    assert benchmark_runs(seeds, middle_store, out, study=ANY, model=CPU) == result
    shutil.copytree(work.name_work_folder(out), tmp_path / "c.work")
    unfinished = [next((tmp_path / "c.work").glob(f"{kind}-*[!s]")) for kind in ("pca", "k-means")]
    shutil.rmtree(unfinished[0])  # it was not begun
    (unfinished[1] / "manifest.json").unlink()  # it was not sealed
    (next((tmp_path / "c.work").glob("raw-*.codes")) / "manifest.json").unlink()
    made_again: list[str] = []
    write = write_imported

    def count(*args: Any, **how: Any) -> Run:
        made_again.append(how["format"])
        return write(*args, **how)

    monkeypatch.setattr(work, "write_imported", count)
    again = benchmark_runs(seeds, middle_store, tmp_path / "c.json", study=ANY, model=CPU)
    assert sorted(made_again) == ["baseline k-means", "baseline pca"]
    assert again == result


def test_given_codes_are_taken_instead_of_new_ones(
    made: tuple[Benchmark, Path], seeds: Path, middle_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = encode(seeds / "seed0", middle_store, tmp_path / "x.codes", device="cpu")
    shutil.copytree(work.name_work_folder(made[1]), tmp_path / "c.work")
    first = Run.open(seeds / "seed0")
    shutil.rmtree(tmp_path / "c.work" / f"run-{first.run_id[:12]}.codes")
    monkeypatch.setattr(
        work, "encode", lambda *args, **how: encode(*args, **how) if args[0].run_id != first.run_id else 1 / 0
    )
    result = benchmark_runs(seeds, middle_store, tmp_path / "c.json", codes=[codes], study=ANY, model=CPU)
    assert result == made[0]


def test_images_that_a_run_has_learned_from_are_not_judged(seeds: Path, middle_store: Path) -> None:
    store = open_stores(middle_store)
    runs = [Run.open(seeds / "seed0"), Run.open(seeds / "seed1")]
    judged, counted = choose_judged(runs, store, StudyConfig())
    assert set(judged.images.tolist()).isdisjoint(judged.choosing.tolist())
    assert counted.n == store.n_images - len(judged.images)
    assert judged.images.min() >= counted.n  # the held-out images are the last ones
    used, _ = choose_judged(runs, store, ANY)
    assert abs(len(used.images) - len(used.choosing)) <= 1
    some, _ = choose_judged(runs, store, StudyConfig(on_seen="use", limit=5))
    assert set(some.images.tolist()) < set(used.images.tolist())
    assert len(some.images) == 5


def test_a_task_that_cannot_be_measured_is_left_out_with_the_reason(
    seeds: Path, middle_store: Path, made: tuple[Benchmark, Path], tmp_path: Path
) -> None:
    shutil.copytree(work.name_work_folder(made[1]), tmp_path / "c.work")
    nowhere = ModelOptions(pretrained=str(tmp_path / "nowhere.safetensors"), device="cpu")
    result = benchmark_runs(seeds, middle_store, tmp_path / "c.json", study=ANY, model=nowhere)
    skipped, without_masks = (
        next(each for each in result.skipped if each.measure == name) for name in ("task", "patch mAP")
    )
    assert (skipped.subject, skipped.measure) == ("", "task")
    assert (without_masks.subject, without_masks.measure) == ("", "patch mAP")
    assert "nowhere.safetensors" in skipped.reason
    assert "\n" not in skipped.reason
    assert result.find("seed0", "fvu") == made[0].find("seed0", "fvu")
    assert result.find("seed0", "task accuracy") is None
    assert any(note.startswith("without task, causal use: ") for note in result.notes())


def test_bad_input_is_one_line(seeds: Path, middle_store: Path, tmp_path: Path, made: tuple[Benchmark, Path]) -> None:
    def refuse(error: type[Exception], words: str, runs: Any = seeds, **how: Any) -> None:
        with pytest.raises(error, match=words) as caught:
            benchmark_runs(runs, how.pop("store", middle_store), tmp_path / "x.json", model=CPU, **how)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "x.json").exists()

    refuse(SettingsError, "A run is given twice", [seeds / "seed0", seeds])
    other = train(
        middle_store, tmp_path / "cls", layer=1, sae=SAEConfig(n_latents=32, k=2),
        config=TrainConfig(n_steps=5, batch_size=16, tokens="cls"),
    )  # fmt: skip
    refuse(SettingsError, "different tokens", [seeds / "seed0", other])
    below = train(
        middle_store, tmp_path / "below", layer=0, sae=SAEConfig(n_latents=32, k=2),
        config=TrainConfig(n_steps=5, batch_size=16),
    )  # fmt: skip
    refuse(SettingsError, "different hook points", [seeds / "seed0", below])
    codes = encode(below, middle_store, tmp_path / "below.codes", device="cpu")
    refuse(SettingsError, "made by none of the runs", codes=[codes])
    refuse(SettingsError, "holds for no image", study=StudyConfig(where="label == 99"))
    refuse(SettingsError, "template", study=StudyConfig(templates="nothing"))
    refuse(SettingsError, "is not a folder", config=BenchmarkConfig(masks=tmp_path / "nowhere"))
    refuse(SettingsError, "cannot be read: .* Check --legend", config=BenchmarkConfig(legend=tmp_path / "nowhere.csv"))
    refuse(ParentMismatchError, "was trained on model", GOLDEN / "run")
    (tmp_path / "x.work").write_text("")
    refuse(SettingsError, "is a file, where the baselines", study=ANY)
    with pytest.raises(SettingsError, match="made with other settings"):
        benchmark_runs(seeds, middle_store, made[1], study=StudyConfig(on_seen="use", seed=3), model=CPU)


def test_the_report_shows_all_tables(made: tuple[Benchmark, Path]) -> None:
    from analysis.report.sections import show_benchmark

    section = show_benchmark(made[0])
    for words in ("untrained seed0", "k-means", "no difference", "seed* minus untrained seed*", " ± "):
        assert words in section.more, words
    assert len(section.plots) == 2


def test_tables_of_results_hold_json_only(made: tuple[Benchmark, Path]) -> None:
    result, out = made
    content = json.loads(out.read_text())
    assert content["kind"] == "benchmark"
    older = {name: value for name, value in content.items() if name != "pca_curve"}
    assert Benchmark.from_json(older, "x") == replace(result, pca_curve=())
    assert {"subject", "table", "measure", "higher_is_better", "value", "low", "high", "details"} == set(
        content["values"][0]
    )
