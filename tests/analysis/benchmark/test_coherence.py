"""Measure 7: Moran's I is that of the plain double sum, its null that of permuted patches, and blobs are told apart."""

import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_codes import write_codes

from analysis.benchmark.coherence import NAME, measure_coherence
from analysis.benchmark.measured import Measured, Skipped
from analysis.benchmark.morans import LEAST_IMAGES, LEAST_PATCHES, Grid, measure_morans
from analysis.benchmark.resamples import Resamples
from analysis.benchmark.subject import Judged, Subject
from saetrain import CodeStore


@cache
def list_links(h: int, w: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """All ordered pairs of neighbors."""
    places = list(itertools.product(range(h), range(w)))
    return [(p, q) for p in places for q in places if p != q and max(abs(p[0] - q[0]), abs(p[1] - q[1])) == 1]


def plain_moran(x: np.ndarray) -> float:
    """Moran's I of a dense map [H, W]: the double loop over patches."""
    centered, links = x - x.mean(), list_links(*x.shape)
    return x.size / len(links) * sum(centered[p] * centered[q] for p, q in links) / np.square(centered).sum()


def of_map(x: np.ndarray) -> tuple[float, float]:
    """(I, variance) of a dense map, from its active patches."""
    flat = x.reshape(-1)
    patch = np.flatnonzero(flat)
    index, variance = measure_morans(patch, flat[patch], np.array([len(patch)]), Grid(*x.shape))
    return float(index[0]), float(variance[0])


@settings(max_examples=80, deadline=None)
@given(
    h=st.integers(1, 7), w=st.integers(1, 7), share=st.floats(0.1, 0.9), n=st.integers(1, 4), seed=st.integers(0, 999)
)
def test_moran_is_that_of_the_double_sum_on_grids_of_any_shape(h: int, w: int, share: float, n: int, seed: int) -> None:
    if h * w < 4:
        return
    rng = np.random.default_rng(seed)
    maps = []
    for _ in range(n):  # several pairs, side by side
        x = np.where(rng.random((h, w)) < share, rng.lognormal(0, 1, (h, w)), 0)
        x.flat[rng.integers(h * w)] = 1.0
        x.flat[rng.integers(h * w)] = 0.0
        maps.append(x if x.any() else np.eye(h, w))
    active = [np.flatnonzero(x) for x in maps]
    values = [x.reshape(-1)[patch] for x, patch in zip(maps, active, strict=True)]
    counts = np.array([len(patch) for patch in active])
    index, _ = measure_morans(np.concatenate(active), np.concatenate(values), counts, Grid(h, w))
    np.testing.assert_allclose(index, [plain_moran(x) for x in maps], atol=1e-9)
    links = sum(
        max(abs(a - c), abs(b - d)) == 1 for a in range(h) for b in range(w) for c in range(h) for d in range(w)
    )
    assert Grid(h, w).degree.sum() == links


def test_the_null_is_that_of_all_permutations_of_the_patches() -> None:
    x = np.array([3.0, 0, 1, 0, 0, 2])
    for shape in ((2, 3), (1, 6), (6, 1)):
        drawn = [plain_moran(np.array(each).reshape(shape)) for each in itertools.permutations(x)]
        assert np.mean(drawn) == pytest.approx(-1 / 5)
        assert of_map(x.reshape(shape))[1] == pytest.approx(np.var(drawn))


def test_the_null_is_that_of_random_permutations_on_a_vision_transformers_grid() -> None:
    rng = np.random.default_rng(0)
    flat = np.zeros(14 * 14)
    flat[:12] = rng.lognormal(0, 1, 12)
    drawn = np.array([of_map(rng.permutation(flat).reshape(14, 14))[0] for _ in range(4000)])
    _, variance = of_map(flat.reshape(14, 14))
    assert drawn.mean() == pytest.approx(-1 / 195, abs=4 * drawn.std() / 4000**0.5)
    assert drawn.std() == pytest.approx(variance**0.5, rel=0.06)


@pytest.mark.parametrize(
    ("name", "wanted"), [("3x3", 0.59), ("7x7", 0.77), ("half", 0.89), ("line", 0.20), ("checkerboard", -0.04)]
)
def test_known_shapes_have_the_known_coherence(name: str, wanted: float) -> None:
    x = np.zeros((14, 14))
    if name in ("3x3", "7x7"):
        size = int(name[0])
        x[4 : 4 + size, 4 : 4 + size] = 1
    elif name == "half":
        x[:7] = 1
    elif name == "line":
        x[5, 4:9] = 1
    else:
        x[np.indices((14, 14)).sum(0) % 2 == 0] = 1
    assert of_map(x)[0] == pytest.approx(wanted, abs=0.006)
    assert of_map(x)[0] == pytest.approx(plain_moran(x), abs=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Over latents and images

GRID = (5, 8)
N_IMAGES, N_LATENTS = 90, 7


def make_dense(seed: int = 0) -> np.ndarray:
    """[I, 1 + P, F] of latents that fire in a block, on random patches, on too few or too many, or rarely."""
    rng = np.random.default_rng(seed)
    maps = np.zeros((N_IMAGES, *GRID, N_LATENTS))
    for image in range(N_IMAGES):
        row, column = rng.integers(0, 3), rng.integers(0, 5)
        maps[image, row : row + 3, column : column + 3, 0] = 1
        maps[image, :, :, 1] = rng.random(GRID) < 0.3
        maps[image, 0, :4, 2] = 1  # too few
        maps[image, :, :, 3] = 1  # everywhere
        maps[image, :, :, 4] = (image % 15 == 0) * (rng.random(GRID) < 0.5)  # on too few images
        maps[image, :, : rng.integers(1, 9), 5] = 1  # too many on some images
    maps *= rng.lognormal(0, 0.5, maps.shape)
    cls = rng.random((N_IMAGES, 1, N_LATENTS))
    return np.concatenate([cls, maps.reshape(N_IMAGES, -1, N_LATENTS)], axis=1).astype(np.float16)


def judge(images: np.ndarray) -> Judged:
    rest = np.setdiff1d(np.arange(N_IMAGES), images)
    return Judged(SimpleNamespace(), images, rest, Resamples(len(images), n=30, seed=5), 0)  # type: ignore[arg-type]


def subject_of(codes: CodeStore) -> Subject:
    run: Any = SimpleNamespace()
    return Subject("x", None, None, run, codes)


def plain_scores(dense: np.ndarray) -> np.ndarray:
    """[I, F]: Moran's I where an image counts for a latent, and NaN elsewhere."""
    maps = dense[:, 1:].astype(np.float64).reshape(N_IMAGES, *GRID, N_LATENTS)
    scores = np.full((N_IMAGES, N_LATENTS), np.nan)
    for image, latent in itertools.product(range(N_IMAGES), range(N_LATENTS)):
        x = maps[image, :, :, latent]
        if LEAST_PATCHES <= (x > 0).sum() <= int(0.9 * x.size):
            scores[image, latent] = plain_moran(x)
    return scores


def plain_means(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean I over images, counted `weights` times, of each latent that has enough of them and is there."""
    there = np.isfinite(scores)
    known = [(scores[t, f], weights[t]) for f, t in enumerate(there.T) if t.sum() >= LEAST_IMAGES and weights[t].any()]
    return np.array([np.average(score, weights=w) for score, w in known])


def test_the_value_and_each_resample_are_those_of_dense_maps(tmp_path: Path) -> None:
    dense = make_dense()
    codes = write_codes(tmp_path / "codes", dense, (40, 30, 20), grid=GRID)
    images = np.sort(np.random.default_rng(1).permutation(N_IMAGES)[:60])
    judged = judge(images)
    (found,) = measure_coherence(subject_of(codes), judged)
    assert isinstance(found, Measured)
    scores = plain_scores(dense)[images]
    means = plain_means(scores, np.ones(60))
    assert found.value == pytest.approx(means.mean() + 1 / 39)
    assert found.replicates is not None
    weights = judged.resamples.weights(0, 60)
    np.testing.assert_allclose(found.replicates, [plain_means(scores, each).mean() + 1 / 39 for each in weights])
    assert found.details["n_evaluable"] == len(means) == 3  # the block, the random patches, the stripes
    assert found.details["null"] == pytest.approx(-1 / 39)
    assert found.details["percentiles"]["50"] == pytest.approx(np.median(means) + 1 / 39)  # type: ignore[index]
    assert found.details["above_null"] == pytest.approx(2 / 3)  # all but the random patches
    (alone,) = measure_coherence(subject_of(write_codes(tmp_path / "one", dense, (90,), grid=GRID)), judged)
    assert isinstance(alone, Measured)
    assert alone.value == pytest.approx(found.value)  # however the codes are cut
    few = replace(judged, images=images[:5], resamples=Resamples(5))
    (none,) = measure_coherence(subject_of(codes), few)
    assert isinstance(none, Skipped)
    assert "no latent has 10 judged images with 5 to 36 active patches" in none.reason


def test_random_patches_have_no_excess_and_few_latents_above_the_null(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    dense = np.zeros((40, 65, 300), np.float16)
    dense[:, 1:] = np.where(rng.random((40, 64, 300)) < 0.15, rng.lognormal(0, 1, (40, 64, 300)), 0)
    codes = write_codes(tmp_path / "codes", dense, (40,), grid=(8, 8))
    whole = Judged(SimpleNamespace(), np.arange(40), np.arange(0), Resamples(40, n=9), 0)  # type: ignore[arg-type]
    (found,) = measure_coherence(subject_of(codes), whole)
    assert isinstance(found, Measured)
    assert found.value == pytest.approx(0, abs=4 * found.details["null_deviation"] / 300**0.5)  # type: ignore[operator]
    assert 0.005 < found.details["above_null"] < 0.05  # type: ignore[operator]


def test_codes_without_patches_or_of_tiny_grids_say_why_they_are_left_out(tmp_path: Path) -> None:
    dense = make_dense()
    cls = write_codes(tmp_path / "cls", dense[:, :1].repeat(2, axis=1), (90,), grid=(1, 1), tokens="cls")
    tiny = write_codes(tmp_path / "tiny", dense[:, :6], (90,), grid=(1, 5))
    for codes, words in ((cls, "codes of patches"), (tiny, "an image has 5")):
        (skipped,) = measure_coherence(subject_of(codes), judge(np.arange(0, 90, 2)))
        assert isinstance(skipped, Skipped)
        assert skipped.name == NAME
        assert words in skipped.reason
