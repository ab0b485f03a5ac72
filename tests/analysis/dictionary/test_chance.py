"""What a best partner is worth by chance stands beside it; a pursuit is never worse than the SAE's own support."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import inspect_dictionaries
from analysis.cosines import shuffle_channels
from analysis.dictionary.inspection import match_latents
from saetrain import SAEConfig, TrainConfig, train


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(40, 400), d=st.integers(6, 24))
def test_unrelated_dictionaries_are_as_similar_as_chance_and_equal_ones_are_not(seed: int, n: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = unit(rng.normal(size=(n, d))), unit(rng.normal(size=(n, d)))
    unrelated, same = match_latents(a, b), match_latents(a, a)
    assert unrelated.mean_largest_shuffled is not None
    assert unrelated.mean_cosine_shuffled is not None
    assert unrelated.mean_largest == pytest.approx(unrelated.mean_largest_shuffled, abs=0.08)
    assert unrelated.mean_cosine == pytest.approx(unrelated.mean_cosine_shuffled, abs=0.1)
    assert same.mean_largest == pytest.approx(1, abs=1e-5)
    assert same.mean_largest_shuffled is not None
    assert same.mean_largest_shuffled < 0.97


@given(seed=st.integers(0, 10_000))
def test_a_shuffled_dictionary_keeps_its_own_cosines(seed: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(9, 5)).astype(np.float32)
    assert np.allclose(shuffle_channels(rows, seed) @ shuffle_channels(rows, seed).T, rows @ rows.T, atol=1e-5)


@pytest.mark.parametrize(("k", "n_steps", "seed"), [(1, 1, 0), (2, 20, 1), (4, 200, 2), (8, 60, 3)])
def test_the_pursuit_bounds_the_refit(tmp_path: Path, tiny_store: Path, k: int, n_steps: int, seed: int) -> None:
    config = TrainConfig(n_steps=n_steps, batch_size=128, lr=3e-3, seed=seed)
    run = train(tiny_store, tmp_path / "run", layer=2, sae=SAEConfig(n_latents=64, k=k), config=config)
    gap = inspect_dictionaries(run, tiny_store, n_tokens=300).runs[0].gap
    assert gap.fvu_pursuit <= gap.fvu_refit + 1e-6
    assert gap.fvu_refit <= gap.fvu + 1e-6
    assert gap.l0_pursuit <= gap.l0
