"""nearest_cosines() against all cosines, for dictionaries on both sides of the sizes at which it groups them."""

import numpy as np
import pytest

from analysis.cosines import nearest_cosines


@pytest.mark.parametrize("n_latents", [9, 255, 256, 300, 511, 512, 1027])
def test_the_nearest_are_those_of_all_cosines(n_latents: int) -> None:
    rows = np.random.default_rng(n_latents).normal(size=(n_latents, 24)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    found = nearest_cosines(rows, rows, 8, start=0)
    cosine = rows @ rows.T
    np.fill_diagonal(cosine, -2)
    expected = np.argsort(-cosine, axis=1, kind="stable")[:, :8]
    np.testing.assert_allclose(found.cosine, np.take_along_axis(cosine, expected, axis=1), atol=1e-6)
    np.testing.assert_array_equal(found.neighbor, expected)
