"""Every statistic of every latent equals plain numpy on the dense array, wherever the codes are cut."""

import math
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_codes import write_codes

import analysis.concepts.compute
import analysis.reduce.reduction
from actcache import SettingsError
from analysis import AnalyzeConfig, ConceptTable, analyze
from analysis.concepts.histograms import QUANTILES
from analysis.concepts.monosemanticity import monosemanticity
from analysis.concepts.statistics import strongest_first

Case = tuple[NDArray[np.float16], NDArray[np.int32], list[int], str]
ROWS, COLUMNS, N_LATENTS, N_TOP, TAU = 2, 3, 6, 3, 0.2


@st.composite
def cut_codes(draw: st.DrawFn) -> Case:
    """(dense [I, T, F] with ties, silent latents and latents that fire everywhere; labels; shard sizes of two cuts;
    tokens)."""
    n_images = draw(st.integers(2, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    dense = rng.choice([0.25, 0.5, 1.0, 0.2, 3.7e-4, 61.25], (n_images, 1 + ROWS * COLUMNS, N_LATENTS))
    share = rng.choice([0.0, 0.02, 0.3, 1.0], N_LATENTS)
    dense = np.where(rng.random(dense.shape) < share, dense, 0).astype(np.float16)
    tokens = draw(st.sampled_from(["all", "patch", "cls"]))
    dense[:, {"all": slice(0, 0), "patch": slice(0, 1), "cls": slice(1, None)}[tokens]] = 0
    cuts = sorted(draw(st.sets(st.integers(1, n_images - 1))))
    return dense, rng.integers(-1, 3, n_images).astype(np.int32), np.diff([0, *cuts, n_images]).tolist(), tokens


def columns(concepts: ConceptTable) -> dict[str, pa.Table]:
    return {
        name: getattr(concepts, name).to_pydict() for name in ("table", "top_images", "top_patches", "class_counts")
    }


@settings(max_examples=8, deadline=None)
@given(cut_codes())
def test_every_statistic_equals_plain_numpy(
    case: Case,
) -> None:
    dense, labels, sizes, tokens = case
    with TemporaryDirectory() as folder:
        cut = write_codes(Path(folder) / "x.codes", dense, sizes, labels, grid=(ROWS, COLUMNS), tokens=tokens)
        one = write_codes(Path(folder) / "1.codes", dense, [len(dense)], labels, grid=(ROWS, COLUMNS), tokens=tokens)
        concepts = analyze(cut, Path(folder) / "x.concepts", config=AnalyzeConfig(n_top=N_TOP, tau=TAU))
        with pytest.MonkeyPatch.context() as patch:  # ranges of one latent, and counts after every few entries
            patch.setattr(analysis.concepts.compute, "RANGE_BYTES", 1)
            patch.setattr(analysis.reduce.reduction, "FIRST_ENTRIES", 5)
            other = analyze(one, Path(folder) / "1.concepts", config=AnalyzeConfig(n_top=N_TOP, tau=TAU))
        assert str(columns(concepts)) == str(columns(other))  # bit for bit, NaN included
        np.testing.assert_array_equal(concepts.position_map, other.position_map)
        h = dense.astype(np.float64)
        table = {name: np.asarray(column) for name, column in concepts.table.to_pydict().items()}
        n_tokens = {"all": 7, "patch": 6, "cls": 1}[tokens]
        for latent in range(N_LATENTS):
            check_latent(h[:, :, latent], labels, n_tokens, {name: column[latent] for name, column in table.items()})
            check_lists(concepts, latent, h[:, :, latent], n_tokens)
            fired = h[:, 1:, latent] > 0
            np.testing.assert_array_equal(concepts.position_map[latent].ravel(), fired.sum(0))
            counts, edges = concepts.histogram.counts[latent], concepts.histogram.edges
            values = h[:, :, latent][h[:, :, latent] > 0]
            np.testing.assert_array_equal(counts, np.histogram(values, edges)[0])


def check_latent(h: NDArray[np.float64], labels: NDArray[np.int32], n_tokens: int, row: dict[str, float]) -> None:
    values, n_images = h[h > 0], len(h)
    assert row["n_tokens"] == len(values)
    assert row["n_images"] == (h > 0).any(1).sum()
    assert row["density"] == pytest.approx(len(values) / (n_images * n_tokens), rel=1e-12)
    assert row["mean_activation"] == pytest.approx(values.mean() if len(values) else 0, rel=1e-12)
    for kind, part in (("cls", h[:, 0]), ("patch", h[:, 1:])):
        assert row[f"{kind}_max_activation"] == part.max()
        assert row[f"{kind}_mean_activation"] == pytest.approx(part[part > 0].mean() if part.any() else 0, rel=1e-12)
    for share in QUANTILES:
        computed = row[f"q{round(100 * share)}_activation"]
        if len(values):
            true = np.quantile(values, share, method="inverted_cdf")
            assert abs(computed - true) <= max(true / 16, 2.0**-11)
        else:
            assert np.isnan(computed)
    mass = np.array([h[labels == label].sum() for label in range(3)])
    if mass.sum():
        p = mass / mass.sum()
        assert row["label_entropy_all"] == pytest.approx(-sum(x * np.log(x) for x in p if x), abs=1e-12)
        mean = (p * np.arange(3)).sum()
        assert row["label_std_all"] == pytest.approx(np.sqrt((p * (np.arange(3) - mean) ** 2).sum()), abs=1e-7)
    else:
        assert np.isnan([row["label_entropy_all"], row["label_std_all"]]).all()


def check_lists(concepts: ConceptTable, latent: int, h: NDArray[np.float64], n_tokens: int) -> None:
    """Top images by their mean, and top patches by their maximum; the first wins a tie."""
    score, patch = h.sum(1) / n_tokens, h[:, 1:].max(1)
    for name, of_image, column in (("top_images", score, "score"), ("top_patches", patch, "value")):
        expected = sorted(np.flatnonzero(of_image > 0), key=lambda i: (-of_image[i], i))[:N_TOP]
        rows = [row for row in getattr(concepts, name).to_pylist() if row["latent"] == latent]
        assert [row["image"] for row in rows] == expected
        assert [row[column] for row in rows] == of_image[expected].tolist()
        if name == "top_patches":
            places = [int(h[image, 1:].argmax()) for image in expected]
            assert [(row["row"], row["column"]) for row in rows] == [divmod(place, COLUMNS) for place in places]


def test_sums_beyond_what_is_exact_agree_between_cuts(tmp_path: Path) -> None:
    """Sums are exact in float64 up to 2^29. Here they exceed it, and the smallest values lie beside the largest."""
    rng = np.random.default_rng(0)
    dense = rng.choice([2.0**-24, 1 / 3, 511.25, 65504], (60, 257, 2), p=[0.2, 0.1, 0.1, 0.6]).astype(np.float16)
    labels = (np.arange(60) % 3).astype(np.int32)
    tables = [
        analyze(write_codes(tmp_path / f"{i}.codes", dense, cut, labels, grid=(16, 16)), tmp_path / f"{i}.concepts")
        for i, cut in enumerate(([60], [7, 20, 1, 32], [40, *[1] * 20]))
    ]
    h = dense.astype(np.float64)
    sums = np.array([math.fsum(h[:, :, latent].ravel()) for latent in range(2)])
    assert sums.min() > 2**29
    for concepts in tables:
        computed = {name: np.asarray(column) for name, column in concepts.table.to_pydict().items()}
        np.testing.assert_allclose(computed["mean_activation"] * computed["n_tokens"], sums, rtol=1e-12)
        for name, column in tables[0].table.to_pydict().items():
            np.testing.assert_allclose(computed[name], column, rtol=1e-12, err_msg=name)
        assert concepts.class_counts.equals(tables[0].class_counts)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.sampled_from([0.5, 1.0, 2.0])), min_size=1))
def test_the_fast_order_equals_lexsort(rows: list[tuple[int, int, float]]) -> None:
    latent, image, score = (np.array(column) for column in zip(*rows, strict=True))
    order = strongest_first(latent, score, image)
    expected = np.lexsort((image, -score, latent))
    assert [rows[i] for i in order] == [rows[i] for i in expected]


@settings(max_examples=8, deadline=None)
@given(cut_codes(), st.sampled_from(["mean", "max"]))
def test_monosemanticity_is_the_weighted_mean_over_pairs(case: Case, score: str) -> None:
    dense, labels, sizes, tokens = case
    dense = dense.copy()
    dense[0] = 0  # could not be read
    embeddings = np.random.default_rng(len(dense)).normal(size=(len(dense), 5))
    with TemporaryDirectory() as folder:
        codes = write_codes(
            Path(folder) / "x.codes", dense, sizes, labels, grid=(ROWS, COLUMNS), tokens=tokens, failed=[0]
        )
        np.save(Path(folder) / "e.npy", embeddings)
        computed = monosemanticity(codes, Path(folder) / "e.npy", score=score)
    h = dense.astype(np.float64)
    a = h.sum(1) / {"all": 7, "patch": 6, "cls": 1}[tokens] if score == "mean" else h.max(1)
    unit = embeddings / np.linalg.norm(embeddings, axis=1)[:, None]
    for latent in range(N_LATENTS):
        mine = a[1:, latent]
        weights = mine - mine.min()
        pairs = [(n, m) for n in range(len(mine)) for m in range(n)]
        if (weights > 0).sum() > 1:
            total = sum(weights[n] * weights[m] for n, m in pairs)
            expected = sum(weights[n] * weights[m] * (unit[n + 1] @ unit[m + 1]) for n, m in pairs) / total
            assert computed[latent] == pytest.approx(expected, abs=1e-8)
        else:
            assert np.isnan(computed[latent])


def test_a_single_image_above_the_minimum_has_no_monosemanticity(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    dense = np.zeros((2, 7, N_LATENTS), np.float16)
    dense[0] = rng.uniform(0.2, 60, (7, N_LATENTS))
    dense[1] = dense[0]
    dense[1, 0] = np.nextafter(dense[0, 0], np.float16(100))  # after scaling, an image at 0 and another
    codes = write_codes(tmp_path / "x.codes", dense, [2], np.zeros(2, np.int32), grid=(ROWS, COLUMNS), tokens="all")
    np.save(tmp_path / "e.npy", rng.normal(size=(2, 5)))
    assert np.isnan(monosemanticity(codes, tmp_path / "e.npy")).all()


def test_monosemanticity_of_a_latent_that_fires_everywhere_rests_on_differences(tmp_path: Path) -> None:
    """A latent has nearly the same value on every image, and only differences of a thousandth carry weight."""
    dense = np.full((12, 5, 3), 60.0, dtype=np.float16)
    dense[[1, 4, 9], 2] += np.float16([1 / 32, 1 / 16, 0])  # latent 0: on three images, 1: the same, 2: on none
    dense[7, 3, 2] += np.float16(1 / 32)  # a single image has no pair
    dense[[1, 4, 9], 2, 1] += np.float16([0, 2, 1])
    embeddings = np.random.default_rng(0).normal(size=(12, 4))
    np.save(tmp_path / "e.npy", embeddings)
    unit = embeddings / np.linalg.norm(embeddings, axis=1)[:, None]
    for sizes in ([12], [5, 1, 6]):
        codes = write_codes(tmp_path / f"{len(sizes)}.codes", dense, sizes, grid=(2, 2))
        computed = monosemanticity(codes, tmp_path / "e.npy")
        weights = dense.astype(np.float64).sum(1) - 300
        for latent in range(2):
            w = weights[:, latent]
            pairs = [(n, m) for n in range(12) for m in range(n)]
            expected = sum(w[n] * w[m] * (unit[n] @ unit[m]) for n, m in pairs) / sum(w[n] * w[m] for n, m in pairs)
            assert computed[latent] == pytest.approx(expected, rel=1e-12)
        assert np.isnan(computed[2])


def test_embeddings_that_do_not_fit_are_refused(tmp_path: Path, tiny_codes: Path) -> None:
    def refused(array: NDArray[np.floating], message: str) -> None:
        np.save(tmp_path / "e.npy", array)
        with pytest.raises(SettingsError, match=message):
            analyze(tiny_codes, tmp_path / "x.concepts", embeddings=tmp_path / "e.npy")

    refused(np.ones((74, 4)), r"float64 \[74, 4\], expected floats \[75, width\]")
    refused(np.zeros((75, 4)), "row 0 is zero or not finite")
    with pytest.raises(SettingsError, match=r"cannot be read as an \.npy array"):
        analyze(tiny_codes, tmp_path / "x.concepts", embeddings=tmp_path / "absent.npy")
    assert not (tmp_path / "x.concepts").exists()


def test_clip_embeddings_equal_those_of_a_full_forward_pass(
    tmp_path: Path, tiny_codes: Path, tiny_store: Path, tiny_images: Path
) -> None:
    import torch

    from actcache import ActivationStore
    from actcache.prompts import open_towers
    from actcache.sources import decode_image

    concepts = analyze(tiny_codes, tmp_path / "x.concepts", embeddings="clip")
    store = ActivationStore.open(tiny_store)
    vision = open_towers(store.artifact).vision
    uris = concepts.images["uri"].to_pylist()
    pixels = [vision.transform(decode_image((tiny_images / uri).read_bytes(), name=uri)) for uri in uris]
    with torch.no_grad():
        whole = torch.nn.functional.normalize(vision.visual(torch.stack(pixels)), dim=1).numpy()
    computed = np.load(concepts.path / "image_embeddings.npy")
    np.testing.assert_allclose(computed, whole, atol=2e-3)  # the activations were rounded to float16
    scores = np.asarray(concepts.table["monosemanticity"])
    assert (np.abs(scores[~np.isnan(scores)]) <= 1 + 1e-6).all()
    assert not np.isnan(scores).all()


def test_nearest_latents_equal_the_full_cosine_matrix(tmp_path: Path, tiny_codes: Path, tiny_run: Path) -> None:
    from saetrain import Run

    concepts = analyze(tiny_codes, tmp_path / "x.concepts")
    decoder = Run.open(tiny_run).sae().decoder.numpy().astype(np.float64)
    decoder /= np.linalg.norm(decoder, axis=1)[:, None]
    cosine = decoder @ decoder.T
    np.fill_diagonal(cosine, -2)
    for latent in range(len(decoder)):
        near = concepts.nearest(latent)
        assert len(near) == 8
        np.testing.assert_allclose([value for _, value in near], np.sort(cosine[latent])[::-1][:8], atol=1e-6)
        np.testing.assert_allclose([cosine[latent, other] for other, _ in near], [v for _, v in near], atol=1e-6)
    moved = shutil.copytree(tiny_codes, tmp_path / "far" / "x.codes")
    (moved / "places.json").unlink()  # as on another machine
    alone = analyze(moved, tmp_path / "y.concepts")
    assert "nearest" in alone.left_out
    assert alone.nearest(0) == []
    assert analyze(moved, tmp_path / "z.concepts", run=tiny_run).nearest(3) == concepts.nearest(3)
