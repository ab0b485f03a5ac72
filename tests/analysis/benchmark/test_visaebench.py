"""--protocol visaebench: its values are those of scikit-learn on dense arrays, and those of the real package."""

import importlib.util
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from structured_store import N_CLASSES, SIDE, write_structured

from actcache import SettingsError, open_stores
from analysis import StudyConfig, benchmark_runs
from analysis.benchmark.measured import Measured, Skipped
from analysis.benchmark.subject import Subject
from analysis.benchmark.visaebench import localization, monosemanticity
from analysis.benchmark.visaebench.absorption import choose_tests, make_taker, run_tests
from analysis.benchmark.visaebench.hierarchy import number_groups, read_hierarchy
from analysis.benchmark.visaebench.images import ProtocolImages
from analysis.benchmark.visaebench.pairs import cut_patches, find_patch_pairs, read_pairs, sum_pairs
from analysis.benchmark.visaebench.protocol import DEFECTS, NAMES, Protocol, measure_visaebench, open_protocol
from analysis.config import BenchmarkConfig
from saetrain import CodeStore, LatentCodes, Run, SAEConfig, TrainConfig, encode, train

ROOT = Path(__file__).parents[3]
N_LATENTS, K = 64, 4
P = SIDE * SIDE
GROUPS = {"low": ["class0", "class1", "class2"], "high": ["class3", "class4", "class5"], "two": ["class0", "class5"]}


class World(NamedTuple):
    folder: Path
    subject: Subject
    second: CodeStore
    config: BenchmarkConfig
    protocol: Protocol

    def measure(self, protocol: Protocol | None = None) -> dict[str, Measured | Skipped]:
        found = measure_visaebench(
            self.subject, protocol or self.protocol, lambda subject, store: self.second, lambda done, total: None
        )
        return {each.name: each for each in found}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """An SAE of structured activations, codes of them and of a second set, and all that the metrics can be given."""
    folder = tmp_path_factory.mktemp("visaebench")
    write_structured(folder, 420)
    write_structured(folder, 150, seed=5, name="second")
    settings = TrainConfig(n_steps=150, batch_size=256, lr=3e-3)
    run = train(folder / "x.acts", folder / "run", layer=1, sae=SAEConfig(n_latents=N_LATENTS, k=K), config=settings)
    codes = encode(run, folder / "x.acts", folder / "x.codes", device="cpu")
    second = encode(run, folder / "second.acts", folder / "second.codes", device="cpu")
    (folder / "groups.json").write_text(json.dumps(GROUPS))
    config = BenchmarkConfig(
        protocol="visaebench", hierarchy=folder / "groups.json", transfer=str(folder / "second.acts"),
        embeddings=str(folder / "x.acts"),
    )  # fmt: skip
    protocol = open_protocol(open_stores(folder / "x.acts"), run, config)
    return World(folder, Subject("run", None, None, run, codes), second, config, protocol)


@pytest.fixture(scope="module")
def measured(world: World) -> dict[str, Measured]:
    found = world.measure()
    assert list(found) == list(NAMES)
    assert all(isinstance(each, Measured) for each in found.values())
    return found  # type: ignore[return-value]


class Plain(NamedTuple):
    """Everything dense: codes [N, P, F], normalized activations [N, P, D] and reconstructions, labels."""

    z: np.ndarray
    x: np.ndarray
    back: np.ndarray
    y: np.ndarray

    @property
    def c(self) -> np.ndarray:
        return self.z.max(1).astype(np.float32)

    @classmethod
    def of(cls, run: Run, images: ProtocolImages, dense: np.ndarray) -> "Plain":
        w = {name: value.numpy().astype(np.float64) for name, value in run.sae().state_dict().items()}
        raw = images.store.read(1, images=images.images, tokens="patch").astype(np.float64)
        z = dense[images.images][:, 1:]
        assert images.labels is not None
        return cls(z, (raw - w["mean"]) * w["scale"], z @ w["decoder"] + w["b_dec"], images.labels)

    def fvu(self) -> float:
        def variance(values: np.ndarray) -> float:
            n = values.shape[0] * values.shape[1]
            return float((values**2).sum() / n - (values.sum() / n) ** 2)

        return variance(self.x - self.back) / variance(self.x)

    def probe(self, columns: np.ndarray, max_iter: int = 500, other: np.ndarray | None = None) -> list[float]:
        """Accuracy on the test part of `columns`, and of `other` if it is given."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import train_test_split

        fit, test = train_test_split(np.arange(len(self.y)), test_size=0.2, stratify=self.y, random_state=42)
        model = LogisticRegression(C=1.0, max_iter=max_iter)
        with _ignoring():
            model.fit(columns[fit].astype(np.float32), self.y[fit])
        tried = [columns] if other is None else [columns, other]
        return [float(model.score(each[test].astype(np.float32), self.y[test])) for each in tried]


def _ignoring() -> Any:
    return warnings.catch_warnings(action="ignore")


@pytest.fixture(scope="module")
def plain(world: World, dense_values: Callable[[CodeStore], np.ndarray]) -> tuple[Plain, Plain]:
    """The first set and the second."""
    run, transfer = world.subject.run, world.protocol.transfer
    assert isinstance(transfer, ProtocolImages)
    return (
        Plain.of(run, world.protocol.images, dense_values(world.subject.codes)),
        Plain.of(run, transfer, dense_values(world.second)),
    )


def neighbors(side: int) -> np.ndarray:
    place = np.array([(i // side, i % side) for i in range(side * side)])
    near: np.ndarray = np.abs(place[:, None] - place[None]).max(-1) == 1
    return near.astype(float)


def plain_morans(z: np.ndarray, enough: int, group: int, shard: int) -> tuple[np.ndarray, np.ndarray]:
    """(sums [F], counts [F]) by loops over groups of images, as the package takes them."""
    w, n_patches = neighbors(SIDE), z.shape[1]
    total, count = np.zeros(z.shape[2]), np.zeros(z.shape[2], int)
    for begin in range(0, len(z), shard):
        for first in range(begin, min(begin + shard, len(z)), group):
            full = count >= enough
            for image in z[first : min(first + group, begin + shard)]:
                centered = image - image.mean(0)
                spread = (centered**2).sum(0)
                active = (image != 0).sum(0)
                valid = (active >= 5) & (active <= int(0.9 * n_patches)) & (spread > 1e-10) & ~full
                value = n_patches / w.sum() * (centered * (w @ centered)).sum(0) / np.maximum(spread, 1e-10)
                total[valid] += value[valid]
                count[valid] += 1
    return total, count


# ---------------------------------------------------------------------------------------------------------------------
# Each metric, written out on dense arrays


def test_m1_is_morans_i_with_dense_weights(measured: dict[str, Measured], plain: tuple[Plain, Plain]) -> None:
    total, count = plain_morans(plain[0].z, 200, 64, 5000)
    evaluable = count >= 50
    found = measured["feature_localization"]
    assert evaluable.sum() > 20
    assert found.details["num_evaluable_features"] == evaluable.sum()
    assert found.value == pytest.approx((total[evaluable] / count[evaluable]).mean(), rel=1e-6)


@pytest.mark.parametrize(("enough", "group", "shard"), [(60, 16, 100), (33, 64, 420), (1, 7, 50)])
def test_m1_stops_collecting_where_the_package_does(
    world: World, plain: tuple[Plain, Plain], monkeypatch: pytest.MonkeyPatch, enough: int, group: int, shard: int
) -> None:
    for name, value in (("ENOUGH", enough), ("GROUP", group), ("SHARD", shard)):
        monkeypatch.setattr(localization, name, value)
    total, count = plain_morans(plain[0].z, enough, group, shard)
    latents = np.flatnonzero(count)
    assert (count[latents] >= enough).sum() > 5
    found = localization.mean_morans(world.subject.codes, world.protocol.images, latents)
    np.testing.assert_allclose(found, total[latents] / count[latents], rtol=1e-6)


@pytest.mark.parametrize(("side", "total"), [(7, 312), (14, 1404), (16, 1860), (24, 4324)])
def test_neighbors_of_known_grids(side: int, total: int) -> None:
    assert localization.count_neighbors((side, side)).sum() == total
    np.testing.assert_array_equal(localization.count_neighbors((side, side)), neighbors(side).sum(1))


def test_morans_i_of_planted_patterns() -> None:
    side = 14
    block, board = np.zeros((side, side)), np.indices((side, side)).sum(0) % 2
    block[4:7, 5:8] = 1
    line = np.zeros((side, side))
    line[3, 2:7] = 1
    patterns = [block, board, line]
    rows = [np.flatnonzero(pattern.reshape(-1)) + 1 for pattern in patterns]
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    entries = LatentCodes(indptr, np.concatenate(rows).astype(np.uint32), np.ones(indptr[-1], np.float16))
    (part,) = cut_patches(entries, 1 + side * side)
    value, localized = localization.find_morans(part, (side, side))
    np.testing.assert_allclose(value, [0.59, -0.04, 0.20], atol=0.006)
    assert localized.all()


def test_m2_m3_and_m4_are_those_of_dense_arrays(measured: dict[str, Measured], plain: tuple[Plain, Plain]) -> None:
    from sklearn.feature_selection import f_classif

    one = plain[0]
    assert measured["visaebench fvu"].value == pytest.approx(one.fvu(), rel=1e-6)
    assert measured["visaebench fvu"].details["l0"] == pytest.approx((one.z != 0).sum(2).mean())
    original, reconstructed = one.probe(one.x.mean(1), 1000, one.back.mean(1))
    found = measured["downstream_preservation"]
    assert found.details["accuracy_original"] == original
    assert found.details["accuracy_reconstructed"] == reconstructed
    assert found.value == pytest.approx(reconstructed / original)
    with np.errstate(all="ignore"), _ignoring():
        f = np.nan_to_num(f_classif(one.c, one.y)[0], nan=-np.inf)
    best = np.argsort(f)[::-1]
    accuracy = {k: one.probe(one.c[:, best[:k]])[0] for k in (1, 5, 10, 20, 50)}
    found = measured["sparse_probing_auc"]
    assert found.details["k_accuracies"] == {str(k): value for k, value in accuracy.items()}
    assert found.value == pytest.approx(np.trapezoid(list(accuracy.values()), list(accuracy)) / 49)
    assert accuracy[50] > 2 / N_CLASSES


def test_m5_is_the_weighted_mean_of_cosines(
    measured: dict[str, Measured], world: World, plain: tuple[Plain, Plain]
) -> None:
    raw = world.protocol.images.store.read(1, images=world.protocol.images.images, tokens="patch").mean(1)
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    scores = []
    for column in plain[0].c.T:
        if not column.any():
            continue
        top = np.argsort(-column, kind="stable")[:16]
        w = (column[top] - column.min()) / (column.max() - column.min())
        pairs = [(a, b) for a in range(16) for b in range(a)]
        weight = sum(w[a] * w[b] for a, b in pairs)
        scores.append(sum(w[a] * w[b] * unit[top[a]] @ unit[top[b]] for a, b in pairs) / weight)
    assert measured["monosemanticity"].value == pytest.approx(np.mean(scores), rel=1e-6)
    assert measured["monosemanticity"].details["num_features_scored"] == len(scores)


def test_m6_is_the_mean_of_its_four_parts(measured: dict[str, Measured], plain: tuple[Plain, Plain]) -> None:
    from sklearn.feature_selection import f_classif
    from sklearn.model_selection import train_test_split

    one, two = plain
    fit, _ = train_test_split(np.arange(len(two.y)), test_size=0.2, stratify=two.y, random_state=42)
    with np.errstate(all="ignore"), _ignoring():
        f = np.nan_to_num(f_classif(two.c[fit], two.y[fit])[0], nan=-np.inf)
    here, there = one.c.any(0), two.c.any(0)
    parts = [
        1 - two.fvu(), (here & there).sum() / here.sum(), (here & there).sum() / (here | there).sum(),
        two.probe(two.c[:, np.argsort(f)[::-1][:10]])[0],
    ]  # fmt: skip
    assert measured["cross_domain"].value == pytest.approx(np.mean(parts), rel=1e-6)


def test_m7_counts_gaps_and_overlaps(measured: dict[str, Measured], world: World, plain: tuple[Plain, Plain]) -> None:
    from sklearn.feature_selection import f_classif
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    one, images = plain[0], world.protocol.images
    codes, found = world.subject.codes, []
    assert isinstance(world.protocol.groups, dict)
    totals = sum_pairs(codes, images, images.classes[1], N_CLASSES)
    tests = choose_tests(totals, images, world.protocol.groups)
    read_pairs(codes, images, [make_taker(tests, images)])
    outcomes = {(each.group, each.number): each for each in run_tests(tests, lambda done, total: None)}
    for name, (numbers, _) in world.protocol.groups.items():
        if len(numbers) < 3:
            continue
        c, y = one.c[np.isin(one.y, numbers)], one.y[np.isin(one.y, numbers)]
        of_group = set(np.argsort(c.mean(0))[-10:])
        for number in numbers:
            of_class = set(np.argsort(c[y == number].mean(0))[-10:])
            overlap = len(of_class & of_group) / len(of_class | of_group)
            with np.errstate(all="ignore"), _ignoring():
                best = np.argsort(np.nan_to_num(f_classif(c, y == number)[0], nan=-np.inf))[::-1]
            f1 = []
            for k in (1, 4):
                model = LogisticRegression(C=1.0, max_iter=500).fit(c[:, best[:k]], y == number)
                f1.append(f1_score(y == number, model.predict(c[:, best[:k]]), zero_division=0.0))
            mine = outcomes[name, number]
            assert (mine.overlap, mine.f1_narrow, mine.f1_wide) == pytest.approx((overlap, *f1))
            found.append(f1[1] - f1[0] > 0.1 or overlap > 0.5)
    assert len(found) == len(outcomes) == 6
    assert measured["absorption_rate"].value == pytest.approx(np.mean(found))


def test_pairs_leave_cls_out(dense_values: Callable[[CodeStore], np.ndarray], tiny_codes: Path) -> None:
    codes = CodeStore.open(tiny_codes)
    dense = dense_values(codes)[:, 1:]
    pairs = [find_patch_pairs(codes.read_by_latent(shard), codes.n_tokens) for shard in range(codes.n_shards)]
    c = np.zeros((codes.n_images, codes.n_latents))
    n_active, spread = np.zeros_like(c), np.zeros_like(c)
    for part in pairs:
        assert part is not None
        c[part.image, part.latent], n_active[part.image, part.latent] = part.peak, part.n_active
        spread[part.image, part.latent] = part.spread
    np.testing.assert_array_equal(c, dense.max(1))
    np.testing.assert_array_equal(n_active, (dense != 0).sum(1))
    np.testing.assert_allclose(spread, ((dense - dense.mean(1, keepdims=True)) ** 2).sum(1), atol=1e-6)


def test_the_samples_are_the_packages() -> None:
    for most in (localization.MOST_LATENTS, monosemanticity.MOST_LATENTS):
        candidates = np.arange(0, 3 * most, 2)
        wanted = np.random.RandomState(42).choice(candidates, size=most, replace=False)
        np.testing.assert_array_equal(localization.sample(candidates, most), np.sort(wanted))
        np.testing.assert_array_equal(localization.sample(candidates[:most], most), candidates[:most])


# ---------------------------------------------------------------------------------------------------------------------
# The real package


def load_worker() -> Any:
    spec = importlib.util.spec_from_file_location("worker", ROOT / "benchmarks" / "visaebench_worker.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_values_are_those_of_the_real_package(
    world: World, measured: dict[str, Measured], run_peers: Callable[..., str], tmp_path: Path
) -> None:
    """It encodes and decodes with its own SAE of the same weights. Its codes are rounded to float16, as ours are.

    Without that, an image near the border between two classes is predicted otherwise on some processors.
    """
    worker, images, transfer = load_worker(), world.protocol.images, world.protocol.transfer
    assert isinstance(transfer, ProtocolImages)
    assert isinstance(world.protocol.groups, dict)
    for name, each in (("shard", images), ("ood", transfer)):
        x = each.store.read(1, images=each.images, tokens="patch")
        worker.write_files(tmp_path, world.subject.run.sae(), [x], each.labels, name=name)
    np.save(tmp_path / "embeddings.npy", images.store.read(1, images=images.images, tokens="patch").mean(1))
    groups = {
        name: {"class_indices": numbers, "hierarchy_depth": depth}
        for name, (numbers, depth) in world.protocol.groups.items()
    }
    (tmp_path / "groups.json").write_text(json.dumps(groups))
    said = run_peers(ROOT / "benchmarks" / "visaebench_worker.py", tmp_path, "--float16-codes")
    theirs = json.loads(said.splitlines()[-1])["metrics"]
    ours = {name.removeprefix("visaebench "): each for name, each in measured.items()}
    assert set(theirs) == set(ours)
    for name, their in theirs.items():
        assert ours[name].value == pytest.approx(their["value"], rel=1e-4), name
    for name in ("downstream_preservation", "sparse_probing_auc", "absorption_rate"):
        assert ours[name].value == pytest.approx(theirs[name]["value"], rel=1e-12), name
    told = theirs["sparse_probing_auc"]["metadata"]["k_accuracies"]
    assert told == ours["sparse_probing_auc"].details["k_accuracies"]
    for fact in ("mean_overlap", "mean_f1_k1", "mean_f1_k4"):
        assert ours["absorption_rate"].details[fact] == pytest.approx(theirs["absorption_rate"]["metadata"][fact])
    assert theirs["fvu"]["metadata"]["l0"] == pytest.approx(ours["fvu"].details["l0"], rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# What is missing, and what is wrong


def test_what_is_not_given_is_left_out_with_the_reason(world: World) -> None:
    store = open_stores(world.folder / "x.acts")
    bare = world.measure(open_protocol(store, world.subject.run, BenchmarkConfig(protocol="visaebench")))
    for name, flag in (("monosemanticity", "--embeddings"), ("cross_domain", "--transfer"),
                       ("absorption_rate", "--hierarchy")):  # fmt: skip
        left_out = bare[name]
        assert isinstance(left_out, Skipped)
        assert flag in left_out.reason
    assert sum(isinstance(each, Measured) for each in bare.values()) == 4
    for each in bare.values():
        if isinstance(each, Measured):
            assert each.replicates is None
            assert each.details["defect"] == DEFECTS[each.name]


def test_without_labels_what_needs_none_is_measured(world: World, measured: dict[str, Measured]) -> None:
    images = world.protocol.images
    unlabeled = ProtocolImages(images.store, images.images, None, {})
    found = world.measure(replace(world.protocol, images=unlabeled))
    for name in ("feature_localization", "visaebench fvu", "monosemanticity", "cross_domain"):
        each = found[name]
        assert isinstance(each, Measured)
        assert each.value == pytest.approx(measured[name].value)
    for name in ("downstream_preservation", "sparse_probing_auc", "absorption_rate"):
        each = found[name]
        assert isinstance(each, Skipped)
        assert "no image" in each.reason


def test_one_class_and_classes_of_one_image_say_so(world: World) -> None:
    images = world.protocol.images
    assert images.labels is not None
    one = images.images[images.labels == 0]
    alone = ProtocolImages(images.store, one, np.zeros(len(one), np.int64), {0: "class0"})
    with pytest.raises(SettingsError, match="one class"):
        alone.split  # noqa: B018
    tiny = ProtocolImages(images.store, images.images[:4], np.array([0, 0, 1, 1]), {0: "a", 1: "b"})
    with pytest.raises(SettingsError, match="the package fails, too"):
        tiny.split  # noqa: B018
    gap = ProtocolImages(images.store, images.images[:40], np.repeat([0, 2], 20), {0: "a", 2: "b"})
    from sklearn.model_selection import train_test_split

    wanted = train_test_split(np.arange(40), test_size=0.2, random_state=42)
    np.testing.assert_array_equal(gap.split[1], wanted[1])  # number 1 is missing, so the split is not stratified


def test_other_stores_that_do_not_fit_are_named(world: World, tiny_store: Path) -> None:
    store = open_stores(world.folder / "x.acts")
    wrong = BenchmarkConfig(
        protocol="visaebench", transfer=str(tiny_store), embeddings=str(world.folder / "second.acts")
    )
    protocol = open_protocol(store, world.subject.run, wrong)
    assert isinstance(protocol.transfer, str)
    assert "was trained on model" in protocol.transfer
    assert isinstance(protocol.embeddings, str)
    assert "holds other images" in protocol.embeddings


def test_a_hierarchy_is_read_in_three_forms_and_refused_in_others(tmp_path: Path) -> None:
    file = tmp_path / "groups.json"
    names = {0: "cat", 1: "dog", 5: "fox"}

    def read(content: object) -> dict[str, Any]:
        file.write_text(json.dumps(content))
        return number_groups(read_hierarchy(file), names)

    assert read({"pets": ["cat", "dog"]}) == {"pets": ((0, 1), 1)}
    assert read({"pets": [0, 5]}) == {"pets": ((0, 5), 1)}
    own = {"sibling_groups": {"pets": {"class_indices": [1, 700], "class_names": ["x", "y"], "hierarchy_depth": 2}}}
    assert read(own) == {"pets": ((1, 700), 2)}
    with pytest.raises(SettingsError, match="no image has, such as wolf"):
        read({"pets": ["cat", "wolf"]})
    for wrong in ([], {}, {"pets": "cat"}, {"pets": [1.5]}, {"pets": {"hierarchy_depth": 1}}):
        with pytest.raises(SettingsError, match="--hierarchy"):
            read(wrong)
    file.write_text("{")
    with pytest.raises(SettingsError, match="not a JSON file"):
        read_hierarchy(file)
    with pytest.raises(SettingsError, match="could not be read"):
        read_hierarchy(tmp_path / "absent.json")


# ---------------------------------------------------------------------------------------------------------------------
# The whole


def test_the_table_stands_in_the_result_and_the_hierarchy_in_its_identity(world: World, tmp_path: Path) -> None:
    def run(config: BenchmarkConfig) -> Any:
        study = StudyConfig(on_seen="use")
        return benchmark_runs(world.folder / "run", world.folder / "x.acts", tmp_path / "b.json", config, study=study,
                              codes=[world.subject.codes])  # fmt: skip

    result = run(world.config)
    rows = {row["subject"]: row for row in result.rows("visaebench")}
    assert {"run", "untrained run"} < set(rows)
    assert [name.rstrip(" ↑↓") for name in rows["run"]][1:] == list(NAMES)
    whole = result.find("run", "feature_localization")
    assert whole.value == pytest.approx(world.measure()["feature_localization"].value)  # type: ignore[union-attr]
    assert (whole.low, whole.high) == (None, None)
    assert result.parents["transfer store"].path == "second.acts"
    assert run(world.config) == result
    other = tmp_path / "groups.json"
    other.write_text(json.dumps({"low": GROUPS["low"]}))
    with pytest.raises(SettingsError, match="made with other settings"):
        run(BenchmarkConfig(protocol="visaebench", hierarchy=other))
