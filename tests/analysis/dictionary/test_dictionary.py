"""inspect_dictionaries(): the pursuit, the cosines and the matching are those of a plain computation."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, nnls
from warm_process import WarmProcess

from actcache import ParentMismatchError, SettingsError, open_stores
from analysis import inspect_dictionaries
from analysis.dictionary.inspection import match_latents, measure_coherence, sample_tokens
from analysis.dictionary.pursuit import pursue, refit
from saetrain import Run, SAEConfig, TrainConfig, train


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def plain_pursuit(x: np.ndarray, dictionary: np.ndarray, k: int) -> np.ndarray:
    residual, chosen = x, []
    for _ in range(k):
        products = dictionary @ residual
        products[chosen] = -np.inf
        if products.max() <= 1e-6 * np.linalg.norm(x):
            break
        chosen.append(int(products.argmax()))
        values, _ = nnls(dictionary[chosen].T, x)
        residual = x - values @ dictionary[chosen]
    return x - residual


@settings(max_examples=25, deadline=None)
@example(seed=9945, n_latents=13, k=6)  # latents so similar that 200 sweeps of coordinate descent do not suffice
@given(seed=st.integers(0, 10_000), n_latents=st.integers(3, 40), k=st.integers(0, 6))
def test_the_pursuit_is_that_of_a_plain_loop_with_scipys_nnls(seed: int, n_latents: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    dictionary, x = unit(rng.normal(size=(n_latents, 8))), rng.normal(size=(9, 8))
    budget = rng.integers(0, min(k, n_latents) + 1, 9)
    found, n_used = pursue(torch.from_numpy(x), torch.from_numpy(dictionary), torch.from_numpy(budget))
    for row in range(9):
        wanted = plain_pursuit(x[row], dictionary, int(budget[row]))
        np.testing.assert_allclose(found[row].numpy(), wanted, atol=2e-3 * np.linalg.norm(x[row]))
    assert (n_used.numpy() <= budget).all()


def test_it_finds_a_sparse_code_where_the_latents_are_far_apart() -> None:
    rng = np.random.default_rng(0)
    dictionary = unit(rng.normal(size=(96, 256)))
    codes = np.zeros((600, 96))
    for row in codes:
        row[rng.choice(96, 4, replace=False)] = rng.uniform(1, 2, 4)
    x = torch.from_numpy(codes @ dictionary).float()
    found, n_used = pursue(x, torch.from_numpy(dictionary).float(), torch.full((600,), 4))
    error = (found - x).norm(dim=1) / x.norm(dim=1)
    assert float((error < 1e-3).double().mean()) > 0.99
    assert float((n_used == 4).double().mean()) > 0.99


def test_refitting_is_nonnegative_least_squares() -> None:
    rng = np.random.default_rng(1)
    dictionary, x = unit(rng.normal(size=(30, 12))), rng.normal(size=(300, 12))
    active = rng.random((300, 30)) < 0.15
    active[7] = False  # a row without any
    rows, latents = np.nonzero(active)
    found = refit(*map(torch.from_numpy, (x, dictionary, rows, latents)))
    for row in range(300):
        mine = dictionary[active[row]]
        wanted = nnls(mine.T, x[row])[0] @ mine if len(mine) else np.zeros(12)
        np.testing.assert_allclose(found[row].numpy(), wanted, atol=2e-3)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 30), m=st.integers(1, 30))
def test_the_matching_is_the_dense_hungarian_one(seed: int, n: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = unit(rng.normal(size=(n, 6))), unit(rng.normal(size=(m, 6)))
    cosines = np.maximum(a @ b.T, 0)  # a latent may stay alone, at 0
    matched = cosines[linear_sum_assignment(-cosines)]
    found = match_latents(a, b)
    assert found.mean_cosine == pytest.approx(matched.sum() / min(n, m), abs=1e-5)
    assert found.above_70 == pytest.approx((matched > 0.7).sum() / min(n, m), abs=1e-9)
    assert found.mean_largest == pytest.approx((a @ b.T).max(1).mean(), abs=1e-5)
    back = match_latents(b, a)
    assert back.mean_cosine == pytest.approx(found.mean_cosine, abs=1e-5)


def test_a_permuted_dictionary_matches_whole_with_few_candidates() -> None:
    rng = np.random.default_rng(3)
    a = unit(rng.normal(size=(1500, 24)))
    found = match_latents(a, 3.0 * a[rng.permutation(1500)][:1200], n_candidates=4)
    assert (found.mean_cosine, found.above_90) == (pytest.approx(1, abs=1e-5), 1.0)
    assert (found.n_first, found.n_second) == (1500, 1200)


def test_coherence_over_several_blocks() -> None:
    rng = np.random.default_rng(4)
    rows = unit(rng.normal(size=(1100, 16)))
    rows[1099] = -rows[3]  # opposite directions are as coherent
    cosines = abs(rows @ rows.T)
    np.fill_diagonal(cosines, 0)
    found = measure_coherence(torch.from_numpy(rows).float())
    assert found.largest == pytest.approx(1, abs=1e-5)
    assert found.mean == pytest.approx(cosines.max(1).mean(), abs=1e-5)
    assert found.quantiles == pytest.approx(np.quantile(cosines.max(1), [0.1, 0.5, 0.9]), abs=1e-4)
    assert found.welch_bound == pytest.approx(np.sqrt((1100 - 16) / (16 * 1099)))
    orthogonal = measure_coherence(torch.eye(8))
    assert (orthogonal.largest, orthogonal.welch_bound) == (0, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Runs on a store whose dictionary is known


def planted_module() -> ModuleType:
    """The planted store of the trainer's tests."""
    path = Path(__file__).parents[2] / "saetrain" / "conftest.py"
    spec = importlib.util.spec_from_file_location("planted_store", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make_planted() -> Callable[..., Path]:
    made: Callable[..., Path] = planted_module().write_store
    return made


@pytest.fixture(scope="module")
def planted_atoms() -> np.ndarray:
    atoms: np.ndarray = planted_module().planted_atoms()
    return atoms


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, make_planted: Callable[..., Path]) -> Path:
    return make_planted(tmp_path_factory.mktemp("planted") / "planted.acts")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory, planted: Path) -> Path:
    """Two runs that differ in their seed, long enough to find the planted dictionary."""
    folder = tmp_path_factory.mktemp("seeds")
    for seed in (0, 1):
        config = TrainConfig(n_steps=500, batch_size=256, lr=3e-3, dead_tokens=5000, pool_tokens=2000, seed=seed)
        train(planted, folder / f"seed{seed}", sae=SAEConfig(n_latents=96, k=3), config=config)
    return folder


def test_two_seeds_find_the_planted_dictionary(seeds: Path, planted: Path, planted_atoms: np.ndarray) -> None:
    found = inspect_dictionaries(seeds, planted, n_tokens=200, truth=planted_atoms)
    assert [one.run for one in found.runs] == ["seed0", "seed1"]
    assert [(one.first, one.second) for one in found.matchings] == [
        ("seed0", "seed1"), ("truth", "seed0"), ("truth", "seed1"),
    ]  # fmt: skip
    for run in found.runs:
        gap = run.gap
        assert gap.n_tokens == 200
        assert gap.l0 == pytest.approx(3, abs=0.2)
        assert gap.l0_pursuit <= gap.l0
        assert gap.fvu_refit <= gap.fvu + 1e-6  # the same latents with the best values
        assert gap.fvu_pursuit < gap.fvu
        assert gap.gap == gap.fvu - gap.fvu_pursuit
    for one in found.matchings[1:]:
        assert one.n_first == len(planted_atoms)
        assert one.mean_largest > 0.9
        assert one.above_90 > 0.75
    assert found.matchings[0].mean_cosine > 0.5
    assert found == inspect_dictionaries(seeds, planted, n_tokens=200, truth=planted_atoms)


def test_the_numbers_of_the_sae_are_those_of_its_own_forward(seeds: Path, planted: Path) -> None:
    run = Run.open(seeds / "seed1")
    x = sample_tokens(run, open_stores(planted), 8 * 150, 5)[:150]
    sae = run.sae()
    rows, latents, values = sae.encode(x)
    error = (x - sae.decode(rows, latents, values, len(x))).double().square().sum()
    wanted = float(error / (x.double() - x.double().mean(0)).square().sum())
    gap = inspect_dictionaries(run, planted, n_tokens=150, seed=5).runs[0].gap
    assert gap.fvu == pytest.approx(wanted, rel=1e-4)
    assert gap.l0 == pytest.approx(len(rows) / len(x))


def test_bad_input_is_named(tmp_path: Path, seeds: Path, planted: Path, make_planted: Callable[..., Path]) -> None:
    runs = [seeds / "seed0", seeds / "seed1"]
    np.save(tmp_path / "narrow.npy", np.ones((4, 7)))
    np.save(tmp_path / "nan.npy", np.full((4, 32), np.nan))
    np.save(tmp_path / "objects.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"n_tokens": 0}, "--n-tokens must be at least 1"),
        ({"truth": tmp_path / "narrow.npy"}, r"directions \[N, 32\]"),
        ({"truth": tmp_path / "nan.npy"}, "not finite"),
        ({"truth": tmp_path / "objects.npy"}, "not a .npy file"),
        ({"truth": tmp_path / "none.npy"}, "not a .npy file"),
    ]
    for how, text in bad:
        with pytest.raises(SettingsError, match=text):
            inspect_dictionaries(runs, planted, **how)
    with pytest.raises(SettingsError, match="given twice"):
        inspect_dictionaries([runs[0], runs[0]], planted)
    other = make_planted(tmp_path / "other.acts", model_id="other")
    with pytest.raises(ParentMismatchError, match="model"):
        inspect_dictionaries(runs, other)
    two = make_planted(tmp_path / "two.acts", layers=(0, 1), n_images=64, failed=())
    config = TrainConfig(n_steps=2, batch_size=64)
    deeper = train(two, tmp_path / "deeper", layer=1, sae=SAEConfig(n_latents=32, k=3), config=config)
    with pytest.raises(SettingsError, match="different hook points"):
        inspect_dictionaries([runs[0], deeper], two)


def test_the_command_line_prints_tables_or_json(seeds: Path, planted: Path, tmp_path: Path, warm: WarmProcess) -> None:
    command = ("--quiet", "inspect", seeds, "--store", planted, "--n-tokens", "100")
    done = warm.run("cli.py", *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "seed0" in done.stdout
    assert "pursuit" in done.stdout
    done = warm.run("cli.py", "--json", *command, cwd=tmp_path)
    facts = json.loads(done.stdout)
    assert len(facts["runs"]) == 2
    assert facts["matchings"][0]["above_90"] <= facts["matchings"][0]["above_70"]
