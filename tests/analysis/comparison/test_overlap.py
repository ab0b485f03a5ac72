"""Overlap of two models' latents against plain computations, and what must hold of any lists."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.comparison.overlap import compare_counts, group_latents, improvement_rate, jaccard, rank_biased_overlap

lists = st.lists(st.integers(0, 12), unique=True, min_size=1, max_size=8)


@given(lists, lists)
def test_overlaps_are_shares_and_know_equal_lists(a: list[int], b: list[int]) -> None:
    for measure in (jaccard, rank_biased_overlap):
        assert 0 <= measure(a, b) <= 1
        assert measure(a, b) == pytest.approx(measure(b, a))
        assert measure(a, a) == pytest.approx(1)
        assert (measure(a, b) == 0) == (not set(a) & set(b))


def test_what_stands_first_counts_most() -> None:
    assert rank_biased_overlap([1, 2, 3], [1, 2, 4]) > rank_biased_overlap([1, 2, 3], [4, 2, 3])
    assert rank_biased_overlap([1, 2], [1, 3], 0.5) == pytest.approx((1 + 0.5 * 0.5) / 1.5)
    assert np.isnan(jaccard([], []))


def test_groups_lie_between_their_bounds() -> None:
    base = np.array([90, 80, 70, 1, 0, 50, 0])
    adapted = np.array([95, 2, 60, 85, 0, 55, 0])
    groups = group_latents(base, adapted, high=4, low=7)  # of 95 90 85 80 70 60 55 50 ...: bounds 80 and 55
    assert {name: found.tolist() for name, found in groups.items()} == {
        "high": [0], "high_to_low": [1], "low_to_high": [3],
    }  # fmt: skip
    same = group_latents(base, base, high=2, low=3)
    assert (same["high_to_low"].size, same["low_to_high"].size) == (0, 0)


def test_counts_of_classes_and_of_the_dataset() -> None:
    rng = np.random.default_rng(0)
    base, adapted = rng.poisson(3, (2, 30)), rng.poisson(3, (2, 30))
    found = compare_counts(base, adapted, ["a", "b"], k=5, high=5, low=10)
    for c in range(2):
        tops = [set(sorted(range(30), key=lambda s, x=x: (-x[c, s], s))[:5]) for x in (base, adapted)]
        assert found.classes[c].jaccard == pytest.approx(len(tops[0] & tops[1]) / len(tops[0] | tops[1]))
    assert found.task.jaccard == pytest.approx(np.mean([row.jaccard for row in found.classes]))
    a, b = base.sum(0), adapted.sum(0)
    live = (a + b) > 0
    assert found.dataset.correlation == pytest.approx(np.corrcoef(a[live], b[live])[0, 1])
    assert [list(part) for part in found.scatter] == [np.flatnonzero(live).tolist(), a[live].tolist(), b[live].tolist()]
    assert improvement_rate(0.5, 0.75) == 0.5
    assert np.isnan(improvement_rate(1.0, 1.0))
