"""Measure 6: scores are those of a plain loop over pairs, chance is that of dealt embeddings, clusters are found."""

import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small_codes import write_codes

from actcache import ParentMismatchError, SettingsError, extract, open_stores
from actcache.prompts import open_towers
from analysis import BenchmarkConfig, ModelOptions, StudyConfig, benchmark_runs
from analysis.benchmark.image_embeddings import (
    ImageEmbeddings,
    add_centered,
    count_images,
    embed_judged,
    mean_cosines,
    mean_of_all_pairs,
)
from analysis.benchmark.measured import Measured, Skipped
from analysis.benchmark.monosemanticity import LEAST_IMAGES, measure_monosemanticity
from analysis.benchmark.resamples import Resamples
from analysis.benchmark.subject import Judged, Subject
from analysis.classifier import embed_stored_images
from saetrain import CodeStore, SAEConfig, TrainConfig, train

N_IMAGES, WIDTH = 80, 6


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def plain_score(a: np.ndarray, e: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The mean cosine over all pairs of different images, weighted; images count `weights` times."""
    a = a if weights is None else a * weights
    i, j = np.triu_indices(len(a), 1)
    pairs = a[i] * a[j]
    return float(pairs @ (e @ e.T)[i, j] / pairs.sum()) if pairs.any() else np.nan


def test_the_identity_is_the_loop_over_pairs_and_copies_of_an_image_are_no_pair() -> None:
    rng = np.random.default_rng(0)
    a, e = rng.random(9), unit(rng.normal(size=(9, WIDTH)))
    weights = np.array([0, 3, 1, 0, 2, 2, 1, 0, 5])
    b = a * weights
    found = mean_cosines((b @ np.concatenate([e, -e], axis=1))[None], np.array([b.sum()]), np.array([b @ b]))
    assert found[:, 0] == pytest.approx([plain_score(a, e, weights)] * 2)
    drawn = np.repeat(np.arange(9), weights)  # the resample as a list of images, with copies
    pairs = [(i, j) for i, j in itertools.combinations(drawn, 2) if i != j]
    weight = np.array([a[i] * a[j] for i, j in pairs])
    assert found[0, 0] == pytest.approx(np.average([e[i] @ e[j] for i, j in pairs], weights=weight))
    one = np.array([0.0, 4.0])
    assert np.isnan(mean_cosines((one @ np.ones((2, 4)))[None], np.array([4.0]), np.array([16.0]))).all()


def test_chance_is_exactly_the_mean_over_all_ways_to_deal_the_embeddings() -> None:
    rng = np.random.default_rng(1)
    a, e = np.array([1.0, 0.3, 0.5, 0, 0]), unit(rng.normal(size=(5, 3)) + 1)
    dealt = [plain_score(a, e[list(order)]) for order in itertools.permutations(range(5))]
    chance = np.mean([e[i] @ e[j] for i, j in itertools.combinations(range(5), 2)])
    assert np.mean(dealt) == pytest.approx(chance)
    assert np.std(dealt) > 0.05


@pytest.fixture
def embedded(tmp_path: Path) -> tuple[np.ndarray, np.ndarray, Judged, ImageEmbeddings]:
    """(unit embeddings of three clusters, cluster of each judged image, the judged images, embeddings)."""
    rng = np.random.default_rng(2)
    images = np.sort(rng.permutation(N_IMAGES)[:60])
    cluster = rng.integers(3, size=60)
    e = unit(rng.normal(size=(3, WIDTH))[cluster] + 0.2 * rng.normal(size=(60, WIDTH)) + 1).astype(np.float32)
    resamples = Resamples(60, n=25, seed=7)
    both = add_centered(e)
    assert both is not None
    np.save(tmp_path / "e.npy", both)
    judged = Judged(SimpleNamespace(), images, np.setdiff1d(np.arange(N_IMAGES), images), resamples, 0)  # type: ignore[arg-type]
    chance = mean_of_all_pairs(tmp_path / "e.npy", resamples)
    return e.astype(np.float64), cluster, judged, ImageEmbeddings(tmp_path / "e.npy", chance, {"embeddings": "e"})


def make_codes(path: Path, judged: Judged, cluster: np.ndarray, sizes: tuple[int, ...]) -> tuple[CodeStore, np.ndarray]:
    """(codes, [I, F] maximum over tokens of the judged images) of latents of different habits."""
    rng = np.random.default_rng(3)
    dense = np.zeros((N_IMAGES, 5, 8), np.float16)
    strength = rng.lognormal(0, 0.7, dense.shape)
    dense[:, :, 0] = strength[:, :, 0] * (rng.random((N_IMAGES, 5)) < 0.3)  # anywhere
    for latent in (1, 2, 3):  # one cluster each
        dense[judged.images[cluster == latent - 1], 1 + latent, latent] = strength[
            judged.images[cluster == latent - 1], 0, 1
        ]
    dense[:, 1, 4] = 2 + strength[:, 0, 4]  # everywhere: its smallest value is not 0
    dense[judged.images[: LEAST_IMAGES - 1], 2, 5] = 1  # too few
    dense[judged.images[:LEAST_IMAGES], 2, 6] = 1  # just enough
    return write_codes(path, dense, sizes), dense[judged.images].max(1).astype(np.float64)


def test_the_value_and_each_resample_are_those_of_the_loop_over_pairs(
    embedded: tuple[np.ndarray, np.ndarray, Judged, ImageEmbeddings], tmp_path: Path
) -> None:
    e, cluster, judged, embeddings = embedded
    codes, peaks = make_codes(tmp_path / "codes", judged, cluster, (33, 30, 17))
    run: Any = SimpleNamespace()
    found = measure_monosemanticity(Subject("x", None, None, run, codes), judged, embeddings)
    weights = judged.resamples.weights(0, 60)
    a = (peaks - peaks.min(0)) / np.maximum(peaks.max(0) - peaks.min(0), 1e-12)
    latents = [0, 1, 2, 3, 4, 6]
    for measured, vectors in zip(found, (e, unit(e - e.mean(0))), strict=True):
        assert isinstance(measured, Measured)
        scores = [plain_score(a[:, latent], vectors) for latent in latents]
        chance = plain_score(np.ones(60), vectors)
        assert measured.value == pytest.approx(np.mean(scores) - chance, abs=2e-6)
        assert measured.details["chance"] == pytest.approx(chance, abs=2e-6)
        assert measured.details["mean"] == pytest.approx(np.mean(scores), abs=2e-6)
        assert measured.details["n_evaluable"] == len(latents)
        assert measured.details["percentiles"]["50"] == pytest.approx(np.median(scores) - chance, abs=2e-6)  # type: ignore[index]
        assert measured.replicates is not None
        for w, replicate in zip(weights, measured.replicates, strict=True):
            again = np.nanmean([plain_score(a[:, latent], vectors, w) for latent in latents])
            assert replicate == pytest.approx(again - plain_score(np.ones(60), vectors, w), abs=3e-6)
    whole, _ = make_codes(tmp_path / "whole", judged, cluster, (80,))
    again = measure_monosemanticity(Subject("x", None, None, run, whole), judged, embeddings)
    assert [each.value for each in again] == pytest.approx([each.value for each in found])  # type: ignore[union-attr]


def test_latents_of_one_cluster_stand_out_and_random_ones_do_not(
    embedded: tuple[np.ndarray, np.ndarray, Judged, ImageEmbeddings], tmp_path: Path
) -> None:
    _, cluster, judged, embeddings = embedded
    rng = np.random.default_rng(5)
    of_cluster, random = (np.zeros((N_IMAGES, 2, 60), np.float16) for _ in range(2))
    for latent in range(60):
        chosen = np.flatnonzero(cluster == latent % 3)
        of_cluster[judged.images[rng.permutation(chosen)[:12]], 1, latent] = 1
        random[judged.images[rng.permutation(60)[:12]], 1, latent] = 1
    run: Any = SimpleNamespace()
    scores = {}
    for name, dense in (("of_cluster", of_cluster), ("random", random)):
        codes = write_codes(tmp_path / name, dense, (80,))
        scores[name] = [
            m.value for m in measure_monosemanticity(Subject("x", None, None, run, codes), judged, embeddings)
        ]  # type: ignore[union-attr]
    assert scores["of_cluster"][1] > 0.7  # centered, the clusters point apart
    assert scores["of_cluster"][0] > 0.1
    np.testing.assert_allclose(scores["random"], 0, atol=0.05)
    few = Judged(judged.store, judged.images[:5], judged.choosing, Resamples(5, n=3), 0)
    none = measure_monosemanticity(Subject("x", None, None, run, codes), few, embeddings)
    assert all(isinstance(each, Skipped) and "no latent fires on 10" in each.reason for each in none)


def test_counts_are_those_of_the_resamples_and_equal_embeddings_cannot_be_centered() -> None:
    resamples = Resamples(2100, n=4, seed=1)
    counts = count_images(resamples)
    assert (counts[:, 0] == 1).all()
    np.testing.assert_array_equal(counts[:, 1:].T, resamples.weights(0, 2100))
    assert add_centered(np.ones((4, 3), np.float32)) is None


# ---------------------------------------------------------------------------------------------------------------------
# --embeddings

CPU, ANY = ModelOptions(device="cpu"), StudyConfig(on_seen="use")


@pytest.fixture(scope="module")
def other_store(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path, tiny_model: dict[str, str]) -> Path:
    """The same images by a model with other weights."""
    path = tmp_path_factory.mktemp("other") / "other.acts"
    model = {**tiny_model, "pretrained": "random:1"}
    extract(tiny_images, path, **model, layers=[2], shard_images=64, precision="float32")  # type: ignore[arg-type]
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, middle_store: Path) -> Path:
    path = tmp_path_factory.mktemp("run") / "run"
    train(middle_store, path, layer=1, sae=SAEConfig(n_latents=64, k=4),
          config=TrainConfig(n_steps=30, batch_size=128, lr=3e-3))  # fmt: skip
    return path


def test_the_other_models_embeddings_judge_all_subjects(
    run: Path, middle_store: Path, other_store: Path, tmp_path: Path
) -> None:
    config = BenchmarkConfig(embeddings=str(other_store))
    result = benchmark_runs(run, middle_store, tmp_path / "b.json", config, study=ANY, model=CPU)
    for subject in result.subjects:
        for name in ("monosemanticity", "monosemanticity centered"):
            found = result.find(subject.name, name)
            assert found is not None, subject
            assert found.table == "unlabeled"
            assert found.low is not None
            assert found.high is not None
            assert found.low <= found.high
            assert found.details["own_model"] is False
    assert result.parents["embeddings store"].id == open_stores(other_store).stores[0].store_id
    assert any("by the embeddings of other.acts; two images at random" in note for note in result.notes())
    again = benchmark_runs(run, middle_store, tmp_path / "b.json", config, study=ANY, model=CPU)
    assert again == result
    with pytest.raises(SettingsError, match=r"embeddings store \(parent\)"):
        benchmark_runs(run, middle_store, tmp_path / "b.json", study=ANY, model=CPU)
    moved = tmp_path / "moved.acts"
    shutil.copytree(other_store, moved)  # a store counts by its id, not by its place
    config = BenchmarkConfig(embeddings=str(moved))
    assert benchmark_runs(run, middle_store, tmp_path / "b.json", config, study=ANY, model=CPU) == result


def test_embeddings_are_those_of_the_judged_images_and_are_kept(
    middle_store: Path, other_store: Path, tmp_path: Path
) -> None:
    store, other = open_stores(middle_store), open_stores(other_store)
    images = np.arange(0, 75, 2)
    judged = Judged(store, images, np.arange(1, 75, 2), Resamples(len(images), n=5), 0)
    made = embed_judged(other, judged, tmp_path, device="cpu")
    assert isinstance(made, ImageEmbeddings)
    vision = open_towers(other.stores[0].artifact, device="cpu").vision
    wanted = embed_stored_images(other, images, vision=vision).astype(np.float64)
    found = np.load(made.path)
    np.testing.assert_allclose(found[:, :16], wanted, atol=1e-6)
    np.testing.assert_allclose(found[:, 16:], unit(wanted - wanted.mean(0)), atol=1e-5)
    assert made.chance[0, 0] == pytest.approx(plain_score(np.ones(len(images)), wanted), abs=1e-6)
    before = made.path.stat().st_mtime_ns
    assert embed_judged(other, judged, tmp_path, device="cpu").path.stat().st_mtime_ns == before  # type: ignore[union-attr]
    own = embed_judged(store, judged, tmp_path, device="cpu")
    assert isinstance(own, ImageEmbeddings)
    assert own.facts == {"embeddings": "middle.acts", "own_model": True}


def test_what_is_missing_or_wrong_is_said_in_one_line(
    run: Path, middle_store: Path, make_images: Any, tiny_images: Path, tiny_model: dict[str, str], tmp_path: Path
) -> None:
    store = open_stores(middle_store)
    judged = Judged(store, np.arange(40), np.arange(40, 75), Resamples(40, n=5), 0)
    missing = embed_judged(None, judged, tmp_path)
    assert isinstance(missing, Skipped)
    assert "--embeddings" in missing.reason
    images = make_images(tmp_path / "few", 10)
    extract(images, tmp_path / "few.acts", **tiny_model, layers=[1], precision="float32")
    with pytest.raises(ParentMismatchError, match=r"--embeddings .*few.acts holds other images") as caught:
        benchmark_runs(
            run, middle_store, tmp_path / "x.json", BenchmarkConfig(embeddings=str(tmp_path / "few.acts")),
            study=ANY, model=CPU,
        )  # fmt: skip
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x.work").exists()  # before anything heavy
    gone = shutil.copy(tiny_model["pretrained"], tmp_path / "gone.safetensors")
    model = {"model": tiny_model["model"], "pretrained": str(gone)}
    extract(tiny_images, tmp_path / "gone.acts", **model, layers=[2], precision="float32")
    Path(gone).unlink()
    said = embed_judged(open_stores(tmp_path / "gone.acts"), judged, tmp_path, device="cpu")
    assert isinstance(said, Skipped)
    assert "gone.safetensors" in said.reason
    assert "\n" not in said.reason
