"""Statistics equal a plain dense computation, however the images are cut into shards."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from analysis import AnalyzeConfig, analyze
from analysis.concepts.statistics import TopImages, _merge_top, label_spread
from analysis.reduce.pairs import find_pairs
from saetrain import CodeStore, LatentCodes, ShardCodes


def dense_codes(codes: CodeStore) -> NDArray[np.float64]:
    """[I, T, F] of a small CodeStore, from the by-row order."""
    dense = np.zeros((codes.n_images * codes.n_tokens, codes.n_latents))
    for number in range(codes.n_shards):
        shard = codes.read_shard(number)
        for row, (start, stop) in enumerate(zip(shard.indptr[:-1], shard.indptr[1:], strict=True)):
            dense[shard.first_row + row, shard.latent[start:stop]] = shard.value[start:stop]
    return dense.reshape(codes.n_images, codes.n_tokens, codes.n_latents)


def test_the_table_equals_a_dense_computation(tmp_path: Path, tiny_codes: Path) -> None:
    codes = CodeStore.open(tiny_codes)
    assert codes.n_shards == 5
    h = dense_codes(codes)
    table = analyze(codes, tmp_path / "x.concepts", config=AnalyzeConfig(n_top=7, tau=0.2)).table
    fired = h > 0
    assert table["n_tokens"].to_pylist() == fired.sum((0, 1)).tolist()
    assert table["n_images"].to_pylist() == fired.any(1).sum(0).tolist()
    np.testing.assert_allclose(table["density"], fired.mean((0, 1)), rtol=1e-12)
    np.testing.assert_allclose(table["image_frequency"], fired.any(1).mean(0), rtol=1e-12)
    alive = fired.any((0, 1))
    mean = h.sum((0, 1))[alive] / fired.sum((0, 1))[alive]
    np.testing.assert_allclose(np.asarray(table["mean_activation"])[alive], mean, rtol=1e-12)
    m_s = h.mean(1).sum(0)[alive] / fired.any(1).sum(0)[alive]  # PatchSAE section 3.2
    np.testing.assert_allclose(np.asarray(table["image_activation"])[alive], m_s, rtol=1e-12)
    np.testing.assert_allclose(table["max_activation"], h.max((0, 1)), rtol=1e-6)


@pytest.mark.parametrize("score", ["mean", "max"])
def test_top_images_are_the_strongest_with_their_peak_patch(tmp_path: Path, tiny_codes: Path, score: str) -> None:
    codes = CodeStore.open(tiny_codes)
    h = dense_codes(codes)
    scores = h.mean(1) if score == "mean" else h.max(1)
    top = analyze(codes, tmp_path / "x.concepts", config=AnalyzeConfig(n_top=5, score=score)).top_images.to_pylist()
    for latent in range(codes.n_latents):
        mine = [row for row in top if row["latent"] == latent]
        order = sorted(np.flatnonzero(scores[:, latent] > 0), key=lambda i: (-scores[i, latent], i))[:5]
        np.testing.assert_allclose([row["score"] for row in mine], scores[order, latent], rtol=1e-12)
        assert [row["rank"] for row in mine] == list(range(len(mine)))
        for row in mine:
            patches = h[row["image"], 1:, latent]
            assert row["peak_patch"] == (1 + int(patches.argmax()) if patches.any() else -1)


def test_class_counts_equal_equation_5(tmp_path: Path, tiny_codes: Path) -> None:
    codes = CodeStore.open(tiny_codes)
    tau = 1.0
    counts = analyze(codes, tmp_path / "x.concepts", config=AnalyzeConfig(tau=tau)).class_counts.to_pylist()
    above = dense_codes(codes) > tau
    labels = np.asarray(codes.images["label"])
    expected = {}
    for label in range(3):
        for latent in range(codes.n_latents):
            n_tokens = int(above[labels == label, :, latent].sum())
            if n_tokens:
                n_images = int(above[labels == label, :, latent].any(1).sum())
                expected[f"class{label}", latent] = (n_tokens, n_images)
    assert {(row["label_name"], row["latent"]): (row["n_tokens"], row["n_images"]) for row in counts} == expected


def test_label_spread_is_computed_from_shares() -> None:
    labels = np.array([0, 1, 2, 6])
    mass = np.array([[3.0, 3, 0, 0], [0, 0, 0, 0], [6, 0, 0, 0], [0, 0, 1, 3]])
    entropy, deviation = label_spread(mass, labels)
    assert entropy[0] == pytest.approx(np.log(2))  # 3 of 6 each
    assert deviation[0] == pytest.approx(0.5)
    assert np.isnan([entropy[1], deviation[1]]).all()  # never fires, or on unlabeled images only
    assert entropy[2] == deviation[2] == 0  # one class
    assert entropy[3] == pytest.approx(-(0.25 * np.log(0.25) + 0.75 * np.log(0.75)))
    assert deviation[3] == pytest.approx(np.sqrt(0.25 * 3**2 + 0.75 * 1**2))  # around a mean of 5
    assert np.isnan(label_spread(np.zeros((2, 0)), labels[:0])).all()  # no labels at all


@st.composite
def shard_codes(draw: st.DrawFn) -> tuple[NDArray[np.float16], int]:
    n_images, n_tokens, n_latents = draw(st.integers(1, 5)), draw(st.integers(2, 5)), draw(st.integers(1, 4))
    cells = n_images * n_tokens * n_latents
    values = draw(st.lists(st.sampled_from([0, 0, 0, 0.25, 1, 2]), min_size=cells, max_size=cells))
    return np.array(values, dtype=np.float16).reshape(n_images, n_tokens, n_latents), n_tokens


def by_latent(dense: NDArray[np.float16]) -> ShardCodes:
    n_latents = dense.shape[2]
    flat = dense.reshape(-1, n_latents)
    latent, row = np.nonzero(flat.T)
    empty = np.empty(0, dtype=np.int64)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(latent, minlength=n_latents))])
    return ShardCodes(
        0, empty, empty.astype(np.uint16), dense.ravel()[:0], indptr, row.astype(np.uint32), flat[row, latent]
    )


@settings(max_examples=150, deadline=None)
@given(shard_codes())
def test_pairs_equal_a_loop(case: tuple[NDArray[np.float16], int]) -> None:
    dense, n_tokens = case
    pairs = find_pairs(by_latent(dense), n_tokens, tau=0.5)
    expected = []
    for latent in range(dense.shape[2]):
        for image in range(dense.shape[0]):
            h = dense[image, :, latent].astype(np.float64)
            if h.any():
                peak_patch = 1 + int(h[1:].argmax()) if h[1:].any() else -1
                counts = ((h > 0.5).sum(), (h > 0).sum())
                expected.append((latent, image, h.sum(), h.max(), peak_patch, *counts, h[1:].max(), h[0], h[0] > 0))
    assert list(zip(*(column.tolist() for column in pairs), strict=True)) == expected


@settings(max_examples=60, deadline=None)
@given(shard_codes(), st.integers(1, 3), st.data())
def test_merging_does_not_depend_on_the_cut(
    case: tuple[NDArray[np.float16], int], n_top: int, data: st.DataObject
) -> None:
    dense, n_tokens = case
    pairs = find_pairs(by_latent(dense), n_tokens)
    whole = TopImages(pairs.latent, pairs.image, pairs.total, pairs.peak, pairs.peak_patch)
    owner = np.array(data.draw(st.lists(st.integers(0, 2), min_size=len(pairs.image), max_size=len(pairs.image))), int)
    parts = [_merge_top([TopImages._make(column[owner == part] for column in whole)], n_top=n_top) for part in range(3)]
    for got, want in zip(_merge_top(parts, n_top=n_top), _merge_top([whole], n_top=n_top), strict=True):
        assert got.tolist() == want.tolist()


@given(
    values=st.lists(st.floats(2**-20, 1000, width=16), min_size=1, max_size=20),
    tau=st.one_of(st.floats(-1, 1000, width=32), st.none()),
)
@example(values=[1.0], tau=-0.0)
@example(values=[1.0], tau=-(2.0**-149))
@example(values=[1.0], tau=1e6)
def test_a_token_counts_only_above_tau(values: list[float], tau: float | None) -> None:
    """An activation that equals tau does not count."""
    value = np.array(values, dtype=np.float16)
    limit = values[0] if tau is None else tau
    entries = LatentCodes(np.array([0, len(value)]), np.arange(len(value), dtype=np.uint32), value)
    n_above = find_pairs(entries, 1, tau=limit).n_above
    assert n_above.tolist() == (value.astype(np.float32) > np.float32(limit)).astype(int).tolist()
