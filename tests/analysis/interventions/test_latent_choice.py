"""Lists of latents: the top ones by count, and others as frequent as these."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from analysis.intervals import bootstrap_intervals, resample_means, wilson_interval
from analysis.interventions.latent_choice import match_frequency, rank_latents, split_halves

COUNTS = arrays(np.int32, st.tuples(st.integers(1, 4), st.integers(2, 30)), elements=st.integers(0, 50))


@given(COUNTS, st.integers(1, 40))
@settings(deadline=None)
def test_ranks_are_those_of_a_plain_sort(counts: np.ndarray, k: int) -> None:  # type: ignore[type-arg]
    found = rank_latents(counts, k)
    for row, listed in zip(counts, found, strict=True):
        wanted = [s for s in sorted(range(len(row)), key=lambda s: (-row[s], s)) if row[s] > 0][:k]
        assert listed[listed >= 0].tolist() == wanted
        assert (listed[len(wanted) :] == -1).all()


@given(COUNTS, st.integers(1, 30), st.integers(0, 5))
@settings(deadline=None)
def test_controls_are_others_live_and_distinct(counts: np.ndarray, k: int, seed: int) -> None:  # type: ignore[type-arg]
    lists = rank_latents(counts, k)
    frequency = counts.sum(0)
    drawn = match_frequency(lists, frequency, rng=np.random.default_rng(seed))
    room = [(frequency > 0).sum() - (row >= 0).sum() >= (row >= 0).sum() for row in lists]
    assert (drawn is not None) == all(room)
    if drawn is None:
        return
    for mine, other in zip(lists, drawn, strict=True):
        others = other[other >= 0].tolist()
        assert len(others) == len(set(others)) == (mine >= 0).sum()
        assert not set(others) & set(mine.tolist())
        assert (frequency[others] > 0).all()


def test_controls_are_as_frequent() -> None:
    rng = np.random.default_rng(0)
    frequency = np.round(np.exp(rng.uniform(2, 12, 5000))).astype(np.int64)
    lists = rng.choice(5000, size=(3, 50), replace=False)
    first = match_frequency(lists, frequency, rng=np.random.default_rng(1))
    second = match_frequency(lists, frequency, rng=np.random.default_rng(2))
    assert first is not None
    assert second is not None
    assert (first != second).mean() > 0.5  # draws differ
    for mine, other in zip(lists, first, strict=True):
        ratio = np.sort(np.log(frequency[mine])) - np.sort(np.log(frequency[other]))
        assert np.abs(ratio).max() < 0.5
        assert abs(ratio.mean()) < 0.05


def test_halves_cut_every_class_in_two() -> None:
    labels = np.array([0, 1, -1, 0, 1, 0, 1, 0, 2, -1, 0])
    first, second = split_halves(labels, seed=3)
    assert sorted([*first, *second]) == np.flatnonzero(labels >= 0).tolist()
    assert np.bincount(labels[first], minlength=3).tolist() == [2, 1, 0]
    assert np.bincount(labels[second], minlength=3).tolist() == [3, 2, 1]
    assert split_halves(labels, seed=3)[0].tolist() == first.tolist()


def test_intervals_cover_as_they_say() -> None:
    low, high = wilson_interval(498, 1000)  # p +- 1.96 sqrt(p q / n), nearly, in the middle
    assert np.allclose([low, high], [0.4671, 0.5289], atol=1e-4)
    assert wilson_interval(0, 10)[0] == 0
    assert np.isclose(wilson_interval(10, 10)[1], 1)
    rng = np.random.default_rng(0)
    values = rng.normal(3, 2, (400, 2))
    values[:, 1] = values[:, 0] + 1  # paired: the same resamples
    lows, highs = bootstrap_intervals(values, seed=1)
    half = 1.96 * values[:, 0].std() / 20
    assert np.allclose([lows[0], highs[0]], [values[:, 0].mean() - half, values[:, 0].mean() + half], atol=0.05)
    assert np.allclose([lows[1] - lows[0], highs[1] - highs[0]], 1)


def test_seeds_and_images_are_drawn_together() -> None:
    rng = np.random.default_rng(0)
    images, seeds = rng.normal(0, 1, 400), rng.normal(0, 0.3, 30)
    values = [(images + shift)[:, None] for shift in seeds]
    every = [np.arange(400)] * 30
    spread = resample_means(values, every, seed=1).std()
    assert np.isclose(spread, np.hypot(images.std() / 20, seeds.std() / np.sqrt(30)), rtol=0.1)
    halves = [rng.permutation(400)[:200] for _ in seeds]  # an image that several seeds judge is drawn for all of them
    spread = resample_means([images[half][:, None] for half in halves], halves, seed=1).std()
    assert np.isclose(spread, images.std() / 20, rtol=0.15)
