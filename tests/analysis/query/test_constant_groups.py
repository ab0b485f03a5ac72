"""Cohen's d is NaN where a latent varies in neither group, whatever its magnitude, and exact where it hardly varies."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_codes import write_codes

from analysis.query import query_groups
from analysis.query.groups import rank_groups

BITS = 48


def contrast(a: list[int], b: list[int], unit: float) -> Any:
    """Of one latent, given its scores in units."""
    key = [(units << 1) | in_a for scores, in_a in ((a, 1), (b, 0)) for units in scores if units]
    return rank_groups(np.array(key, dtype=np.int64), BITS, n_a=len(a), n_b=len(b), unit=unit)


def plain_d(a: list[int], b: list[int]) -> float:
    """Exact up to the last square root."""
    means = [Fraction(sum(x), len(x)) for x in (a, b)]
    within = sum(((v - m) ** 2 for x, m in zip((a, b), means, strict=True) for v in x), Fraction(0))
    if not within:
        return float("nan")
    difference = means[0] - means[1]
    squared = difference**2 / (within / (len(a) + len(b) - 2))
    return float(np.sign(float(difference))) * float(squared) ** 0.5


MAGNITUDES = st.integers(0, BITS - 1).flatmap(lambda bits: st.integers(1 << bits >> 1, (1 << bits) - 1))


@settings(max_examples=300, deadline=None)
@given(
    a=MAGNITUDES, b=MAGNITUDES, n_a=st.integers(2, 400), n_b=st.integers(2, 400),
    unit=st.sampled_from([2.0**-24, 2.0**-24 / 197, 1 / 3, 1e-12, 7e4]),
)  # fmt: skip
def test_constants_of_any_magnitude_have_no_effect_size(a: int, b: int, n_a: int, n_b: int, unit: float) -> None:
    if a or b:
        assert np.isnan(contrast([a] * n_a, [b] * n_b, unit).cohen_d).all()


@settings(max_examples=300, deadline=None)
@given(
    base=MAGNITUDES, steps=st.lists(st.integers(0, 3), min_size=4, max_size=60), cut=st.integers(2, 58),
    zeros=st.integers(0, 5), unit=st.sampled_from([2.0**-24, 2.0**-24 / 197, 1 / 3]),
)  # fmt: skip
def test_small_differences_of_large_scores_are_exact(
    base: int, steps: list[int], cut: int, zeros: int, unit: float
) -> None:
    scores = [base + step for step in steps]
    cut = min(cut, len(scores) - 2)
    a, b = scores[:cut] + [0] * zeros, scores[cut:]
    if not any(a + b):
        return
    found, wanted = contrast(a, b, unit).cohen_d[0], plain_d(a, b)
    if np.isnan(wanted):
        assert np.isnan(found)
    elif base < 1 << 40:  # the scores themselves have 53 bits
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("score", ["mean", "max"])
@pytest.mark.parametrize("values", [(0.1, 0.3), (0.7, 0.7), (61234.0, 0.000061), (3.0, 0.0)])
def test_a_query_of_groups_that_do_not_vary_answers_nan(
    tmp_path: Path, score: str, values: tuple[float, float]
) -> None:
    dense = np.zeros((30, 5, 3), dtype=np.float16)
    labels = np.arange(30) % 2
    for label, value in enumerate(values):
        dense[labels == label, 1:4, 0] = value
    dense[:, 2, 1] = np.arange(30) / 7  # a latent that varies
    codes = write_codes(tmp_path / "x.codes", dense, [16, 14], labels.astype(np.int32))
    rows = {row["latent"]: row for row in query_groups(codes, "label == 0", "label == 1", score=score).to_pylist()}
    assert np.isnan(rows[0]["cohen_d"])
    assert np.isfinite(rows[1]["cohen_d"])
