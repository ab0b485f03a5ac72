"""Held-out absorption: F1 on judged images is that of scikit-learn, and a latent that is a class leaves no gap."""

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from structured_store import write_structured

from actcache import open_stores
from analysis import StudyConfig
from analysis.benchmark.absorption import measure_absorption
from analysis.benchmark.judging import choose_judged
from analysis.benchmark.measured import Measured, Skipped
from analysis.benchmark.subject import Judged, Subject
from saetrain import CodeStore, SAEConfig, TrainConfig, encode, train

GROUPS = {"low": ["class0", "class1", "class2"], "high": ["class3", "class4", "class5"]}


def ignore(done: int, total: int) -> None:
    """No progress is shown."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, Judged, Path]:
    folder = tmp_path_factory.mktemp("absorption")
    write_structured(folder, 260)
    settings = TrainConfig(n_steps=100, batch_size=256, lr=3e-3)
    run = train(folder / "x.acts", folder / "run", layer=1, sae=SAEConfig(n_latents=48, k=4), config=settings)
    codes = encode(run, folder / "x.acts", folder / "x.codes", device="cpu")
    judged, _ = choose_judged([run], open_stores(folder / "x.acts"), StudyConfig(on_seen="use"))
    (folder / "groups.json").write_text(json.dumps(GROUPS))
    return Subject("run", None, None, run, codes), judged, folder / "groups.json"


def test_the_gap_is_that_of_scikit_learn_on_other_images(
    world: tuple[Subject, Judged, Path], dense_values: Callable[[CodeStore], np.ndarray]
) -> None:
    from sklearn.feature_selection import f_classif
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    subject, judged, groups = world
    c = dense_values(subject.codes)[:, 1:].max(1).astype(np.float32)
    names = np.array(judged.store.images["label_name"].to_pylist())
    weights = judged.resamples.weights(0, len(judged.images))[7]
    gaps, again = [], []
    for members in GROUPS.values():
        fit = judged.choosing[np.isin(names[judged.choosing], members)]
        mine = np.isin(names[judged.images], members)
        held = judged.images[mine]
        for name in members:
            with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
                best = np.argsort(np.nan_to_num(f_classif(c[fit], names[fit] == name)[0], nan=-np.inf))[::-1]
            f1, f1_again = [], []
            for k in (1, 4):
                model = LogisticRegression(C=1.0, max_iter=500).fit(c[fit][:, best[:k]], names[fit] == name)
                said, truth = model.predict(c[held][:, best[:k]]), names[held] == name
                f1.append(f1_score(truth, said, zero_division=0.0))
                f1_again.append(f1_score(truth, said, sample_weight=weights[mine], zero_division=0.0))
            gaps.append(f1[1] - f1[0])
            again.append(f1_again[1] - f1_again[0])
    (found,) = measure_absorption(subject, judged, groups, ignore)
    assert isinstance(found, Measured)
    assert found.details["n_tests"] == len(gaps) == 6
    assert found.value == pytest.approx(np.mean(gaps))
    assert found.details["share_above_0.1"] == np.mean(np.array(gaps) > 0.1)
    assert found.replicates is not None
    assert found.replicates[7] == pytest.approx(np.mean(again), rel=1e-6)


def test_the_gap_needs_groups_of_known_classes(world: tuple[Subject, Judged, Path], tmp_path: Path) -> None:
    subject, judged, groups = world
    other = tmp_path / "groups.json"
    other.write_text('{"pets": ["cat", "dog", "class0"]}')
    for given, judging, words in (
        (None, judged, "--hierarchy"),
        (other, judged, "no image has, such as cat, dog"),
        (groups, replace(judged, choosing=judged.choosing[:3]), "no group of --hierarchy"),
    ):
        (left_out,) = measure_absorption(subject, judging, given, ignore)
        assert isinstance(left_out, Skipped)
        assert words in left_out.reason
