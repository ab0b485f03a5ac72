"""Answers equal a dense computation and read no more than they need; errors say what there is to ask for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import roc_auc_score

from actcache import PipelineError, SettingsError
from analysis import (
    query_class,
    query_counter_examples,
    query_firing,
    query_groups,
    query_image,
    query_images,
    query_latent,
    query_patches,
    query_selection,
)
from analysis.query.answer import parse_at, write_answer
from analysis.query.groups import adjust_p, contrast_groups
from analysis.query.question import Question, parse_latents
from saetrain import CodeStore

Dense = NDArray[np.float64]


@pytest.fixture(scope="module")
def dense(table_codes: CodeStore, dense_values: Callable[[CodeStore], Dense]) -> Dense:
    """[I, T, F]"""
    return dense_values(table_codes)


def column(codes: CodeStore, name: str) -> NDArray[Any]:
    return np.array(codes.images[name].to_pylist())


def some_latents(dense: Dense, low: float = 0.05, high: float = 0.6) -> list[int]:
    """Latents that fire on a medium share of the images, rarest first."""
    share = (dense > 0).any(1).mean(0)
    latents = np.flatnonzero((share > low) & (share < high))
    return [int(latent) for latent in latents[np.argsort(share[latents])]]


# ---------------------------------------------------------------------------------------------------------------------
# A latent


@pytest.mark.parametrize("score", ["mean", "max"])
@pytest.mark.parametrize("where", [None, "domain == 'photo' and weight > 0.3", "label_name in ('class1', 'class2')"])
def test_top_images_are_those_with_the_highest_score_among_the_chosen(
    table_codes: CodeStore, dense: Dense, score: str, where: str | None
) -> None:
    chosen = {
        None: np.ones(len(dense), bool),
        "domain == 'photo' and weight > 0.3": (column(table_codes, "domain") == "photo")
        & (column(table_codes, "weight") > 0.3),
        "label_name in ('class1', 'class2')": np.isin(column(table_codes, "label_name"), ["class1", "class2"]),
    }[where]
    for latent in some_latents(dense)[-3:]:
        scores = dense[:, :, latent].mean(1) if score == "mean" else dense[:, :, latent].max(1)
        want = [i for i in np.argsort(-scores, kind="stable") if chosen[i] and scores[i] > 0][:10]
        top = query_latent(table_codes, latent, score=score, where=where)
        assert top["image"].to_pylist() == want
        np.testing.assert_allclose(top["score"], scores[want], rtol=1e-12)


def test_top_patches_are_the_largest_values_that_are_not_cls(table_codes: CodeStore, dense: Dense) -> None:
    mine = column(table_codes, "label_name") == "class0"
    latent = int(np.argmax((dense[mine, 1:] > 0).sum((0, 1))))
    values = dense[:, 1:, latent].reshape(-1, *table_codes.grid)
    top = query_patches(table_codes, latent, n_top=5, where="label_name == 'class0'").to_pylist()
    assert [row["value"] for row in top] == np.sort(values[mine].ravel())[::-1][:5].tolist()
    assert [values[row["image"], row["row"], row["column"]] for row in top] == [row["value"] for row in top]


def test_a_latent_reads_its_own_bytes_and_no_others(table_codes: CodeStore, dense: Dense) -> None:
    codes = CodeStore.open(table_codes.path)
    latent = some_latents(dense)[0]
    n_entries = int((dense[:, :, latent] > 0).sum())
    query_latent(codes, latent)
    assert codes.bytes_read == n_entries * (4 + 2) + codes.n_shards * 2 * 8
    before = codes.bytes_read
    query_image(codes, 20, at=(1, 2))
    n_active = int((dense[20, 1 + 1 * 3 + 2] > 0).sum())
    assert codes.bytes_read - before == n_active * (2 + 2) + 2 * 8


def test_counter_examples_are_silent_inside_or_fire_outside(table_codes: CodeStore, dense: Dense) -> None:
    labels, scores = column(table_codes, "label_name"), dense.mean(1)
    for latent in some_latents(dense, 0.2, 0.8)[:5]:
        means = {name: scores[(labels == name) & table_codes.valid, latent].mean() for name in set(labels)}
        top_class = max(means, key=lambda name: means[name])
        answer = query_counter_examples(table_codes, latent, n_top=4).to_pylist()
        silent = [row for row in answer if row["kind"] == f"silent on {top_class}"]
        outside = [row for row in answer if row["kind"] == "fires elsewhere"]
        assert len(silent) + len(outside) == len(answer)
        quiet = np.flatnonzero((labels == top_class) & table_codes.valid & (scores[:, latent] == 0))
        assert [row["image"] for row in silent] == quiet[:4].tolist()
        others = np.where(labels != top_class, scores[:, latent], 0)
        assert [row["score"] for row in outside] == pytest.approx(np.sort(others[others > 0])[::-1][:4].tolist())


# ---------------------------------------------------------------------------------------------------------------------
# Images


@pytest.mark.parametrize(
    ("text", "rows", "columns"),
    [("1,2", slice(1, 2), slice(2, 3)), ("0:2,1:3", slice(0, 2), slice(1, 3)), ("2,:", slice(2, 3), slice(0, 3)),
     (":,0:1", slice(0, 3), slice(0, 1))],
)  # fmt: skip
def test_latents_of_a_region_are_means_over_it(
    table_codes: CodeStore, dense: Dense, text: str, rows: slice, columns: slice
) -> None:
    region = dense[30, 1:].reshape(3, 3, -1)[rows, columns].reshape(-1, dense.shape[2])
    answer = query_image(table_codes, 30, at=parse_at(text), n_top=4)
    latents = np.asarray(answer["latent"])
    np.testing.assert_allclose(answer["score"], np.sort(region.mean(0))[::-1][: len(latents)], rtol=1e-12)
    np.testing.assert_allclose(answer["peak"], region.max(0)[latents], rtol=1e-12)
    assert answer["n_tokens"].to_pylist() == (region > 0).sum(0)[latents].tolist()


def test_two_images_share_what_is_strong_in_both(table_codes: CodeStore, dense: Dense) -> None:
    one, other, n_top = 3, 40, 5
    means = dense.mean(1)
    tops = [set(np.argsort(-means[i], kind="stable")[:n_top].tolist()) for i in (one, other)]
    rows = query_images(table_codes, one, other, n_top=n_top).to_pylist()
    by_kind = {kind: {row["latent"] for row in rows if row["kind"] == kind} for kind in ("shared", "only 1", "only 2")}
    assert by_kind == {"shared": tops[0] & tops[1], "only 1": tops[0] - tops[1], "only 2": tops[1] - tops[0]}
    for row in rows:
        assert (row["score_1"], row["score_2"]) == pytest.approx(
            (means[one, row["latent"]], means[other, row["latent"]])
        )


def test_images_on_which_two_latents_fire_and_a_third_does_not(table_codes: CodeStore, dense: Dense) -> None:
    first, second, third = some_latents(dense, 0.2, 0.9)[-3:]
    peak = dense.max(1)
    want = (peak[:, first] > 0) & (peak[:, second] > 0) & (peak[:, third] == 0)
    answer = query_firing(table_codes, [first, second], [third], n_top=100)
    assert set(answer["image"].to_pylist()) == set(np.flatnonzero(want).tolist())
    weakest = np.minimum(answer[f"peak_{first}"], answer[f"peak_{second}"])
    assert (np.diff(weakest) <= 0).all()
    quiet = query_firing(table_codes, [], [third], n_top=100)["image"].to_pylist()
    assert quiet == np.flatnonzero((peak[:, third] == 0) & table_codes.valid).tolist()


def test_latents_of_a_selection_and_of_a_class(table_codes: CodeStore, dense: Dense) -> None:
    chosen = (column(table_codes, "weight") < 0.4) & table_codes.valid
    above = dense > 0.2
    answer = query_selection(table_codes, "weight < 0.4", n_top=6)
    assert answer["n_tokens"].to_pylist() == np.sort(above[chosen].sum((0, 1)))[::-1][:6].tolist()
    latents = np.asarray(answer["latent"])
    assert answer["n_images"].to_pylist() == above[chosen].any(1).sum(0)[latents].tolist()
    np.testing.assert_allclose(answer["image_share"], above[chosen].any(1).mean(0)[latents], rtol=1e-12)
    both = query_class(table_codes, "class1", rank="frequent", where="weight < 0.4", tau=1.0)
    mine = chosen & (column(table_codes, "label_name") == "class1")
    assert both["n_tokens"].to_pylist() == np.sort((dense[mine] > 1).sum((0, 1)))[::-1][:10].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Groups


@pytest.mark.parametrize("score", ["mean", "max"])
def test_groups_are_compared_as_scipy_and_scikit_learn_do(
    table_codes: CodeStore, dense: Dense, score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import analysis.query.groups

    monkeypatch.setattr(analysis.query.groups, "BLOCK_ENTRIES", 300)  # many blocks
    a = (column(table_codes, "domain") == "photo") & table_codes.valid
    b = ~a & table_codes.valid
    scores = dense.mean(1) if score == "mean" else dense.max(1)
    contrast = contrast_groups(table_codes, a, b, score=score)
    assert contrast.latent.tolist() == np.flatnonzero((scores[a | b] > 0).any(0)).tolist()
    for k, latent in enumerate(contrast.latent):
        x, y = scores[a, latent], scores[b, latent]
        assert contrast.auroc[k] == pytest.approx(roc_auc_score(a[a | b], scores[a | b, latent]), abs=1e-12)
        test = stats.mannwhitneyu(x, y, method="asymptotic", use_continuity=False)
        assert contrast.p[k] == pytest.approx(test.pvalue, rel=1e-9)
        pooled = np.sqrt(((len(x) - 1) * x.var(ddof=1) + (len(y) - 1) * y.var(ddof=1)) / (len(x) + len(y) - 2))
        assert contrast.cohen_d[k] == pytest.approx((x.mean() - y.mean()) / pooled, rel=1e-9)
        assert (contrast.mean_a[k], contrast.share_b[k]) == pytest.approx((x.mean(), (y > 0).mean()))
    np.testing.assert_allclose(adjust_p(contrast.p), stats.false_discovery_control(contrast.p), rtol=1e-12)


def test_classes_are_separated_and_random_groups_are_not(table_codes: CodeStore) -> None:
    classes = query_groups(table_codes, "label_name == 'class0'", n_top=64)
    assert abs(np.asarray(classes["auroc"]) - 0.5)[0] > 0.4
    assert np.asarray(classes["q"])[0] < 1e-4
    assert (np.diff(abs(np.asarray(classes["auroc"]) - 0.5)) <= 1e-12).all()
    half = query_groups(table_codes, "domain == 'photo'", "domain == 'sketch'", where="weight < 0.9")
    assert set(half.column_names) == set(classes.column_names)


# ---------------------------------------------------------------------------------------------------------------------
# Wrong questions


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda c: query_latent(c, 0, where="splitt == 'x'"), ["splitt", "domain, weight"]),
        (lambda c: query_latent(c, 0, where="weight > 5"), ["weight > 5", "none of the 76 images"]),
        (lambda c: query_latent(c, 64), ["0..63", "64"]),
        (lambda c: query_latent(c, -1), ["0..63", "-1"]),
        (lambda c: query_latent(c, 0, score="median"), ["mean, max", "median"]),
        (lambda c: query_image(c, "no.png"), ["no.png", "0..75"]),
        (lambda c: query_image(c, 0, at=(3, 0)), ["row", "0..2", "3"]),
        (lambda c: query_image(c, 0, at=(0, slice(1, 1))), ["column", "empty"]),
        (lambda c: query_images(c, 4, 4), ["twice"]),
        (lambda c: query_class(c, "cow"), ["cow", "class0, class1, class2"]),
        (lambda c: query_class(c, "class0", where="label_name == 'class1'"), ["class0", "Relax"]),
        (lambda c: query_groups(c, "weight > 5"), ["--group", "none of the"]),
        (lambda c: query_groups(c, "weight > 0.5", "weight > 0.4"), ["share", "overlap", ".png"]),
        (lambda c: query_groups(c, "weight < 0.001"), ["--group", "1 images", "two"]),
        (lambda c: query_groups(c, "weight >= 0", None), ["--versus", "0 images"]),
        (lambda c: query_firing(c, [1, 1]), ["only once"]),
        (lambda c: query_firing(c, [], []), ["at least one"]),
        (lambda c: query_firing(c, [70]), ["0..63", "70"]),
        (lambda _: parse_at("1;2"), ["ROW,COLUMN", "1;2"]),
        (lambda _: parse_latents("1,x", "--fires"), ["--fires", "1,x"]),
        (lambda _: write_answer(pa.table({"a": [1]}), "x.txt"), [".csv, .parquet or .json", "x.txt"]),
    ],
)  # fmt: skip
def test_an_error_says_what_there_is_to_ask_for(
    table_codes: CodeStore, ask: Callable[[CodeStore], Any], words: list[str]
) -> None:
    with pytest.raises(SettingsError) as caught:
        ask(table_codes)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_codes_of_cls_only_have_no_places(tmp_path: Path, tiny_store: Path) -> None:
    from saetrain import SAEConfig, TrainConfig, encode, train

    config = TrainConfig(n_steps=4, batch_size=32, tokens="cls", dead_tokens=1000)
    train(tiny_store, tmp_path / "run", layer=2, sae=SAEConfig(n_latents=32, k=2), config=config)
    codes = encode(tmp_path / "run", tiny_store, tmp_path / "x.codes")
    assert query_image(codes, 0).num_rows
    for ask in (lambda: query_image(codes, 0, at=(0, 0)), lambda: query_patches(codes, 0)):
        with pytest.raises(SettingsError, match="CLS only"):
            ask()


def test_damaged_pointers_raise_an_error_and_do_not_crash(tmp_path: Path, table_codes: CodeStore) -> None:
    import shutil

    copy = Path(shutil.copytree(table_codes.path, tmp_path / "x.codes"))
    for name in ("latent_indptr", "indptr"):
        file = copy / "codes.zarr" / "1" / name / "c" / "0"
        pointers = np.fromfile(file, np.int64)
        pointers[1:] += 10**9
        pointers.tofile(file)
    codes = CodeStore.open(copy)
    for ask in (lambda: query_latent(codes, 0), lambda: query_image(codes, 20)):
        with pytest.raises(PipelineError, match=r"Shard 1 .*verify"):
            ask()


def test_a_question_has_a_subject_and_refuses_what_does_not_go_with_it() -> None:
    assert Question(where="label == 1", latent=3).subject == "latent"
    assert Question(fires="1,2", silent="3").latents == [1, 2]
    assert Question(latent=3).latents == [3]
    assert Question(latent=3, show="co-firing").latents == []
    for given, words in [
        ({}, "No question was asked"),
        ({"latent": 3, "tau": 0.1}, "--tau does not go with --latent"),
        ({"class_": "cow", "score": "max"}, "--score does not go with --class"),
        ({"sample": 0}, "--sample must be at least 1, got 0"),
    ]:
        with pytest.raises(SettingsError, match=words):
            Question(**given)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_answers_are_written_as_csv_and_parquet(tmp_path: Path, table_codes: CodeStore, dense: Dense) -> None:
    answer = query_latent(table_codes, some_latents(dense)[-1])
    assert pq.read_table(write_answer(answer, tmp_path / "x" / "a.parquet")).equals(answer)
    back = pyarrow.csv.read_csv(write_answer(answer, tmp_path / "a.csv"))
    assert back["uri"].to_pylist() == answer["uri"].to_pylist()
    np.testing.assert_allclose(back["score"], answer["score"], rtol=1e-12)


def test_workers_give_the_same_answers(table_codes: CodeStore) -> None:
    from analysis import open_scheduler

    codes = CodeStore.open(table_codes.path)
    want = [query_groups(codes, "domain == 'photo'"), query_class(codes, "class1")]
    n_bytes = codes.bytes_read
    with open_scheduler(n_workers=1):
        assert [query_groups(codes, "domain == 'photo'"), query_class(codes, "class1")] == want
    assert codes.bytes_read == 2 * n_bytes > 0
