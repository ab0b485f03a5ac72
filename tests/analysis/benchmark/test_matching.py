"""Measure 5: coalitions and scores are those of plain loops over images, and planted latents are found."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import f1_score, fbeta_score
from small_codes import write_codes

from actcache import open_stores
from analysis import StudyConfig
from analysis.benchmark.attributes import Attributes, Marked, read_attributes
from analysis.benchmark.coalitions import answer_coalitions, choose_coalitions
from analysis.benchmark.image_pairs import ImagePairs, connect, measure_pairs, read_pairs
from analysis.benchmark.judging import choose_judged
from analysis.benchmark.matching import Matching, measure_matching
from analysis.benchmark.measured import Measured, Skipped
from analysis.benchmark.resamples import Resamples
from analysis.benchmark.subject import Judged, Subject
from saetrain import CodeStore, Run

N_LATENTS = 12
NO_MASKS = Skipped("patch mAP", "no masks")


def plain_coalition(y: NDArray[np.bool_], z: NDArray[np.bool_]) -> list[int]:
    """Written as the source says it, with scikit-learn's scores: y [n] of the known images, z [n, F]."""
    residual, answer, coalition, best = y.copy(), np.zeros_like(y), [], 0.0
    for _ in range(3):
        scores = [fbeta_score(residual, z[:, f], beta=0.5, zero_division=0) for f in range(z.shape[1])]
        f = int(np.argmax(scores))
        answer = answer | z[:, f]
        if (reached := f1_score(y, answer, zero_division=0)) <= best:
            break
        coalition, best, residual = [*coalition, f], reached, residual & ~z[:, f]
    return coalition


def make(folder: Path, seed: int, n_images: int = 60, n_tokens: int = 4) -> tuple[CodeStore, NDArray[np.bool_], Any]:
    """(codes, what fires on which image [I, F], attributes [I, A] with some unknown ones)."""
    rng = np.random.default_rng(seed)
    values = np.where(rng.random((n_images, 4)) < 0.4, 1, 0).astype(np.int8)
    values[rng.random(values.shape) < 0.1] = -1
    dense = np.where(rng.random((n_images, n_tokens, N_LATENTS)) < rng.uniform(0.01, 0.2, N_LATENTS), 1.0, 0)
    dense[:, 1, 3] = (values[:, 0] == 1) & (rng.random(n_images) < 0.6)  # two latents share attribute 0
    dense[:, 2, 5] = (values[:, 0] == 1) & (rng.random(n_images) < 0.6)
    dense[:, :, 8] = 0
    dense[:, 0, 8] = values[:, 1] == 1  # one is attribute 1, on the first token
    codes = write_codes(folder / "x.codes", dense.astype(np.float16), [16, 16, 16, n_images - 48])
    return codes, dense.any(1), values


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_coalitions_are_those_of_the_pursuit_written_plainly(tmp_path_factory: Any, seed: int) -> None:
    codes, fires, values = make(tmp_path_factory.mktemp("codes"), seed)
    images = np.flatnonzero(np.random.default_rng(seed).random(60) < 0.8)
    found = choose_coalitions(codes, Marked(images, values[images]))
    for a in range(4):
        known = images[values[images, a] >= 0]
        want = plain_coalition(values[known, a] == 1, fires[known])
        assert [latent for latent in found[a].tolist() if latent >= 0] == want
    assert found[1].tolist() == [8, -1, -1]
    answer = answer_coalitions(codes, images, found)
    for a in range(4):
        mine = [latent for latent in found[a].tolist() if latent >= 0]
        np.testing.assert_array_equal(answer[:, a], fires[images][:, mine].any(1))


# ---------------------------------------------------------------------------------------------------------------------
# The score of a subject


def judge(codes: CodeStore, images: pa.Table | None = None, **parts: Any) -> Judged:
    store: Any = type("Store", (), {"images": codes.images if images is None else images, "path": Path("x.acts")})()
    halves = np.arange(0, codes.n_images, 2), np.arange(1, codes.n_images, 2)
    return Judged(store, halves[0], halves[1], Resamples(len(halves[0]), n=30, seed=1), 0, **parts)


def as_subject(codes: CodeStore, name: str = "run", of: str | None = None) -> Subject:
    run: Any = None
    return Subject(name, "untrained" if of else None, of, run, codes)


def attributes_of(judged: Judged, values: NDArray[np.int8]) -> Attributes:
    names = tuple(f"color:{name}" for name in ("red", "blue", "green", "gray")[: values.shape[1]])
    return Attributes(
        names, Marked(judged.choosing, values[judged.choosing]), Marked(judged.images, values[judged.images])
    )


def test_scores_and_replicates_are_those_of_scikit_learn(tmp_path: Path) -> None:
    codes, fires, values = make(tmp_path, 4)
    judged = judge(codes)
    attributes = attributes_of(judged, values)
    one_each = np.eye(N_LATENTS, dtype=np.float16)[np.arange(240) % 7].reshape(60, 4, -1)
    other = write_codes(tmp_path / "y.codes", one_each, [60])
    untrained = as_subject(other, "untrained run", "run")
    matching = Matching(judged, attributes, {"run": untrained})
    score, above = measure_matching(as_subject(codes), matching)
    (base,) = measure_matching(untrained, matching)
    assert isinstance(score, Measured)
    assert isinstance(above, Measured)
    assert isinstance(base, Measured)
    assert [each.name for each in (score, above, base)] == ["MATCHScore", "MATCHScore above untrained", "MATCHScore"]
    coalitions = choose_coalitions(codes, attributes.choosing)

    def plain(images: NDArray[np.int64]) -> list[float]:
        numbers = []
        for a in range(4):
            known = images[values[images, a] >= 0]
            mine = [latent for latent in coalitions[a].tolist() if latent >= 0]
            numbers.append(f1_score(values[known, a] == 1, fires[known][:, mine].any(1), zero_division=0))
        return numbers

    assert score.value == pytest.approx(np.mean(plain(judged.images)))
    details: Any = score.details
    assert [each["f1"] for each in details["attributes"].values()] == pytest.approx(plain(judged.images))
    assert details["attributes"]["color:blue"] == {"latents": [8], "f1": 1}
    assert details["shuffled"] < score.value  # type: ignore[operator]
    weights = judged.resamples.weights(0, len(judged.images))
    assert score.replicates is not None
    assert base.replicates is not None
    assert above.replicates is not None
    assert score.replicates[7] == pytest.approx(np.mean(plain(np.repeat(judged.images, weights[7]))))
    assert above.value == pytest.approx(score.value - base.value)  # type: ignore[operator]
    np.testing.assert_allclose(above.replicates, score.replicates - base.replicates)


def test_attributes_are_classes_categories_and_true_or_false() -> None:
    n = 40
    rng = np.random.default_rng(0)
    table = pa.table({
        "uri": [f"{i}.png" for i in range(n)], "label": pa.array(np.arange(n) % 3, pa.int32()),
        "label_name": [f"class{i % 3}" if i % 5 else "" for i in range(n)], "split": ["train", "test"] * (n // 2),
        "red": pa.array([None if i == 0 else i % 4 == 1 for i in range(n)]), "round": rng.integers(0, 2, n),
        "place": pa.array(["sea", "land", "sky", "sea"] * (n // 4)).dictionary_encode(),
        "same": ["x"] * n, "caption": [f"caption {i}" for i in range(n)], "n": np.arange(n) % 5, "size": rng.random(n),
        "tags": [["a"]] * n,
    })  # fmt: skip
    store: Any = type("Store", (), {"images": table, "path": Path("x.acts")})()
    judged = Judged(store, np.arange(20, n), np.arange(20), Resamples(20), 0)
    found = read_attributes(judged, NO_MASKS, "MATCHScore")
    assert isinstance(found, Attributes)
    assert found.names == (
        "label_name:class0", "label_name:class1", "label_name:class2", "red", "round", "place:land", "place:sea",
        "place:sky",
    )  # fmt: skip
    assert found.choosing.values[:6, 0].tolist() == [-1, 0, 0, 1, 0, -1]  # an image without a label is unknown
    assert found.choosing.values[:6, 3].tolist() == [-1, 1, 0, 0, 0, 1]
    assert found.judged.values[:4, 6].tolist() == [1, 0, 0, 1]
    assert found.find("place:sky") == found.find("sky") == 7
    assert found.find("red") == 3
    assert found.find("nothing") is None
    store.images = table.select(["uri", "label", "caption", "same"])
    skipped = read_attributes(judged, NO_MASKS, "MATCHScore")
    assert isinstance(skipped, Skipped)
    assert "has no labels" in skipped.reason
    assert measure_matching(as_subject(None), Matching(judged, skipped, {})) == [skipped]  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# Pairs


def test_pairs_that_share_images_are_connected() -> None:
    before, after = np.array([0, 4, 1, 7, 9]), np.array([1, 5, 2, 8, 7])
    group = connect(before, after)
    assert group[0] == group[2]
    assert group[3] == group[4]
    assert len(set(group.tolist())) == 3
    assert group.max() == 2


def paired_world(folder: Path, changes: bool = True) -> tuple[Judged, Subject, Attributes, ImagePairs]:
    """60 images of two colors; in pairs of judged images the one color becomes the other. A latent fires on each color,
    and one on both. changes: False lets the latents fire on all images of the pairs."""
    rng = np.random.default_rng(2)
    red = rng.random(60) < 0.5
    before, after = np.arange(0, 40, 4), np.arange(2, 42, 4)
    red[before], red[after] = True, False
    dense = np.zeros((60, 3, N_LATENTS))
    dense[:, 1, 2], dense[:, 2, 6] = red, ~red
    dense[:, 1, 9] = rng.random(60) < 0.1
    if not changes:
        dense[np.concatenate([before, after])[:, None], [1, 2], [2, 6]] = 1
    codes = write_codes(folder / "x.codes", dense.astype(np.float16), [32, 28])
    judged = judge(codes)
    values = np.stack([red, ~red], axis=1).astype(np.int8)
    pairs = ImagePairs(before, after, ("red",) * 10, ("color:blue",) * 10, connect(before, after))
    return judged, as_subject(codes), attributes_of(judged, values), pairs


def test_latents_that_follow_an_attribute_reach_2_and_others_0(tmp_path: Path) -> None:
    judged, subject, attributes, pairs = paired_world(tmp_path)
    *_, found = measure_matching(subject, Matching(judged, attributes, {}, pairs))
    assert isinstance(found, Measured)
    assert (found.name, found.value) == ("TAPAScore", 2)
    assert (found.details["added"], found.details["removed"], found.details["n_pairs"]) == (1, -1, 10)
    assert found.replicates is not None
    assert (found.replicates == 2).all()
    one_way = replace(pairs, removed=("",) * 10)
    *_, found = measure_matching(subject, Matching(judged, attributes, {}, one_way))
    assert isinstance(found, Measured)
    assert (found.value, found.details["removed"]) == (1, 0)
    judged, subject, attributes, pairs = paired_world(tmp_path / "still", changes=False)
    *_, found = measure_matching(subject, Matching(judged, attributes, {}, pairs))
    assert isinstance(found, Measured)
    assert found.value == 0


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_score_is_that_of_a_loop_over_pairs(tmp_path_factory: Any, seed: int) -> None:
    codes, fires, values = make(tmp_path_factory.mktemp("codes"), seed)
    judged = judge(codes)
    attributes = attributes_of(judged, values)
    rng = np.random.default_rng(seed)
    coalitions = choose_coalitions(codes, attributes.choosing)
    before, after = rng.choice(judged.images, (2, 25))
    before, after = before[before != after], after[before != after]
    texts = rng.choice(["red", "blue", "green", "gray", "", "nothing"], (2, len(before)))
    pairs = ImagePairs(before, after, tuple(texts[0]), tuple(texts[1]), connect(before, after))
    found = measure_pairs(as_subject(codes), judged, attributes, coalitions, pairs)
    sums: dict[str, list[float]] = {"removed": [], "added": []}
    group = []
    for b, a, removed, added, of in zip(before, after, *texts.tolist(), pairs.group, strict=True):
        if "nothing" in (removed, added) or not (removed or added):
            continue
        group.append(of)
        sets = [set(coalitions[attributes.find(text)].tolist()) - {-1} if text else set() for text in (removed, added)]  # type: ignore[index]
        for side, own, text in (("removed", sets[0] - sets[1], removed), ("added", sets[1] - sets[0], added)):
            delta = max((fires[a, f] for f in own), default=0) * 1.0 - max((fires[b, f] for f in own), default=0)
            sums[side].append(delta if text else np.nan)
    if not group:
        assert isinstance(found, Skipped)
        return
    assert isinstance(found, Measured)

    def mean(side: str, times: NDArray[np.int64]) -> float:
        drawn = np.repeat(sums[side], times)
        return float(np.nanmean(drawn)) if np.isfinite(drawn).any() else np.nan

    ones = np.ones(len(group), int)
    want = [np.nan_to_num(mean(side, ones)) for side in ("removed", "added")]
    assert found.value == pytest.approx(want[1] - want[0])
    groups, of = np.unique(group, return_inverse=True)
    times = Resamples(len(groups), judged.resamples.n, judged.seed).weights(0, len(groups))[5][of]
    again = [mean(side, times) for side in ("removed", "added")]
    again = [first if np.isnan(drawn) else drawn for first, drawn in zip(want, again, strict=True)]
    assert found.replicates is not None
    assert found.replicates[5] == pytest.approx(again[1] - again[0])


def test_pairs_that_cannot_be_measured_are_left_out_with_the_reason(tmp_path: Path) -> None:
    judged, subject, attributes, pairs = paired_world(tmp_path)

    def reason(pairs: ImagePairs | Skipped) -> str:
        found = measure_matching(subject, Matching(judged, attributes, {}, pairs))[-1]
        assert isinstance(found, Skipped)
        assert "\n" not in found.reason
        return found.reason

    def read(content: str, name: str = "pairs.csv") -> ImagePairs | Skipped:
        (tmp_path / name).write_text(content)
        return read_pairs(tmp_path / name, judged.store)

    assert "names 'purple'" in reason(replace(pairs, removed=("purple",) * 10, added=("",) * 10))
    assert "holds an image that a run has learned from" in reason(replace(pairs, before=pairs.before + 1))
    half = replace(pairs, before=np.concatenate([pairs.before[:6], pairs.before[6:] + 1]))
    found = measure_matching(subject, Matching(judged, attributes, {}, half))[-1]
    assert (found.details["n_pairs"], found.details["n_left_out"]) == (6, 4)  # type: ignore[union-attr]
    assert "is not a table of pairs" in reason(read("left,right\na,b\n"))
    assert "no pair of pairs.csv names two images" in reason(read("before,after,removed\na,b,red\n"))
    assert "cannot be read" in reason(read_pairs(tmp_path / "nowhere.csv", judged.store))
    uris = judged.store.images["uri"].to_pylist()
    named = read(f"before,after,removed,added\n{uris[0]},{uris[2]},red,\nnowhere.png,{uris[3]},red,\n")
    assert isinstance(named, ImagePairs)
    assert (named.before.tolist(), named.after.tolist(), named.removed, named.added) == ([0], [2], ("red",), ("",))
    assert named.n_unknown == 1
    numbered = read("before,after,added\n4,6,blue\n", "numbers.csv")
    assert isinstance(numbered, ImagePairs)
    assert (numbered.before.tolist(), numbered.removed, numbered.added) == ([4], ("",), ("blue",))
    doubled = pa.concat_tables([judged.store.images, judged.store.images])
    twice: Any = type("Store", (), {"images": doubled, "path": Path("x.acts")})()
    assert "have the same uri" in reason(read_pairs(tmp_path / "pairs.csv", twice))


def test_nothing_is_chosen_on_pairs_where_there_are_other_images(tiny_run: Path, tiny_store: Path) -> None:
    store, runs = open_stores(tiny_store), [Run.open(tiny_run)]
    study = StudyConfig(on_seen="use")

    def pair(before: NDArray[np.int64], after: NDArray[np.int64]) -> Judged:
        none = ("",) * len(before)
        return choose_judged(runs, store, study, ImagePairs(before, after, none, none, connect(before, after)))[0]

    few = pair(np.arange(0, 20, 2), np.arange(1, 20, 2))
    assert set(range(20)) <= set(few.images.tolist())
    assert abs(len(few.images) - len(few.choosing)) <= 1
    every = pair(np.arange(0, 74, 2), np.arange(1, 75, 2))
    side = np.isin(np.arange(store.n_images), every.choosing)
    np.testing.assert_array_equal(side[0:74:2], side[1:75:2])  # both images of a pair are on one side
    assert abs(len(every.images) - len(every.choosing)) <= 2
    assert set(every.images.tolist()).isdisjoint(every.choosing.tolist())
    some = choose_judged(runs, store, replace(study, limit=5))[0]
    assert len(some.images) == 5
    assert len(some.may_judge) > 30
