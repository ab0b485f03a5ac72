"""Measure 4: latents, probes and scores are those of scikit-learn and plain loops on dense codes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, log_loss

from actcache import open_stores
from analysis import StudyConfig
from analysis.benchmark import concept_latents, logistic
from analysis.benchmark.judging import choose_judged
from analysis.benchmark.logistic import Best, LatentValues, find_bounds, fit_exactly, improve
from analysis.benchmark.measured import Measured, Skipped
from analysis.benchmark.patch_concepts import measure_patch_concepts
from analysis.benchmark.patch_labels import LabeledPatches, read_patch_labels
from analysis.benchmark.ranked_patches import average_precision, draw_weights, purity
from analysis.benchmark.resamples import interval
from analysis.benchmark.subject import Judged, Subject
from analysis.config import BenchmarkConfig
from analysis.localization import read_masks
from analysis.localization.scores import score_latents
from saetrain import CodeStore, Run

N_LATENTS = 64
PLANTED = 7
"""The concept that one latent's own map defines."""


def count_values(z: NDArray[np.float16], y: NDArray[np.bool_]) -> LatentValues:
    """Of dense codes [N, L] and labels [N, C]."""
    found = [np.unique(column[column > 0].view(np.uint16), return_counts=True) for column in z.T]
    indptr = np.concatenate([[0], np.cumsum([len(bits) for bits, _ in found])])
    dense = z.astype(np.float64)
    return LatentValues(
        indptr, np.concatenate([bits for bits, _ in found]), np.concatenate([count for _, count in found]), len(z),
        y.sum(0), (dense > 0).T @ y.astype(float), dense.T @ y,
    )  # fmt: skip


def make_values(seed: int, n: int = 400, n_latents: int = 12, n_classes: int = 4) -> tuple[Any, Any]:
    """Codes [N, L] of which some know a class, and classes [N, C]."""
    rng = np.random.default_rng(seed)
    y = rng.random((n, n_classes)) < rng.uniform(0.05, 0.5, n_classes)
    z = np.where(rng.random((n, n_latents)) < rng.uniform(0.01, 0.9, n_latents), rng.gamma(2, 0.5, (n, n_latents)), 0)
    for c in range(n_classes):
        z[:, c] += np.where(y[:, c] & (rng.random(n) < 0.8), 1 + rng.random(n), 0)
    y[0], y[1] = True, False
    return z.astype(np.float16), y


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_fit_is_that_of_scikit_learn_and_no_bound_lies_above_it(seed: int) -> None:
    z, y = make_values(seed)
    values = count_values(z, y)
    latent, of_class = (each.ravel() for each in np.mgrid[: z.shape[1], : y.shape[1]])
    fit = fit_exactly(values, latent, of_class)
    objective = fit.objective.reshape(z.shape[1], -1)
    assert (find_bounds(values) <= objective).all()
    for f, c in ((0, 0), (1, 1), (5, 2), (9, 3)):
        column = z[:, f : f + 1].astype(float)
        model = LogisticRegression(C=1e8, tol=1e-10, max_iter=5000).fit(column, y[:, c])
        want = log_loss(y[:, c], model.predict_proba(column)[:, 1]) * len(z)
        assert objective[f, c] == pytest.approx(want, rel=1e-6)
    best = Best.none(y.shape[1])
    for first in (0, 5):  # two ranges of latents, as they are read
        part = z[:, first : first + 5] if first == 0 else z[:, first:]
        best = improve(best, count_values(part, y), first)
    np.testing.assert_array_equal(best.latent, objective.argmin(0))
    np.testing.assert_allclose(best.fit.objective, objective.min(0), rtol=1e-9)


def test_a_latent_that_separates_a_class_has_a_finite_fit_and_a_silent_one_the_rate() -> None:
    rng = np.random.default_rng(0)
    y = rng.random((300, 2)) < 0.3
    z = np.stack([np.where(y[:, 0], 1 + rng.random(300), 0), np.where(y[:, 1], 0, 2.0), np.zeros(300)], axis=1)
    values = count_values(z.astype(np.float16), y)
    fit = fit_exactly(values, np.array([0, 1, 2]), np.array([0, 1, 0]))
    assert (fit.objective[:2] < 1e-3).all()
    assert fit.w[0] > 5
    assert fit.w[1] < -5
    assert fit.w[2] == 0
    rate = y[:, 0].mean()
    assert fit.objective[2] == pytest.approx(-300 * (rate * np.log(rate) + (1 - rate) * np.log(1 - rate)))
    assert improve(Best.none(2), values, 0).latent.tolist() == [0, 1]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
def test_ap_of_a_resample_is_that_of_its_patches_written_out(seed: int, falling: bool, parts: bool) -> None:
    rng = np.random.default_rng(seed)
    m, p = 5, 6
    values = rng.choice([0, 0, 0.5, 1, 2], (m, p)) * (-1 if falling else 1)
    hits = (rng.random((m, p, 4)) < 0.4).mean(2) if parts else (rng.random((m, p)) < 0.4) * 1.0
    weights = np.concatenate([np.ones((1, m), int), rng.multinomial(m, np.full(m, 1 / m), size=8)]).astype(np.int16)
    image, patch = np.nonzero(values)
    found = average_precision(weights, image, values[image, patch], hits[image, patch], hits.sum(1), p)
    for row, ap in zip(weights, found, strict=True):
        times = np.repeat(np.arange(m), row)
        pixels = np.repeat(hits[times].ravel() * 4, 4).reshape(-1, 4) > np.arange(4)
        if not pixels.any():
            assert np.isnan(ap)
        else:
            assert ap == pytest.approx(average_precision_score(pixels.ravel(), np.repeat(values[times].ravel(), 4)))


def test_purity_counts_what_most_of_the_strongest_patches_carry() -> None:
    image = np.array([0, 1, 1, 2])
    labels = np.array([[1, 0], [1, 1], [0, 1], [0, 1]], dtype=bool)
    weights = np.array([[1, 1, 1], [2, 1, 0], [0, 0, 3]], dtype=np.int16)
    assert purity(weights, image, labels, 3).tolist() == [2 / 3, 1, 1]
    assert purity(weights, image, labels, 8).tolist() == [3 / 8, 3 / 8, 3 / 8]  # it fires on fewer patches
    assert purity(weights, image[:0], labels[:0], 3).tolist() == [0, 0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# The measure, on codes of a run and masks in files


@pytest.fixture(scope="module")
def subject(tiny_run: Path, tiny_codes: Path) -> Subject:
    run = Run.open(tiny_run)
    return Subject(run.path.name, None, None, run, CodeStore.open(tiny_codes))


@pytest.fixture(scope="module")
def judged(tiny_run: Path, tiny_store: Path) -> Judged:
    return choose_judged([Run.open(tiny_run)], open_stores(tiny_store), StudyConfig(on_seen="use"))[0]


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory, subject: Subject) -> Path:
    """Masks of three quarters of the images: 1 has its place in the frame, 2 is anywhere, 3 is too small to cover half
    of a patch, and PLANTED is where the latent fires that fires most."""
    folder, rng = tmp_path_factory.mktemp("masks"), np.random.default_rng(0)
    codes = subject.codes
    fires = dense(codes)[:, 1:, most_active(codes)].reshape(-1, 3, 3) > 0
    for i, uri in enumerate(codes.images["uri"].to_pylist()):
        if i % 4 == 3:
            continue
        mask = np.zeros((24, 24), np.uint8)
        mask[:8] = 1
        row, column = rng.integers(0, 17, 2)
        mask[row : row + 8, column : column + 8] = 2
        mask[:2, :2] = 3
        mask[np.kron(fires[i], np.ones((8, 8), bool))] = PLANTED
        (folder / uri).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save((folder / uri).with_suffix(".png"))
    return folder


def dense(codes: CodeStore) -> NDArray[np.float64]:
    """[I, T, F]."""
    values = np.zeros((codes.n_images * codes.n_tokens, codes.n_latents))
    for number in range(codes.n_shards):
        shard = codes.read_shard(number)
        values[shard.row, np.repeat(np.arange(codes.n_latents), np.diff(shard.latent_indptr))] = shard.latent_value
    return values.reshape(codes.n_images, codes.n_tokens, -1)


def most_active(codes: CodeStore) -> int:
    return int(np.argmax(sum(codes.count_latents(shard) for shard in range(codes.n_shards))))


def read(subject: Subject, judged: Judged, **config: Any) -> LabeledPatches | Skipped:
    return read_patch_labels(subject.codes, judged, BenchmarkConfig(**config), "patch mAP")


@pytest.fixture(scope="module")
def labels(subject: Subject, judged: Judged, masks: Path) -> LabeledPatches:
    found = read(subject, judged, masks=masks)
    assert isinstance(found, LabeledPatches)
    return found


@pytest.fixture(scope="module")
def found(subject: Subject, judged: Judged, labels: LabeledPatches) -> dict[str, Measured]:
    measured = measure_patch_concepts(subject, judged, labels)
    assert all(isinstance(each, Measured) for each in measured)
    return {each.name: each for each in measured if isinstance(each, Measured)}


def test_a_concept_that_is_a_latent_is_found_and_what_covers_no_patch_is_left_out(
    subject: Subject, found: dict[str, Measured]
) -> None:
    details: Any = found["patch mAP"].details
    assert set(details["concepts"]) == {"1", "2", str(PLANTED)}
    assert details["left_out"] == ["3"]
    planted = details["concepts"][str(PLANTED)]
    assert planted["latent"] == most_active(subject.codes)
    assert planted["ap"] == pytest.approx(1)
    assert planted["purity"] == 1
    assert planted["chance"] < 0.9
    assert details["shuffled"] < found["patch mAP"].value  # type: ignore[operator]


def test_every_number_is_that_of_a_plain_computation(
    subject: Subject, judged: Judged, masks: Path, found: dict[str, Measured],
    monkeypatch: pytest.MonkeyPatch, labels: LabeledPatches,
) -> None:  # fmt: skip
    codes = subject.codes
    pixel = read_masks(codes, masks=masks)
    coverage, values = pixel.coverage(codes.grid), dense(codes)[:, 1:]
    halves = [np.flatnonzero(np.isin(pixel.images, images)) for images in (judged.choosing, judged.images)]
    z = [values[pixel.images[half]].reshape(-1, N_LATENTS) for half in halves]
    kept = [pixel.names.index(name) for name in ("1", "2", str(PLANTED))]
    y = [coverage[half].reshape(len(half) * 9, -1)[:, kept] >= 0.5 for half in halves]
    fits = fit_exactly(count_values(z[0].astype(np.float16), y[0]), *np.mgrid[:N_LATENTS, :3].reshape(2, -1))
    objective = fits.objective.reshape(N_LATENTS, 3)
    chosen = objective.argmin(0)
    details: Any = found["patch mAP"].details["concepts"]
    assert [each["latent"] for each in details.values()] == chosen.tolist()
    b, w = (each.reshape(N_LATENTS, 3)[chosen, range(3)] for each in (fits.b, fits.w))

    def plain(times: NDArray[np.int64]) -> dict[str, float]:
        """The numbers on some of the judged images, which may be there several times."""
        patches = (times[:, None] * 9 + np.arange(9)).ravel()
        scores, truth = (z[1][patches][:, chosen] * w + b), y[1][patches]
        chance = np.clip(1 / (1 + np.exp(-scores)), 1e-7, 1 - 1e-7)
        loss = -np.where(truth, np.log(chance), np.log1p(-chance)).mean(0)
        rate = truth.mean(0)
        base = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
        aps = [average_precision_score(truth[:, c], scores[:, c]) for c in range(3)]
        purities = []
        every = coverage[halves[1]].reshape(-1, len(pixel.names))[patches] >= 0.5
        every = np.concatenate([every, ~every.any(1, keepdims=True)], axis=1)
        for f in chosen:
            value = z[1][patches, f]
            top = np.argsort(-value, kind="stable")[:16]
            purities.append(every[top[value[top] > 0]].sum(0).max() / 16)
        return {
            "patch mAP": float(np.mean(aps)), "patch probe R": 1 - loss.sum() / base.sum(),
            "patch purity@16": float(np.mean(purities)), "patch coverage@0.3": float(np.mean(np.array(aps) >= 0.3)),
        }  # fmt: skip

    drawn = draw_weights(judged.resamples, labels.places)
    every = np.arange(len(halves[1]))
    for name, want in plain(every).items():
        assert found[name].value == pytest.approx(want, abs=1e-6), name
    for row in (3, 60):
        again = plain(np.repeat(every, drawn[row + 1]))
        for name in ("patch mAP", "patch probe R", "patch coverage@0.3"):
            replicates = found[name].replicates
            assert replicates is not None
            assert replicates[row] == pytest.approx(again[name], abs=1e-6), name
    local = score_latents(codes, pixel.take(halves[1]))
    assert found["pixel mAP"].value == pytest.approx(local.ap[chosen, kept].mean(), abs=1e-6)
    assert found["pointing"].value == pytest.approx(local.pointing[chosen, kept].mean())
    for each in found.values():
        span = interval(each.replicates)
        assert span is not None
        assert span[0] - 0.05 <= each.value <= span[1] + 0.05  # type: ignore[operator]
    monkeypatch.setattr(concept_latents, "RANGE_ENTRIES", 500)  # many ranges of latents give the same
    again = measure_patch_concepts(subject, judged, labels)
    assert [each.value for each in again if isinstance(each, Measured)] == [
        pytest.approx(each.value) for each in found.values()
    ]


def test_shuffled_labels_are_at_chance(
    subject: Subject, judged: Judged, masks: Path, tmp_path: Path, make_noise: Callable[[Path, Path, int], None]
) -> None:
    make_noise(masks, tmp_path / "noise", 5)
    noise = read(subject, judged, masks=tmp_path / "noise")
    assert isinstance(noise, LabeledPatches)
    first = next(each for each in measure_patch_concepts(subject, judged, noise) if each.name == "patch mAP")
    assert isinstance(first, Measured)
    assert first.value == pytest.approx(first.details["chance"], abs=0.1)


@pytest.fixture
def make_noise() -> Callable[[Path, Path, int], None]:
    """Write masks of the same names in which every patch carries one of two concepts, or none, at random."""

    def write(masks: Path, folder: Path, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for file in sorted(masks.rglob("*.png")):
            place = folder / file.relative_to(masks)
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.kron(rng.integers(0, 3, (3, 3)), np.ones((8, 8))).astype(np.uint8)).save(place)

    return write


def test_what_cannot_be_measured_is_left_out_with_the_reason(
    subject: Subject, judged: Judged, masks: Path, tmp_path: Path
) -> None:
    def reason(judged: Judged = judged, **config: Any) -> str:
        skipped = read(subject, judged, **config)
        assert isinstance(skipped, Skipped)
        assert measure_patch_concepts(subject, judged, skipped) == [skipped]
        assert "\n" not in skipped.reason
        return skipped.reason

    assert "None of the 75 images has a mask" in reason()
    assert "--legend must be" in reason(masks=masks, legend=tmp_path / "legend.txt")
    without = np.array([i for i in judged.images if i % 4 == 3])
    assert "none of the images to judge has a mask" in reason(replace(judged, images=without), masks=masks)
    small = tmp_path / "small"
    for file in sorted(masks.rglob("*.png")):
        (small / file.relative_to(masks)).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.pad(np.full((2, 2), 5, np.uint8), (0, 22))).save(small / file.relative_to(masks))
    assert "none of the 1 concepts covers half of a patch" in reason(masks=small)


@pytest.mark.parametrize("bias", [-1e4, -700.0, 0.0, 700.0, 1e4])
def test_a_fit_of_an_extreme_bias_stays_finite(bias: float) -> None:
    """A concept of a rate near 0 or 1: the gradient by b is sum of chances minus positives. Warnings are errors."""
    z, n, n_silent = np.array([[0.5, 2.0]]), np.array([[3.0, 1.0]]), np.array([5.0])
    at = np.array([[bias], [0.0]])
    objective, gradient, hessian, _ = logistic._differentiate(z, n, n_silent, np.array([2]), np.array([1.0]), at)
    chance = 0.0 if bias < 0 else 0.5 if bias == 0 else 1.0
    np.testing.assert_allclose(gradient[0], 9 * chance - 2, atol=1e-9)
    np.testing.assert_allclose(objective, 9 * max(bias, 0) - 2 * bias + (9 * np.log(2) if bias == 0 else 0))
    assert np.isfinite(hessian).all()
