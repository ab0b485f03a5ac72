"""AUROC and IoU against plain loops; choosing and judging never share an image."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.heat_maps import heat_maps, upsample
from analysis.localization.recovery import Labeled, auroc_table, patch_scores, recover_concepts
from saetrain import CodeStore


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(1, 3), st.integers(1, 3), st.data())
def test_auroc_is_the_share_of_ordered_pairs(
    n_images: int, n_latents: int, n_concepts: int, data: st.DataObject
) -> None:
    values = st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.0])
    scores = np.array(data.draw(st.lists(values, min_size=n_latents * n_images, max_size=n_latents * n_images)))
    scores = scores.reshape(n_latents, n_images).astype(np.float32)
    flags = data.draw(st.lists(st.booleans(), min_size=n_images * n_concepts, max_size=n_images * n_concepts))
    present = np.array(flags).reshape(n_images, n_concepts)
    table = auroc_table(scores, present)
    for f in range(n_latents):
        for c in range(n_concepts):
            positive, negative = scores[f, present[:, c]], scores[f, ~present[:, c]]
            if not len(positive) or not len(negative):
                assert np.isnan(table[f, c])
                continue
            wins = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
            assert table[f, c] == pytest.approx(np.mean(wins), abs=1e-12)


def test_upsampling_keeps_a_plane_and_the_corners() -> None:
    row, column = np.mgrid[0:4, 0:5].astype(np.float32)
    up = upsample((2 * row + column)[None], 8, 10)[0]
    assert up.shape == (8, 10)
    assert up[0, 0] == 0
    assert up[-1, -1] == 2 * 3 + 4
    inner = up[1:-1, 1:-1]
    np.testing.assert_allclose(np.diff(inner, axis=0), 1.0, atol=1e-6)  # half a patch a pixel, slope 2
    np.testing.assert_allclose(np.diff(inner, axis=1), 0.5, atol=1e-6)


def test_patch_scores_leave_cls_out(tiny_codes: Path) -> None:
    codes = CodeStore.open(tiny_codes)
    scores = patch_scores(codes)
    for latent in (0, 5, 63):
        rows, values = codes.read_latent(latent)
        image, token = np.divmod(rows, codes.n_tokens)
        for i in range(codes.n_images):
            mine = values[(image == i) & (token > 0)]
            assert scores[latent, i] == (mine.max() if len(mine) else 0)


def test_a_concept_that_is_a_latent_is_recovered(tiny_codes: Path) -> None:
    """Truth is defined by a latent itself: it must be found, with AUROC 1 and the IoU of its own cut map."""
    codes = CodeStore.open(tiny_codes)
    scores = patch_scores(codes)
    planted = int(np.argmin(abs((scores > 0).mean(1) - 0.4)))
    present = (scores[planted] > 0)[:, None]

    def masks(images: np.ndarray, concept: int) -> np.ndarray:
        return upsample(heat_maps(codes, planted, images), 24, 24) > 0.3 * scores[planted].max()

    (found,) = recover_concepts(("planted",), Labeled(codes, present, masks), Labeled(codes, present, masks))
    assert found.latent == planted
    assert found.auroc == 1
    assert found.iou > 0.99
