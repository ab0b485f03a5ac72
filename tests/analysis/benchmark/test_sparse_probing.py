"""Measure 3: the scores are those of scikit-learn on the same images, and the replicates those of the resamples."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actcache import open_stores
from analysis import StudyConfig
from analysis.benchmark import sparse_probing
from analysis.benchmark.judging import choose_judged
from analysis.benchmark.measured import Measured, Skipped
from analysis.benchmark.resamples import interval
from analysis.benchmark.sparse_probing import GRID, measure_sparse_probing
from analysis.benchmark.subject import Judged, Subject
from analysis.classifier import choose_validation
from saetrain import CodeStore, Run


@pytest.fixture(scope="module")
def subject(tiny_run: Path, tiny_codes: Path) -> Subject:
    run = Run.open(tiny_run)
    return Subject(run.path.name, None, None, run, CodeStore.open(tiny_codes))


@pytest.fixture(scope="module")
def judged(tiny_run: Path, tiny_store: Path) -> Judged:
    return choose_judged([Run.open(tiny_run)], open_stores(tiny_store), StudyConfig(on_seen="use"))[0]


def pool(codes: CodeStore) -> np.ndarray:
    """[I, F] maximum over tokens, entry by entry."""
    dense = np.zeros((codes.n_images, codes.n_latents))
    for number in range(codes.n_shards):
        shard = codes.read_shard(number)
        latent = np.repeat(np.arange(codes.n_latents), np.diff(shard.latent_indptr))
        np.maximum.at(dense, (shard.row.astype(np.int64) // codes.n_tokens, latent), shard.latent_value.astype(float))
    return dense


def test_one_latent_tells_what_scikit_learn_says(subject: Subject, judged: Judged) -> None:
    from sklearn.feature_selection import f_classif
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    found = {each.name: each for each in measure_sparse_probing(subject, judged)}
    x = pool(subject.codes)
    y = np.unique(judged.store.images["label_name"].to_pylist(), return_inverse=True)[1]
    held = choose_validation(y[judged.choosing], judged.seed)
    fit, val = judged.choosing[~held], judged.choosing[held]
    firing = x[fit].any(0)
    f = np.where(
        firing, np.nan_to_num(f_classif(np.where(firing, x[fit], np.arange(len(fit))[:, None]), y[fit])[0]), -1
    )
    best = int(f.argmax())
    column = ((x[:, best] - x[fit, best].mean()) / x[fit, best].std())[:, None]
    smallest, hits = np.inf, np.empty(0)
    for c in (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0):
        model = LogisticRegression(C=c, max_iter=1000, tol=1e-6).fit(column[fit], y[fit])
        if (loss := log_loss(y[val], model.predict_proba(column[val]))) >= smallest:
            break
        smallest, hits = loss, (model.predict(column[judged.images]) == y[judged.images]).astype(float)
    one = found["k-sparse k=1"]
    assert isinstance(one, Measured)
    assert one.details["latents"] == [best]
    assert one.value == pytest.approx(hits.mean())
    weights = judged.resamples.weights(0, len(judged.images))
    assert one.replicates is not None
    np.testing.assert_allclose(one.replicates, weights @ hits / len(hits))
    mean = found["k-sparse accuracy"]
    assert isinstance(mean, Measured)
    scores = [mean.details["scores"][str(k)] for k in GRID]  # type: ignore[index]
    assert mean.value == pytest.approx(np.trapezoid(scores, np.log(GRID)) / np.log(GRID[-1]))
    for k, score in zip(GRID, scores, strict=True):
        each = found.get(f"k-sparse k={k}")
        assert (each is None) == (k > firing.sum())
        assert each is None or (isinstance(each, Measured) and each.value == score)
    assert 0 <= mean.value <= 1  # type: ignore[operator]
    span = interval(mean.replicates)
    assert span is not None
    assert span[0] <= mean.value <= span[1]  # type: ignore[operator]


def test_what_cannot_be_probed_is_left_out_with_the_reason(
    subject: Subject, judged: Judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = replace(judged, choosing=judged.choosing[:1])
    (skipped,) = measure_sparse_probing(subject, one)
    assert isinstance(skipped, Skipped)
    assert "A probe tells classes apart" in skipped.reason
    monkeypatch.setattr(sparse_probing, "COLUMN", "nothing")
    (skipped,) = measure_sparse_probing(subject, judged)
    assert isinstance(skipped, Skipped)
    assert "the unknown column 'nothing'" in skipped.reason
