"""PCA by rank: the numbers are those of scikit-learn's PCA, and a planted rank is found."""

from pathlib import Path

import numpy as np
import pytest

from actcache import HookPoint, open_stores, write_store
from analysis.benchmark.baselines import make_signed
from analysis.benchmark.fitting import FittingTokens, measure_moments
from analysis.benchmark.pca_curve import measure_pca_curve
from analysis.benchmark.resamples import Resamples
from analysis.benchmark.subject import Judged
from saetrain import Run
from saetrain.interop import write_imported

D, N_TOKENS = 24, 5
HOOK = HookPoint(1)


def make(folder: Path, activations: np.ndarray) -> tuple[Run, Judged]:
    """A store of activations [I, T, D], of which the second half is judged, and the PCA baseline of the first half."""
    shape = {"n_images": len(activations), "n_tokens": N_TOKENS, "d_model": D}
    with write_store(folder / "x.acts", **shape, layers=[1], model_name="m", dtype="float32", source="x") as writer:  # type: ignore[arg-type]
        for rows in writer:
            writer.write(activations[rows])
    store = open_stores(folder / "x.acts")
    images = np.arange(store.n_images)
    half = len(images) // 2
    judged = Judged(store, images[half:], images[:half], Resamples(len(images) - half, n=20, seed=3), 0)
    moments = measure_moments(FittingTokens(store, HOOK, "all", judged.choosing))
    sae = make_signed(moments.mean, moments.components, 3)
    facts = {"format": "baseline pca", "tokens": "all", "provenance": {"source": "test"}}
    return write_imported(folder / "pca", sae, store, HOOK, **facts), judged  # type: ignore[arg-type]


def test_every_rank_is_that_of_scikit_learn_and_so_is_its_interval(tmp_path: Path) -> None:
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(90, N_TOKENS, D)) @ rng.normal(size=(D, D)) + 4 * rng.normal(size=D)
    run, judged = make(tmp_path, mixed.astype(np.float32))
    points = measure_pca_curve(run, judged, "all")
    assert [each.n_components for each in points] == [1, 4, 16, D]
    x = judged.store.read(HOOK).astype(np.float64)
    fitted = PCA(D, svd_solver="full").fit(x[judged.choosing].reshape(-1, D))

    def plain_fvu(images: np.ndarray, rank: int) -> float:
        rows = x[images].reshape(-1, D)
        directions = fitted.components_[:rank]
        back = (rows - fitted.mean_) @ directions.T @ directions + fitted.mean_
        return float(np.square(rows - back).sum() / np.square(rows - rows.mean(0)).sum())

    weights = judged.resamples.weights(0, len(judged.images))
    for each in points:
        assert each.fvu == pytest.approx(plain_fvu(judged.images, each.n_components), rel=1e-4, abs=1e-9)
        again = [plain_fvu(np.repeat(judged.images, counts), each.n_components) for counts in weights]
        low, high = np.percentile(again, (2.5, 97.5))
        assert (each.low, each.high) == (
            pytest.approx(low, rel=1e-4, abs=1e-9),
            pytest.approx(high, rel=1e-4, abs=1e-9),
        )


def test_a_planted_rank_is_found_and_constant_activations_have_no_curve(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    planted = rng.normal(size=(60, N_TOKENS, 4)) @ rng.normal(size=(4, D)) + 1
    one, four, *rest = measure_pca_curve(*make(tmp_path / "a", planted.astype(np.float32)), "all")
    assert one.fvu > 0.1
    assert four.fvu == pytest.approx(0, abs=1e-5)
    assert all(each.fvu == pytest.approx(0, abs=1e-5) for each in rest)
    assert measure_pca_curve(*make(tmp_path / "b", np.ones((20, N_TOKENS, D), np.float32)), "all") == ()
