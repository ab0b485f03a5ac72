"""learn_rules(): planted rules are found, numbers are those of a plain loop over dense codes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_codes import write_codes
from warm_process import WarmProcess

from actcache import ParentMismatchError, SettingsError, open_stores
from actcache.artifacts import begin_artifact, digest
from actcache.prompts import open_towers
from analysis import RulesConfig, learn_rules
from analysis.classifier import predict_classes
from analysis.classifier.embeddings import embed_stored_images
from analysis.results import RuleLiteral
from analysis.rules.learning import Firing, count_classes, read_firing
from analysis.rules.rules import Rule, RuleSet, choose_candidates, learn_class, rank_rules
from saetrain import CodeStore

N_PATCHES, N_LATENTS, TAU = 6, 30, 0.2


def planted(n_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(codes [I, T, F], labels): 0 where latent 3 fires on >= 2 patches and 7 does not, 1 where 11 does, else 2."""
    rng = np.random.default_rng(seed)
    dense = np.where(rng.random((n_images, 1 + N_PATCHES, N_LATENTS)) < 0.08, 0.5, 0).astype(np.float16)
    dense[rng.random(n_images) < 0.5, 1:4, 3] = 1
    dense[rng.random(n_images) < 0.3, 2:5, 7] = 1
    dense[rng.random(n_images) < 0.4, 4:6, 11] = 1
    dense[:, 0, 3] = 1  # CLS fires everywhere, and does not count
    dense[rng.random(n_images) < 0.5, 1:, 20] = 0.1  # below tau
    fires = fired(dense, 2)
    labels = np.where(fires[:, 3] & ~fires[:, 7], 0, np.where(fires[:, 11], 1, 2))
    return dense, labels.astype(np.int32)


def fired(dense: np.ndarray, n_patches: int) -> np.ndarray:
    """[I, F] by definition."""
    above: np.ndarray = (dense[:, 1:] > np.float32(TAU)).sum(1) >= n_patches
    return above


@pytest.fixture(scope="module")
def learned_from(tmp_path_factory: pytest.TempPathFactory) -> CodeStore:
    dense, labels = planted(600, 0)
    return write_codes(tmp_path_factory.mktemp("rules") / "a.codes", dense, [250, 350], labels, failed=[4, 9])


@pytest.fixture(scope="module")
def judged_on(tmp_path_factory: pytest.TempPathFactory) -> CodeStore:
    dense, labels = planted(300, 1)
    return write_codes(tmp_path_factory.mktemp("rules") / "b.codes", dense, [300], labels, names="other-")


def test_planted_rules_and_their_exceptions_are_found(learned_from: CodeStore, judged_on: CodeStore) -> None:
    found = learn_rules(learned_from, None, RulesConfig(n_patches=2, n_candidates=8), judge=judged_on)
    texts = [rule.text for rule in found.classes["class0"].rules]
    assert texts[0] == "latent 3 on >= 2 patches and not latent 7 on >= 2 patches"
    assert any(rule.literals[0] == RuleLiteral(11, True) for rule in found.classes["class1"].rules)
    assert found.accuracy > 0.95
    assert found.accuracy_low < found.accuracy <= found.accuracy_high + 1e-9
    assert found.fidelity == found.accuracy
    assert (found.n_learned, found.n_judged) == (598, 300)
    assert found.size.rules == sum(len(learned.rules) for learned in found.classes.values())


@pytest.mark.parametrize("same", [True, False])
def test_the_numbers_are_those_of_a_plain_loop(learned_from: CodeStore, judged_on: CodeStore, same: bool) -> None:
    found = learn_rules(
        learned_from, None, RulesConfig(n_patches=2, n_candidates=8, n_rules=2), judge=None if same else judged_on
    )
    dense, labels = planted(600, 0) if same else planted(300, 1)
    images = [i for i in range(600) if i not in (4, 9)][-120:] if same else range(300)  # the last 20 % of the readable
    assert found.n_judged == len(images)
    assert found.n_learned == (478 if same else 598)
    fires = fired(dense, 2)
    rules = [(rule, name) for name, learned in found.classes.items() for rule in learned.rules]
    rules.sort(key=lambda pair: -pair[0].learned_precision)
    right, covered = 0, 0
    counts: dict[str, list[int]] = {rule.text: [0, 0] for rule, _ in rules}
    for image in images:
        told, said = f"class{labels[image]}", None
        for rule, name in rules:
            if all(fires[image, literal.latent] == literal.fires for literal in rule.literals):
                counts[rule.text][0] += 1
                counts[rule.text][1] += told == name
                said = said or name
        covered += said is not None
        right += (said or found.default) == told
    assert found.accuracy == pytest.approx(right / len(images))
    assert found.coverage == pytest.approx(covered / len(images))
    for rule, _ in rules:
        n, n_right = counts[rule.text]
        assert rule.n_fires == n
        assert rule.precision == (pytest.approx(n_right / n) if n else None)


def test_counts_over_shards_are_those_of_dense_codes(learned_from: CodeStore) -> None:
    dense, labels = planted(600, 0)
    fires, firing = fired(dense, 2), Firing(TAU, 2)
    label = labels.astype(np.int64)
    label[100:200] = -1
    table = count_classes(learned_from, label, 3, firing).toarray()
    wanted = np.stack([fires[label == c].sum(0) for c in range(3)])
    np.testing.assert_array_equal(table, wanted)
    latents = np.array([3, 7, 20, 29])
    read = read_firing(learned_from, latents, firing)
    for latent in latents.tolist():
        np.testing.assert_array_equal(read(latent), fires[:, latent])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_candidates_have_the_largest_phi(seed: int) -> None:
    rng = np.random.default_rng(seed)
    fires, mine = rng.random((80, 12)) < rng.random(12), rng.random(80) < 0.4
    fires[:, 5] = False  # never fires: no correlation
    mine[:2] = True, False
    both, total = fires[mine].sum(0), fires.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        phi = np.nan_to_num([abs(np.corrcoef(column, mine)[0, 1]) for column in fires.T.astype(float)])
    chosen = choose_candidates(both, total, int(mine.sum()), 80, 4)
    assert len(chosen) == 4
    np.testing.assert_allclose(np.sort(phi[chosen]), np.sort(phi)[-4:], atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), n_rules=st.integers(1, 4), n_literals=st.integers(1, 4))
def test_rules_keep_to_their_size_and_say_something_positive(seed: int, n_rules: int, n_literals: int) -> None:
    rng = np.random.default_rng(seed)
    fires, mine = rng.random((120, 9)) < 0.4, rng.random(120) < 0.3
    mine[:3] = True
    mine[3] = False
    latents = np.arange(100, 109)
    rules = learn_class("x", fires, latents, mine, 5, n_rules, n_literals)
    assert len(rules) <= n_rules
    assert rules == learn_class("x", fires, latents, mine, 5, n_rules, n_literals)
    for rule in rules:
        assert 1 <= len(rule.literals) <= n_literals
        assert any(literal.fires for literal in rule.literals)
        hit = np.all([fires[:, one.latent - 100] == one.fires for one in rule.literals], axis=0)
        assert rule.precision == pytest.approx((mine[hit].sum() + 1) / (hit.sum() + 5))
    assert learn_class("x", fires, latents, np.zeros(120, bool), 5, n_rules, n_literals) == []


def test_the_most_precise_rule_decides() -> None:
    low, high = Rule("a", (RuleLiteral(0, True),), 0.4), Rule("b", (RuleLiteral(1, True), RuleLiteral(2, False)), 0.7)
    rules = RuleSet(rank_rules([low, high]), "c")
    fires = np.array([[1, 1, 0], [1, 1, 1], [0, 1, 0], [0, 0, 0]], dtype=bool)
    said, number = rules.apply(lambda latent: fires[:, latent], 4)
    assert said.tolist() == ["b", "a", "b", "c"]
    assert number.tolist() == [0, 1, 0, -1]
    assert rules.latents.tolist() == [0, 1, 2]
    assert (
        high.say({1: "red stripes"}, 3) == 'latent 1 ("red stripes") on >= 3 patches and not latent 2 on >= 3 patches'
    )
    assert low.say({}, 1) == "latent 0 on a patch"


def test_what_the_model_says_is_what_a_forward_pass_of_the_files_says(
    tmp_path: Path, tiny_codes: Path, tiny_store: Path, tiny_images: Path
) -> None:
    codes, store = CodeStore.open(tiny_codes), open_stores(tiny_store)
    said = predict_classes(codes).classes
    towers = open_towers(store.stores[0].artifact)
    embedded = embed_stored_images(store, np.arange(store.n_images), vision=towers.vision, files=tiny_images)
    names = sorted(set(codes.images["label_name"].to_pylist()))
    classes = towers.text.embed_classes(names, ["a photo of a {}."]).detach().cpu().numpy()
    logits = embedded @ classes.T
    sure = np.diff(np.sort(logits, axis=1))[:, -1] > 1e-3  # beyond float16 activations' rounding
    assert sure.sum() > 30
    np.testing.assert_array_equal(said[sure], np.array(names, dtype=object)[logits.argmax(1)][sure])

    if len(set(said[:60].tolist())) > 1:  # the random model may name one class only
        found = learn_rules(codes, None, RulesConfig(explain="zero-shot", n_patches=1))
        assert found.model_accuracy == pytest.approx((said[60:] == codes.images["label_name"].to_numpy()[60:]).mean())


def test_the_same_call_twice_returns_the_file(tmp_path: Path, learned_from: CodeStore) -> None:
    out = tmp_path / "rules.json"
    config = RulesConfig(n_patches=2, n_candidates=4)
    first = learn_rules(learned_from, out, config)
    before = out.stat().st_mtime_ns
    assert learn_rules(learned_from, out, config) == first
    kept = json.loads(out.read_text())
    assert kept.pop("digest") == digest(kept)
    assert kept == first.to_json()
    assert out.stat().st_mtime_ns == before
    with pytest.raises(SettingsError, match="n_patches: 2 there, 3 asked for"):
        learn_rules(learned_from, out, RulesConfig(n_patches=3, n_candidates=4))
    assert (
        learn_rules(learned_from, out, RulesConfig(n_patches=3, n_candidates=4), overwrite=True).settings["n_patches"]
        == 3
    )


def test_bad_input_is_named(tmp_path: Path, learned_from: CodeStore) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"explain": "teacher"}, "--explain must be one of label, model, zero-shot, probe, head, got 'teacher'"),
        ({"n_patches": 0}, "--n-patches must be at least 1"),
        ({"n_patches": 7}, r"--n-patches must lie in 1\.\.6"),
        ({"n_candidates": 0}, "--n-candidates must be at least 1"),
        ({"n_rules": 0}, "--n-rules must be at least 1"),
        ({"n_literals": -1}, "--n-literals must be at least 1"),
    ]
    for how, text in bad:
        with pytest.raises(SettingsError, match=text):
            learn_rules(learned_from, None, RulesConfig(**({"n_patches": 2} | how)))
    dense, labels = planted(20, 2)
    unlabeled = write_codes(tmp_path / "u.codes", dense, [20])
    with pytest.raises(SettingsError, match=r"No image of .* has a label"):
        learn_rules(unlabeled)
    with pytest.raises(SettingsError, match=r"No image of .* has a label"):
        learn_rules(learned_from, judge=unlabeled)
    with pytest.raises(SettingsError, match="show only class1"):
        learn_rules(write_codes(tmp_path / "one.codes", dense, [20], np.ones(20, np.int32)))
    with pytest.raises(SettingsError, match="CLS only"):
        learn_rules(write_codes(tmp_path / "cls.codes", dense, [20], labels, tokens="cls"))
    other = write_codes(tmp_path / "other.codes", dense, [20], labels)
    settings_file = json.loads((other.path / "artifact.json").read_text())
    made = begin_artifact(
        tmp_path / "elsewhere.codes", "codes", settings=settings_file["settings"],
        parents=dict.fromkeys(("store", "run", "images"), ("9" * 16, tmp_path / "gone")), provenance={},
        prepare=lambda folder: None,
    )  # fmt: skip
    other.artifact = made
    with pytest.raises(ParentMismatchError, match="different runs"):
        learn_rules(learned_from, judge=other)


def test_names_of_latents_are_said(tmp_path: Path, tiny_codes: Path) -> None:
    from analysis import AnalyzeConfig, analyze, set_name

    concepts = analyze(tiny_codes, tmp_path / "x.concepts", config=AnalyzeConfig(n_gallery=0))
    found = learn_rules(tiny_codes, None, RulesConfig(n_patches=1), concepts=concepts)
    latent = next(rule for learned in found.classes.values() for rule in learned.rules).literals[0].latent
    set_name(concepts, latent, name="red stripes")
    again = learn_rules(tiny_codes, None, RulesConfig(n_patches=1), concepts=concepts)
    assert f'latent {latent} ("red stripes") on a patch' in json.dumps(again.to_json()).replace('\\"', '"')
    dense, labels = planted(20, 2)
    with pytest.raises(SettingsError, match="64 latents"):
        learn_rules(write_codes(tmp_path / "few.codes", dense, [20], labels), concepts=concepts)


def test_the_command_line_prints_rules_or_json(
    tmp_path: Path, learned_from: CodeStore, judged_on: CodeStore, warm: WarmProcess
) -> None:
    command = ("--quiet", "rules", learned_from.path, "--judge", judged_on.path, "--n-patches", "2")
    done = warm.run("cli.py", *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "latent 3 on >= 2 patches and not latent 7 on >= 2 patches" in done.stdout
    assert "accuracy" in done.stdout
    done = warm.run("cli.py", "--json", *command, cwd=tmp_path)
    assert json.loads(done.stdout)["size"]["latents"] >= 3
