"""Measure 9: what stands there for the second data set is what numpy and scikit-learn compute on it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actcache import ArtifactNotFoundError, ParentMismatchError, SettingsError, extract, open_stores
from actcache.seen import LearnedImages
from analysis import BenchmarkConfig, ModelOptions, StudyConfig, benchmark_runs, read_result
from analysis.benchmark.baselines import make_signed
from analysis.benchmark.judging import choose_judged
from analysis.benchmark.measured import Measured, Skipped
from analysis.benchmark.subject import Subject
from analysis.benchmark.transfer import MEASURES, Transfer, measure_transfer, open_transfer
from analysis.benchmark.work import Workshop, name_work_folder
from analysis.classifier import choose_validation
from analysis.results import Benchmark
from saetrain import Run, SAEConfig, TrainConfig, encode, train
from saetrain.interop import write_imported

CPU, ANY = ModelOptions(device="cpu"), StudyConfig(on_seen="use")
OPTIONS: dict[str, Any] = {"shard_images": 16, "precision": "float32", "dtype": "float32"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, middle_store: Path) -> Run:
    config = TrainConfig(n_steps=40, batch_size=128, lr=3e-3)
    folder = tmp_path_factory.mktemp("transfer")
    return train(middle_store, folder / "run", layer=1, sae=SAEConfig(n_latents=64, k=4), config=config)


@pytest.fixture(scope="module")
def second(
    tmp_path_factory: pytest.TempPathFactory, make_images: Any, tiny_images: Path, tiny_model: dict[str, str]
) -> Path:
    """60 other images in four classes, and 12 of tiny_images, by the same model."""
    folder = tmp_path_factory.mktemp("second")
    images = make_images(folder / "images", 60, n_classes=4, seed=5)
    for number, file in enumerate(sorted((tiny_images / "class1").glob("*.png"))[:12]):
        shutil.copy(file, images / "class1" / f"old{number}.png")
    extract(images, folder / "second.acts", **tiny_model, layers=[1], **OPTIONS)
    return folder / "second.acts"


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, run: Run, middle_store: Path, second: Path
) -> tuple[Benchmark, Path]:
    out = tmp_path_factory.mktemp("made") / "b.json"
    config = BenchmarkConfig(transfer=str(second))
    return benchmark_runs(run, middle_store, out, config, study=ANY, model=CPU), out


def choose_there(run: Run, store: Path, second: Path) -> Transfer:
    judged, _ = choose_judged([run], open_stores(store), ANY)
    found = open_transfer(open_stores(second), Workshop(Path(), judged, [run], ["run"]), ANY)
    assert isinstance(found, Transfer)
    return found


def test_the_numbers_there_are_those_of_a_dense_computation(
    made: tuple[Benchmark, Path], run: Run, middle_store: Path, second: Path, tmp_path: Path, dense_values: Any
) -> None:
    from sklearn.feature_selection import f_classif
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    result, out = made
    judged = choose_there(run, middle_store, second).judged
    store = judged.store
    codes = encode(run, store, tmp_path / "there.codes", device="cpu")
    z = dense_values(codes)
    w = {name: value.numpy().astype(np.float64) for name, value in run.sae().state_dict().items()}
    x = store.read(1, images=judged.images).astype(np.float64)
    back = (z[judged.images] @ w["decoder"] + w["b_dec"]) / w["scale"] + w["mean"]
    fvu = result.find("run", "transfer fvu")
    assert fvu is not None
    assert fvu.value == pytest.approx(np.square(x - back).sum() / np.square(x - x.mean((0, 1))).sum(), rel=1e-4)
    assert fvu.low is not None
    assert fvu.low <= fvu.value  # type: ignore[operator]
    dead = result.find("run", "transfer dead")
    assert dead is not None
    assert dead.value == (z[judged.images] > 0).any((0, 1)).__invert__().mean()
    pooled, labels = z.max(1), np.array(store.images["label_name"].to_pylist())
    y = np.unique(labels, return_inverse=True)[1]
    held = choose_validation(y[judged.choosing], judged.seed)
    fit, val = judged.choosing[~held], judged.choosing[held]
    live = np.flatnonzero(pooled[fit].any(0))
    best = live[np.argmax(np.nan_to_num(f_classif(pooled[np.ix_(fit, live)], y[fit])[0]))]
    column = ((pooled[:, best] - pooled[fit, best].mean()) / pooled[fit, best].std())[:, None]
    smallest, right = np.inf, 0.0
    for c in (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0):
        model = LogisticRegression(C=c, max_iter=1000, tol=1e-6).fit(column[fit], y[fit])
        if (loss := log_loss(y[val], model.predict_proba(column[val]), labels=model.classes_)) >= smallest:
            break
        smallest, right = loss, float((model.predict(column[judged.images]) == y[judged.images]).mean())
    accuracy = result.find("run", "transfer k-sparse accuracy")
    assert accuracy is not None
    assert accuracy.details["scores"]["1"] == pytest.approx(right)  # type: ignore[index]
    assert read_result(out, Benchmark) == result


def test_every_subject_is_measured_as_it_was_fitted_on_the_first_set(made: tuple[Benchmark, Path]) -> None:
    result, out = made
    for subject in result.subjects:
        for name in MEASURES:
            found = result.find(subject.name, f"transfer {name}")
            assert found is not None, (subject.name, name)
            assert found.table == "reliability"
            assert found.details["store"] == "second.acts"
    versus = {(each.second, each.measure) for each in result.differences}
    assert ("pca k 4", "transfer fvu") in versus
    there = sorted(path.name for path in name_work_folder(out).glob("*-on-*.codes"))
    assert len(there) == len(result.subjects)
    names = list(json.loads(out.read_text())["parents"])
    assert "transfer store" in names
    assert any(note.startswith("transfer is judged on ") for note in result.notes())
    assert len(result.seen or ()) == 2


def test_all_directions_of_a_basis_keep_everything_there(
    run: Run, middle_store: Path, second: Path, tmp_path: Path
) -> None:
    d_model = run.d_model
    sae = make_signed(np.zeros(d_model), np.linalg.qr(np.random.default_rng(0).normal(size=(d_model, d_model)))[0],
                      d_model)  # fmt: skip
    basis = write_imported(
        tmp_path / "basis", sae, open_stores(middle_store), run.hook_point, format="basis", tokens="all",
        provenance={"source": "basis"},
    )  # fmt: skip
    judged, _ = choose_judged([run], open_stores(middle_store), ANY)
    shop = Workshop(tmp_path, judged, [basis], ["basis"], "cpu")
    transfer = open_transfer(open_stores(second), shop, ANY)
    subject = Subject("basis", "raw", None, basis, encode(basis, middle_store, tmp_path / "x.codes", device="cpu"))
    found = {each.name: each for each in measure_transfer(subject, transfer, shop, lambda done, total: None)}
    fvu, dead = found["transfer fvu"], found["transfer dead"]
    assert isinstance(fvu, Measured)
    assert fvu.value == pytest.approx(0, abs=1e-5)
    assert isinstance(dead, Measured)
    assert dead.value is not None
    assert dead.value < 0.5


def test_images_that_were_learned_from_are_not_judged_there(run: Run, middle_store: Path, second: Path) -> None:
    first, _ = choose_judged([run], open_stores(middle_store), StudyConfig())
    store = open_stores(second)
    old = np.array([Path(uri).name.startswith("old") for uri in store.images["uri"].to_pylist()])
    assert old.sum() == 12
    shop = Workshop(Path(), first, [run], ["run"])
    found = open_transfer(store, shop, StudyConfig(where="label == 0"))  # a condition on the first set
    assert isinstance(found, Transfer)
    known = LearnedImages.of("first", first.store.images, first.choosing).find(store.images).images
    assert known[old].sum() >= 11  # a held-out image may be among them
    assert not known[found.judged.images].any()
    assert found.seen.n == known.sum()


def test_images_without_labels_have_no_probe_there(
    run: Run, middle_store: Path, make_images: Any, tiny_model: dict[str, str], tmp_path: Path
) -> None:
    images = make_images(tmp_path / "images", 20, n_classes=1, seed=9)
    (images / "class0").rename(tmp_path / "flat")
    extract(tmp_path / "flat", tmp_path / "flat.acts", **tiny_model, layers=[1], **OPTIONS)
    judged, _ = choose_judged([run], open_stores(middle_store), ANY)
    shop = Workshop(tmp_path, judged, [run], ["run"], "cpu")
    subject = Subject("run", None, None, run, encode(run, middle_store, tmp_path / "x.codes", device="cpu"))
    transfer = open_transfer(open_stores(tmp_path / "flat.acts"), shop, ANY)
    found = {each.name: each for each in measure_transfer(subject, transfer, shop, lambda done, total: None)}
    assert isinstance(found["transfer fvu"], Measured)
    said = found["transfer k-sparse accuracy"]
    assert isinstance(said, Skipped)
    assert "\n" not in said.reason


def test_a_store_that_cannot_be_used_is_left_out_with_the_reason(
    run: Run, middle_store: Path, tiny_store: Path, tmp_path: Path
) -> None:
    judged, _ = choose_judged([run], open_stores(middle_store), ANY)
    shop = Workshop(tmp_path, judged, [run], ["run"], "cpu")

    def refuse(words: str, store: Any) -> None:
        said = open_transfer(store, shop, ANY)
        assert isinstance(said, Skipped)
        assert words in said.reason
        assert "\n" not in said.reason
        assert measure_transfer(Subject("run", None, None, run, None), said, shop, print) == [said]  # type: ignore[arg-type]

    refuse("name it by --transfer", None)
    refuse("is the store that is judged itself", open_stores(middle_store))
    other = Path(__file__).parents[2] / "golden" / "pipeline" / "a.acts"
    refuse("was trained on model", open_stores(other))
    refuse("layer", open_stores(tiny_store))  # it has not layer 1


def test_another_model_leaves_the_other_measures_and_a_missing_store_does_not(
    run: Run, middle_store: Path, tmp_path: Path, made: tuple[Benchmark, Path], second: Path
) -> None:
    golden = Path(__file__).parents[2] / "golden" / "pipeline" / "a.acts"
    shutil.copytree(name_work_folder(made[1]), tmp_path / "c.work")
    config = BenchmarkConfig(transfer=str(golden))
    result = benchmark_runs(run, middle_store, tmp_path / "c.json", config, study=ANY, model=CPU)
    (reason,) = (each.reason for each in result.skipped if each.measure == "transfer")
    assert reason.startswith("--transfer: ")
    assert result.find("run", "fvu") == made[0].find("run", "fvu")
    with pytest.raises(ArtifactNotFoundError):
        benchmark_runs(
            run, middle_store, tmp_path / "d.json", BenchmarkConfig(transfer=str(tmp_path / "nowhere")), model=CPU
        )
    assert not (tmp_path / "d.work").exists()
    with pytest.raises((SettingsError, ParentMismatchError), match=r"other (settings|parents)|made from"):
        benchmark_runs(run, middle_store, made[1], replace(config, transfer=None), study=ANY, model=CPU)
