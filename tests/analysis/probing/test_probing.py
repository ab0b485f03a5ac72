"""probe_latents(): numbers are those of plain numpy and scikit-learn, and nothing that is judged chooses."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_codes import write_codes
from typer.testing import CliRunner

import cli
from actcache import ActivationStore, SettingsError
from analysis import ProbingConfig, probe_latents, read_result, write_report
from analysis.classifier import choose_validation
from analysis.probing.curve import cut_grid, measure_curve
from analysis.probing.fitting import PENALTIES, Task
from analysis.probing.scores import rank_latents, read_columns
from analysis.probing.target import LEAST, Split, read_target
from analysis.results import Probing
from saetrain import CodeStore

N, T, F, C = 240, 5, 24, 3
SEEN = np.arange(N) < 150
GRID = (1, 4, 16)


def draw_codes(seed: int, n: int = N) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes [I, T, F], classes, numbers): latents 2 to 6 tell something about the class, 8 to 10 about the number."""
    rng = np.random.default_rng(seed)
    classes, numbers = rng.integers(0, C, n), rng.normal(size=n)
    dense = np.where(rng.random((n, T, F)) < 0.25, rng.random((n, T, F)), 0)
    for latent in range(2, 7):
        dense[:, 1:3, latent] += np.where((classes == latent % C)[:, None], 0.4 * rng.random((n, 2)), 0)
    for latent in range(8, 11):
        dense[:, 2, latent] += np.maximum(numbers + 0.5 * rng.normal(size=n), 0)
    return dense.astype(np.float16), classes.astype(np.int32), numbers


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return draw_codes(0)


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory, drawn: tuple[np.ndarray, np.ndarray, np.ndarray]) -> CodeStore:
    dense, classes, numbers = drawn
    sites = np.where(classes == 2, "north", "south")
    columns = {
        "weight": numbers, "site": sites, "rare": ["one", *["a", "b"] * 119, "b"], "flag": classes == 1,
        "grade": classes.astype(np.float64), "empty": pa.nulls(N, pa.string()), "same": ["x"] * N,
        "boxes": [[1, 2]] * N,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("probing")
    return write_codes(folder / "a.codes", dense, [100, 60, 80], classes, seen=SEEN, columns=columns, failed=[7, 200])


def pool(dense: np.ndarray, score: str = "max") -> np.ndarray:
    plain = dense.astype(np.float64)
    return np.asarray(plain.max(1) if score == "max" else plain.mean(1))


def halves() -> tuple[np.ndarray, np.ndarray]:
    return np.setdiff1d(np.flatnonzero(SEEN), [7]), np.setdiff1d(np.flatnonzero(~SEEN), [200])


def standard(rows: np.ndarray, fitted: np.ndarray) -> np.ndarray:
    spread = fitted.std(0)
    return np.asarray((rows - fitted.mean(0)) / np.where(spread > 0, spread, 1))


def plain_accuracy(x: np.ndarray, y: np.ndarray, choosing: np.ndarray, judged: np.ndarray, seed: int) -> float:
    """Logistic regression of scikit-learn alone; C rises until the loss on the held-out fifth gets worse."""
    import warnings

    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    held = choose_validation(y[choosing], seed)
    fit, val = choosing[~held], choosing[held]
    best, smallest = 0.0, np.inf
    for c in (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = LogisticRegression(C=c, max_iter=1000, tol=1e-6).fit(standard(x[fit], x[fit]), y[fit])
        loss = log_loss(y[val], model.predict_proba(standard(x[val], x[fit])))
        if loss >= smallest:
            break
        smallest, best = loss, float(model.score(standard(x[judged], x[fit]), y[judged]))
    return best


@pytest.mark.parametrize("score", ["max", "mean"])
def test_the_curve_is_that_of_scikit_learn(
    codes: CodeStore, drawn: tuple[np.ndarray, np.ndarray, np.ndarray], score: str
) -> None:
    from sklearn.feature_selection import f_classif

    dense, classes, _ = drawn
    found = probe_latents(codes, None, ProbingConfig("label_name", k=GRID, score=score, n_random=1, seed=3))
    x, y = pool(dense, score), classes.astype(np.int64)
    choosing, judged = halves()
    fitted = choosing[~choose_validation(y[choosing], 3)]
    f, _ = f_classif(x[fitted], y[fitted])
    order = np.argsort(-f, kind="stable")
    assert [latent.latent for latent in found.latents] == order[: max(GRID)].tolist()
    np.testing.assert_allclose([latent.ranking for latent in found.latents], f[order[: max(GRID)]], rtol=1e-8)
    points = {(point.selection, point.k): point for point in found.curve}
    for k in GRID:
        expected = plain_accuracy(x[:, order[:k]], y, choosing, judged, 3)
        point = points["chosen", k]
        assert point.score == pytest.approx(expected, abs=1e-12)
        assert point.low is not None
        assert point.high is not None
        assert point.low <= expected <= point.high
        for each in found.differences:
            if each.k == k:
                other = points[each.to, k].score
                assert other is not None
                assert each.difference == pytest.approx(expected - other)
                assert (each.verdict == "no difference") == (each.low <= 0 <= each.high)  # type: ignore[operator]
    logs, scores = np.log(GRID), [points["chosen", k].score for k in GRID]
    mean = next(mean.score for mean in found.means if mean.selection == "chosen")
    assert mean == pytest.approx(np.trapezoid(scores, logs) / (logs[-1] - logs[0]))  # type: ignore[arg-type]
    assert (found.n_chosen, found.n_judged, found.n_firing) == (len(choosing), len(judged), F)
    assert found.raw is None
    assert "no longer there" in str(found.raw_left_out)
    assert found.chance == np.mean(y[judged] == np.bincount(y[choosing]).argmax())


def test_numbers_are_predicted_by_ridge_regression(
    codes: CodeStore, drawn: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    from sklearn.linear_model import Ridge
    from sklearn.metrics import r2_score

    dense, _, y = drawn
    found = probe_latents(codes, None, ProbingConfig("weight", k=(2, 8), n_random=1))
    assert (found.target, found.measure, found.classes, found.chance) == ("number", "r2", None, 0)
    x = pool(dense)
    choosing, judged = halves()
    held = choose_validation(np.zeros(len(choosing), dtype=np.int64), 0)
    fit, val = choosing[~held], choosing[held]
    r = np.array([np.corrcoef(column, y[fit])[0, 1] for column in x[fit].T])
    order = np.argsort(-abs(r), kind="stable")
    assert [latent.latent for latent in found.latents] == order[:8].tolist()
    np.testing.assert_allclose([latent.ranking for latent in found.latents], r[order[:8]], rtol=1e-9)
    for point in [point for point in found.curve if point.selection == "chosen"]:
        own = x[:, order[: point.k]]
        models = [
            Ridge(alpha=len(fit) * penalty, solver="cholesky").fit(standard(own[fit], own[fit]), y[fit])
            for penalty in PENALTIES
        ]
        losses = [((model.predict(standard(own[val], own[fit])) - y[val]) ** 2).mean() for model in models]
        best = models[int(np.argmin(losses))]
        assert point.score == pytest.approx(r2_score(y[judged], best.predict(standard(own[judged], own[fit]))))
    weights = [latent.weight for latent in found.latents[:2]]
    np.testing.assert_allclose(weights, found_weights(x, y, fit, val, order[:2]))
    shuffled = next(point for point in found.curve if (point.selection, point.k) == ("shuffled", 2))
    assert shuffled.score is not None
    assert shuffled.score < 0.1


def found_weights(x: np.ndarray, y: np.ndarray, fit: np.ndarray, val: np.ndarray, latents: np.ndarray) -> np.ndarray:
    """Ridge regression by its normal equations, with the penalty that is best on `val`."""
    own = x[:, latents]
    z, best = standard(own[fit], own[fit]), (np.inf, np.zeros(len(latents)))
    for penalty in PENALTIES:
        w = np.linalg.solve(z.T @ z + len(fit) * penalty * np.eye(len(latents)), z.T @ (y[fit] - y[fit].mean()))
        loss = ((standard(own[val], own[fit]) @ w + y[fit].mean() - y[val]) ** 2).mean()
        best = min(best, (loss, w), key=lambda pair: pair[0])
    return best[1]


def test_a_latent_that_is_the_label_is_found_and_controls_are_at_chance(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    n = 600
    labels = rng.integers(0, 2, n).astype(np.int32)
    dense = np.where(rng.random((n, 4, 40)) < 0.15, rng.random((n, 4, 40)), 0).astype(np.float16)
    dense[:, :, 17] = 0
    dense[labels == 1, 2, 17] = 0.5
    codes = write_codes(tmp_path / "a.codes", dense, [n], labels, seen=np.arange(n) < 300)
    found = probe_latents(codes, None, ProbingConfig("label_name", k=(1,), n_random=3))
    points = {point.selection: point for point in found.curve}
    assert points["chosen"].score == points["chosen"].low == 1
    (latent,) = found.latents
    assert (latent.latent, latent.ranking, latent.class_) == (17, None, "class1")  # F is infinite
    assert latent.weight > 0
    for control in ("random", "shuffled"):
        score = points[control].score
        assert score is not None
        assert abs(score - 0.5) < 0.1
    assert {each.to: each.verdict for each in found.differences} == {"random": "higher", "shuffled": "higher"}


def test_images_that_are_judged_choose_nothing(
    tmp_path: Path, codes: CodeStore, drawn: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    """Other labels, and other codes, on the judged images leave the latents, their ranking and weights as they are."""
    dense, classes, _ = (part.copy() for part in drawn)
    rng = np.random.default_rng(5)
    judged = np.flatnonzero(~SEEN)
    classes[judged] = classes[rng.permutation(judged)]
    dense[judged] = dense[rng.permutation(judged)]
    other = write_codes(tmp_path / "b.codes", dense, [240], classes, seen=SEEN, failed=[7, 200])
    config = ProbingConfig("label_name", k=GRID, n_random=1)
    first, second = probe_latents(codes, None, config), probe_latents(other, None, config)
    assert [each.latent for each in first.latents] == [each.latent for each in second.latents]
    np.testing.assert_allclose([e.weight for e in first.latents], [e.weight for e in second.latents], rtol=1e-5)
    assert first.curve != second.curve


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**31), n_shards=st.integers(1, 4))
def test_the_order_of_images_within_each_part_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, seed: int, n_shards: int
) -> None:
    rng = np.random.default_rng(seed)
    dense, classes, _ = draw_codes(seed, 90)
    y = classes.astype(np.int64)
    held = np.zeros(60, dtype=bool)
    held[40:] = True
    order = np.concatenate([rng.permutation(40), 40 + rng.permutation(20), 60 + rng.permutation(30)])
    folder, found = tmp_path_factory.mktemp("order"), []
    for name, place in (("a", np.arange(90)), ("b", order)):
        sizes = [len(part) for part in np.array_split(place, n_shards)]
        codes = write_codes(folder / f"{name}.codes", dense[place], sizes)
        truth = y[place[:60]], y[place[60:]]
        split = Split(np.arange(60), np.arange(60, 90), truth, tuple("abc"))
        found.append(
            measure_curve(codes, Task(split, held, truth[0]), (1, 5), score="max", n_random=1, n_shuffled=0, seed=0)
        )
    first, second = found
    np.testing.assert_allclose(first.ranked.value[0], second.ranked.value[0], rtol=1e-9)
    assert first.latents.tolist() == second.latents.tolist()
    for condition in (("chosen", 1), ("chosen", 5), ("random", 1)):
        np.testing.assert_array_equal(first.outcomes[condition][order[60:] - 60], second.outcomes[condition])


@settings(max_examples=30, deadline=None)
@given(grid=st.lists(st.integers(1, 500), min_size=1, max_size=6), n_firing=st.integers(1, 300))
def test_k_is_cut_to_the_latents_that_fire(grid: Sequence[int], n_firing: int) -> None:
    cut = cut_grid(tuple(grid), n_firing)
    assert list(cut) == sorted(set(cut))
    assert set(cut) == {min(k, n_firing) for k in grid}


def test_columns_are_the_scores(codes: CodeStore, drawn: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    latents, images = np.array([9, 2, 20]), np.array([0, 5, 99, 100, 239])
    for score in ("max", "mean"):
        dense = read_columns(codes, np.sort(latents), score).dense(latents, images)
        np.testing.assert_allclose(dense, pool(drawn[0], score)[images][:, latents], rtol=1e-12)


def test_a_latent_that_never_varies_has_rank_zero(tmp_path: Path) -> None:
    dense = np.zeros((8, 3, 3), np.float16)
    dense[:, 1, 0] = 0.3
    dense[::2, 1, 1] = 0.3
    codes = write_codes(tmp_path / "a.codes", dense, [8])
    halves = np.array([0, 1] * 4)
    ranked = rank_latents(codes, np.arange(8), [halves, halves[::-1].copy()], 2, "max")
    np.testing.assert_array_equal(ranked.value, [[0, np.inf, 0]] * 2)
    assert ranked.n_images.tolist() == [8, 4, 0]
    silent = write_codes(tmp_path / "silent.codes", np.zeros_like(dense), [8], halves.astype(np.int32))
    with pytest.raises(SettingsError, match=r"No latent of .* fires on the images that are fitted"):
        probe_latents(silent)
    assert ranked.best(0, 3).tolist() == [1, 0]  # a silent latent is never chosen
    by_number = rank_latents(codes, np.arange(8), [np.array([1.0, 0, 1, 0, 1, 0, 1, 0])], None, "max")
    np.testing.assert_allclose(by_number.value, [[0, 1, 0]])


# ---------------------------------------------------------------------------------------------------------------------
# Columns and images


def test_what_a_column_holds_is_found_or_told(codes: CodeStore) -> None:
    target = {name: read_target(codes.images, name) for name in ("site", "weight", "flag", "grade", "label")}
    assert target["site"].names == ("north", "south")
    assert target["weight"].names is None
    assert target["flag"].names == ("false", "true")
    assert target["grade"].names == target["label"].names == ("0", "1", "2")
    assert read_target(codes.images, "grade", "number").names is None
    many = read_target(codes.images, "weight", "class").names
    assert many is not None
    assert len(many) == len(set(many))
    table = pa.table({
        "label": [-1, 0, 1], "text": ["", "a", None], "number": [float("nan"), None, 2.0],
        "id": [1234567, None, 2**62 + 1], "dictionary": pa.array(["a", "b", None]).dictionary_encode(),
    })  # fmt: skip
    assert read_target(table, "id").names == ("1234567", str(2**62))  # a float64 tells no more apart
    assert read_target(pa.table({"x": [0.25, 3.0]}), "x").names == ("0.25", "3")
    present = {name: read_target(table, name).present.tolist() for name in table.column_names}
    assert present == {
        "label": [False, True, True], "text": [False, True, False], "number": [False, False, True],
        "id": [True, False, True], "dictionary": [True, True, False],
    }  # fmt: skip


def test_classes_with_too_few_images_are_left_out_and_counted(codes: CodeStore) -> None:
    found = probe_latents(codes, None, ProbingConfig("rare", k=(1,), n_random=1))
    assert found.classes == ("a", "b")
    assert (found.n_classes_left_out, found.n_images_left_out) == (1, 1)
    assert any("1 classes with 1 images are left out" in note for note in found.notes())
    assert LEAST == 2


def test_new_images_are_cut_in_halves_and_where_restricts(tmp_path: Path, codes: CodeStore) -> None:
    dense, classes, _ = draw_codes(3, 60)
    new = write_codes(tmp_path / "new.codes", dense, [60], classes, seen=np.zeros(60, bool))
    found = probe_latents(new, None, ProbingConfig("label_name", k=(1,), n_random=1))
    counts = np.bincount(classes)
    assert (found.n_chosen, found.n_judged) == ((counts // 2).sum(), (counts - counts // 2).sum())
    config = ProbingConfig("label_name", k=(1,), n_random=1, where="site == 'south'")
    south = probe_latents(codes, None, config)
    assert south.classes == ("class0", "class1")
    used = probe_latents(codes, None, ProbingConfig("label_name", k=(1,), n_random=1, on_seen="use"))
    assert used.n_chosen + used.n_judged == N - 2
    assert used.seen is not None
    assert (used.seen[0].n, used.seen[0].used) == (149, True)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"label": "nothing"}, r"the unknown column 'nothing'. Columns: source_index, uri, label"),
        ({"label": "empty"}, "No image has a value in the column 'empty'"),
        ({"label": "same"}, "of the 1 classes of the column 'same' 1 has 2 images"),
        ({"label": "uri"}, "of the 238 classes of the column 'uri' 0 has 2 images"),
        ({"label": "boxes"}, "which holds list"),
        ({"label": "site", "as_": "number"}, "--as number needs numbers"),
        ({"label": "weight", "where": "source_index < 100"}, "Nothing is left to judge"),
        ({"label": "site", "where": "source_index == 7"}, "has a value in the column 'site'"),
        ({"label": "grade", "as_": "number", "where": "grade == 1"}, "fewer than two different numbers"),
    ],
)
def test_bad_input_is_named(codes: CodeStore, tmp_path: Path, how: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        probe_latents(codes, tmp_path / "p.json", ProbingConfig(**how))
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"as_": "text"}, "--as must be one of class, number"), ({"k": (0,)}, "--k must be"),
        ({"k": ()}, "--k must name"), ({"score": "sum"}, "--score must be"), ({"n_random": 0}, "--n-random must be"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(how: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        ProbingConfig("label_name", **how)


# ---------------------------------------------------------------------------------------------------------------------
# The whole verb


def test_raw_activations_names_and_the_page(tmp_path: Path, tiny_codes: Path, tiny_store: Path) -> None:
    from analysis import AnalyzeConfig, analyze, set_name

    concepts = analyze(tiny_codes, tmp_path / "x.concepts", config=AnalyzeConfig(n_gallery=64))
    out = tmp_path / "p.json"
    config = ProbingConfig("label_name", k=(1, 4), n_random=1, on_seen="use")
    first = probe_latents(tiny_codes, None, config)
    best = first.latents[0].latent
    set_name(concepts, best, name="<red>")
    found = probe_latents(tiny_codes, out, config, concepts=concepts)
    assert found.latents[0].name == "<red>"
    assert read_result(out, Probing) == found
    written = out.read_bytes()
    assert probe_latents(tiny_codes, out, config, concepts=concepts) == found
    assert out.read_bytes() == written
    store, codes = ActivationStore.open(tiny_store), CodeStore.open(tiny_codes)
    x = store.read(codes.hook_point).astype(np.float64)
    features = np.concatenate([x[:, 0], x[:, 1:].mean(1)], axis=1)
    y = np.unique(codes.images["label_name"].to_pylist(), return_inverse=True)[1]
    rng = np.random.Generator(np.random.Philox(0))
    parts = [rng.permutation(np.flatnonzero(y == c)) for c in range(y.max() + 1)]
    choosing = np.sort(np.concatenate([part[: len(part) // 2] for part in parts]))
    judged = np.setdiff1d(np.arange(len(y)), choosing)
    assert found.raw is not None
    assert (found.raw.features, found.raw.n_features) == ("cls+patch", features.shape[1])
    assert found.raw.score == pytest.approx(plain_accuracy(features, y, choosing, judged, 0), abs=1e-12)
    page = write_report(concepts, tmp_path / "r.html", results=[out]).read_text()
    section = page.split(">Probing label_name</h2>")[1].split("<h2")[0]
    shown = set(concepts.gallery["latent"].to_pylist())  # those with few images are not
    for latent in (each.latent for each in found.latents):
        assert (f'<a href="#latent-{latent}">{latent}</a>' in section) == (latent in shown)
        assert f">{latent}<" in section
    assert shown & {each.latent for each in found.latents}
    assert "&lt;red&gt;" in section
    assert "<red>" not in section


def test_the_verb_prints_what_it_writes(codes: CodeStore, tmp_path: Path) -> None:
    words = ["probe", str(codes.path), str(tmp_path / "p.json"), "--label", "site", "--k", "1", "--n-random", "1"]
    done = CliRunner().invoke(cli.app, ["--json", *words])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    written = json.loads((tmp_path / "p.json").read_text())
    assert {name: said[name] for name in said if name != "out"} == {n: v for n, v in written.items() if n != "digest"}
    shown = CliRunner().invoke(cli.app, words)
    assert "mean over log k: chosen" in shown.stdout
    assert "Wrote" in shown.stderr or "p.json" in shown.stderr
    wrong = CliRunner().invoke(cli.app, ["probe", str(codes.path), "--label", "weight", "--as", "text"])
    assert wrong.exit_code == 1
    assert "--as must be one of class, number" in wrong.stderr
