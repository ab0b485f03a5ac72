"""Two groups are compared by compiled loops as without a compiler."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_codes import write_codes

import analysis.query.groups
from actcache.compiler import find_kernels
from analysis.query.groups import contrast_groups

pytestmark = pytest.mark.skipif(find_kernels("analysis.query.kernels") is None, reason="there is no compiler")


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 40), st.integers(0, 2**20), st.sampled_from(["mean", "max"]), st.sampled_from([1, 1 << 22]))
def test_groups_are_compared_as_without_a_compiler(n_images: int, seed: int, score: str, batch: int) -> None:
    """With ties, silent latents, latents that are the same on all images, images in neither group, and many entries."""
    rng = np.random.default_rng(seed)
    values = rng.choice([0.25, 0.5, 1.0, 2.0**-24, 65504], (n_images, 5, 7))
    dense = np.where(rng.random(values.shape) < rng.choice([0, 0.1, 0.5, 1], 7), values, 0).astype(np.float16)
    dense[:, :, 5] = 0.5
    order = rng.permutation(n_images)
    a, b = (np.isin(np.arange(n_images), part) for part in (order[:2], order[2 : 4 + (n_images - 4) // 2]))
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis.query.groups, "BATCH_ENTRIES", batch)
        patch.setattr(analysis.query.groups, "LEAST_ENTRIES", 0)
        codes = write_codes(Path(folder) / "x.codes", dense, [3, n_images - 3])
        found = contrast_groups(codes, a, b, score=score)
        patch.setattr(analysis.query.groups, "LEAST_ENTRIES", 1 << 62)
        expected = contrast_groups(codes, a, b, score=score)
    np.testing.assert_array_equal(found.latent, expected.latent)
    for name in ("auroc", "cohen_d", "p", "mean_a", "mean_b", "share_a", "share_b"):
        one, other = getattr(found, name), getattr(expected, name)
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12, err_msg=name)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**20), st.integers(0, 47), st.integers(0, 40), st.booleans())
def test_keys_are_sorted_by_their_scores(n: int, seed: int, n_bits: int, n_zeros: int, is_constant: bool) -> None:
    """Few keys and many, of one score or of many, with bits in which none differ."""
    kernels = find_kernels("analysis.query.kernels")
    assert kernels is not None
    rng = np.random.default_rng(seed)
    scores = np.full(n, 5 << n_zeros) if is_constant else rng.integers(0, 1 << n_bits, n) << min(n_zeros, 47 - n_bits)
    key = np.concatenate([(scores << 1) | rng.integers(0, 2, n), [7]])
    spare, expected = np.zeros_like(key), np.sort(key[:n])
    is_spare = kernels.sort_keys(key, spare, n, np.empty(1 << kernels.DIGIT, np.uint64))
    found = (spare if is_spare else key)[:n]
    np.testing.assert_array_equal(found >> 1, expected >> 1)
    np.testing.assert_array_equal(np.sort(found), expected)
