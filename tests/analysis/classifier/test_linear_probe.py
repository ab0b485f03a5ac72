"""A probe is the logistic regression that it says it is, on plain features, and gradients flow through it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from actcache import ActivationStore, SettingsError, extract, open_stores
from actcache.prompts import open_towers
from analysis import (
    DeletionConfig,
    Fidelity,
    ModelOptions,
    SteerabilityConfig,
    StudyConfig,
    delete_latents,
    evaluate_fidelity,
    mask_latents,
    measure_steerability,
    set_latents,
)
from analysis.classifier import choose_training, fit_probe
from analysis.config import ProbeConfig
from analysis.interventions.attribution import attribute
from analysis.interventions.study import choose_study_images, open_study
from saetrain import Run

CPU = ModelOptions(device="cpu")
PROBE = StudyConfig(judge="probe")
N_TRAIN = 71  # of 75 images; the last max(1, round(0.05 * 75)) are held out


@pytest.fixture(scope="session")
def plain_features(plain_clip: Any, tiny_images: Path) -> Callable[..., dict[str, NDArray[np.float64]]]:
    """plain_features(uris, edit) -> [B, W] of each part, by whole passes of open_clip's own model."""
    import open_clip

    transform = open_clip.image_transform(24, is_train=False)
    visual = plain_clip.visual

    def features(uris: list[str], edit: Callable[[Any], Any] = lambda x: x) -> dict[str, NDArray[np.float64]]:
        pixels = torch.stack([transform(Image.open(tiny_images / uri).convert("RGB")) for uri in uris])
        kept: list[torch.Tensor] = []
        blocks = visual.transformer.resblocks
        handles = [
            blocks[1].register_forward_hook(lambda module, args, out: edit(out)),
            blocks[2].register_forward_hook(lambda module, args, out: kept.append(out)),
        ]
        try:
            with torch.no_grad():
                visual(pixels)
                normed = visual.ln_post(kept[0])
        finally:
            for handle in handles:
                handle.remove()
        parts = {"cls": normed[:, 0], "patch": normed[:, 1:].mean(1), "pooled": normed[:, 0]}
        return {name: np.asarray(value.double()) for name, value in parts.items()}

    return features


def join(features: dict[str, NDArray[np.float64]], names: str) -> NDArray[np.float64]:
    return np.concatenate([features[name] for name in names.split("+")], axis=1)


def validation(classes: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """A fifth of each class, in the order of a permutation."""
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(classes))
    judged = np.zeros(len(classes), dtype=bool)
    for number in set(classes.tolist()):
        mine = [i for i in order if classes[i] == number]
        judged[mine[: len(mine) // 5]] = True
    return judged


@pytest.mark.parametrize(("features", "seed"), [("cls+patch", 0), ("patch", 3), ("pooled", 0)])
def test_accuracy_and_loss_are_those_of_scikit_learn_on_plain_features(
    middle_run: Path, middle_store: Path, plain_features: Any, plain_sae: Any, features: str, seed: int
) -> None:
    config = StudyConfig(judge="probe", probe_features=features, seed=seed)
    found = evaluate_fidelity(middle_run, middle_store, study=config, model=CPU)
    store = ActivationStore.open(middle_store)
    table = store.images.to_pylist()
    assert found.judge is not None
    facts = found.judge.probe
    assert facts is not None
    assert found.judge.kind == "probe"
    assert facts.features == features
    names = list(found.classes)
    train = [i for i in range(N_TRAIN) if table[i]["label_name"] in names]
    classes = np.array([names.index(table[i]["label_name"]) for i in train])
    held_out = validation(classes, seed)
    assert (facts.n_images, facts.n_validation, facts.seed) == (len(train), int(held_out.sum()), seed)
    rows = join(plain_features([table[i]["uri"] for i in train]), features)
    scaler = StandardScaler().fit(rows[~held_out])
    model = LogisticRegression(C=facts.c, max_iter=5000, tol=1e-8).fit(
        scaler.transform(rows[~held_out]), classes[~held_out]
    )
    assert facts.accuracy == pytest.approx(model.score(scaler.transform(rows[held_out]), classes[held_out]))

    judged = list(range(N_TRAIN, 75))
    truth = np.array([names.index(table[i]["label_name"]) for i in judged])
    edits = {
        "original": lambda x: x,
        "sae": lambda x: plain_sae.decode(plain_sae.encode(x)).float(),
        "sae+error": lambda x: x,
        "zero": torch.zeros_like,
    }
    for name, edit in edits.items():
        rows = scaler.transform(join(plain_features([table[i]["uri"] for i in judged], edit), features))
        chances = model.predict_proba(rows)
        numbers = found.runs[0].variants[name]
        loss = -np.log(chances[np.arange(len(judged)), truth]).mean()
        assert numbers.loss == pytest.approx(loss, rel=1e-3, abs=1e-5), name
        assert numbers.accuracy == pytest.approx((chances.argmax(1) == truth).mean()), name
    assert found.runs[0].variants["sae+error"].same_prediction == 1
    assert found.runs[0].variants["original"].accuracy == 1  # each class has a color of its own


def test_the_fit_is_where_the_gradient_of_its_loss_vanishes(middle_store: Path, plain_features: Any) -> None:
    """dL/dW = sum (p - y) x + W / C and dL/db = sum (p - y), which no optimizer has to be trusted for."""
    store = open_stores(middle_store)
    vision = open_towers(store.stores[0].artifact, device="cpu").vision
    names = ("class0", "class1", "class2")
    probe = fit_probe(choose_training(store, ProbeConfig()), names, vision)
    table = store.images.to_pylist()[:N_TRAIN]
    classes = np.array([names.index(row["label_name"]) for row in table])
    fitted = ~validation(classes, 0)
    rows = join(plain_features([row["uri"] for row in table]), "cls+patch")[fitted]
    mean, deviation = rows.mean(0), rows.std(0)
    np.testing.assert_allclose(probe.mean, mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(probe.deviation, deviation, rtol=1e-3)
    x, weight = (rows - mean) / deviation, np.asarray(probe.weight.double())
    logits = x @ weight.T + np.asarray(probe.bias.double())
    np.testing.assert_allclose(probe.classify(torch.from_numpy(rows).float()), logits, atol=1e-3)
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wrong = chances - np.eye(3)[classes[fitted]]
    tolerance = 5e-6  # the fit stops at 1e-6 of the mean loss, and its weights become float32
    assert np.abs(wrong.T @ x + weight / probe.fit.c).max() / len(x) < tolerance
    assert np.abs(wrong.sum(0)).max() / len(x) < tolerance
    assert np.abs(wrong.T @ x + 2 * weight / probe.fit.c).max() / len(x) > 20 * tolerance  # another C is another fit


def test_two_classes_have_two_logits(middle_run: Path, middle_store: Path) -> None:
    config = StudyConfig(judge="probe", where="label_name != 'class1'", on_seen="use")
    found = evaluate_fidelity(middle_run, middle_store, study=config, model=CPU)
    assert found.classes == ("class0", "class2")
    assert found.runs[0].variants["original"].accuracy == 1


def test_attributions_are_those_of_autograd_through_the_whole_model(
    middle_run: Path, middle_store: Path, plain_sae: Any, plain_clip: Any
) -> None:
    store = open_stores(middle_store)
    towers = open_towers(store.stores[0].artifact, device="cpu")
    run, training = Run.open(middle_run), choose_training(store, PROBE)
    images = choose_study_images(run, store, PROBE, training)
    probe = fit_probe(training, images.classified.names, towers.vision)
    study = open_study(run, images, towers, PROBE, batch_size=8, kind="probe", probe=probe)
    ((judged, spliced),) = study.batches(study.classifier.images)
    targets = torch.arange(len(judged)) % len(study.classifier.names)
    found = attribute(study.classifier, spliced, targets)
    visual = copy.deepcopy(plain_clip.visual).double()
    x = torch.from_numpy(ActivationStore.open(middle_store).read(1, images=judged)).double()
    z = plain_sae.encode(x).requires_grad_()

    def y(codes: torch.Tensor) -> torch.Tensor:
        stream = plain_sae.decode(codes) + (x - plain_sae.decode(z)).detach()
        normed = visual.ln_post(visual.transformer.resblocks[2](stream))
        features = torch.cat([normed[:, 0], normed[:, 1:].mean(1)], 1)
        standard = (features - probe.mean.double()) / probe.deviation.double()
        logits = standard @ probe.weight.double().T + probe.bias.double()
        return logits[torch.arange(len(targets)), targets]

    (gradient,) = torch.autograd.grad(y(z).sum(), z)
    dense, n_tokens = (z * gradient).detach(), x.shape[1]
    image, token = spliced.rows // n_tokens, spliced.rows % n_tokens
    expected = dense[image, token, spliced.latents]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    entry = int(found.abs().argmax())
    place = (int(image[entry]), int(token[entry]), int(spliced.latents[entry]))
    step = torch.zeros_like(z)
    step[place] = 1e-4
    slope = (y((z + step).detach()) - y((z - step).detach()))[place[0]] / 2e-4
    assert float(found[entry]) == pytest.approx(float(slope.detach() * z[place].detach()), rel=1e-3)


@pytest.mark.parametrize(("features", "is_seen"), [("patch", True), ("cls", False)])
def test_what_is_done_to_patches_after_the_last_block_is_seen_by_a_probe_that_reads_them(
    tiny_run: Path, tiny_store: Path, features: str, is_seen: bool
) -> None:
    config = StudyConfig(judge="probe", probe_features=features, tokens="patch")
    variants = evaluate_fidelity(tiny_run, tiny_store, study=config, model=CPU).runs[0].variants
    for name in ("sae", "zero", "mean"):
        assert (variants[name].loss != variants["original"].loss) == is_seen


def test_every_study_takes_the_probe(tmp_path: Path, middle_run: Path, middle_store: Path) -> None:
    store: dict[str, Any] = {"study": PROBE, "model": CPU}
    curve = mask_latents(middle_run, middle_store, tmp_path / "m.json", **store)
    (original,) = [row for row in curve.curve if row.mode == "original"]
    moved = set_latents(middle_run, middle_store, set={7: 500.0}, **store)
    deleted = delete_latents(middle_run, middle_store, None, DeletionConfig(n=(1, 64)), **store)
    steered = measure_steerability(middle_run, middle_store, None, SteerabilityConfig(latents=(7,)), **store)
    fidelity = evaluate_fidelity(middle_run, middle_store, **store)
    assert {r.judge for r in (curve, moved, deleted, steered, fidelity)} == {fidelity.judge}
    assert original.loss == pytest.approx(moved.before.loss)
    assert moved.before.loss == pytest.approx(fidelity.runs[0].variants["original"].loss)
    assert moved.after.loss > moved.before.loss
    assert steered.n_words == len(fidelity.classes)  # a probe knows its classes, and no other words
    assert {row.word for row in steered.rows} <= set(fidelity.classes)
    with pytest.raises(SettingsError, match="--vocabulary needs texts"):
        measure_steerability(middle_run, middle_store, vocabulary=tmp_path / "m.json", **store)


def test_the_same_command_is_the_same_result_and_another_probe_another(
    tmp_path: Path, middle_run: Path, middle_store: Path, make_images: Callable[..., Path], tiny_model: dict[str, str]
) -> None:
    extract(make_images(tmp_path / "more", 75, seed=4), tmp_path / "more.acts", **tiny_model, layers=[1])
    configs = [
        StudyConfig(), PROBE, StudyConfig(judge="probe", seed=1), StudyConfig(judge="probe", probe_features="cls"),
        StudyConfig(judge="probe", probe_where="label_name != 'none'"),
        StudyConfig(judge="probe", probe_store=str(tmp_path / "more.acts")),
    ]  # fmt: skip
    found = [evaluate_fidelity(middle_run, middle_store, study=config, model=CPU) for config in configs]
    assert len({result.id for result in found}) == len(configs)
    assert evaluate_fidelity(middle_run, middle_store, study=PROBE, model=CPU) == found[1]
    assert found[0].judge is not None
    assert found[0].judge.kind == "zero-shot"
    assert not {"judge", "probe_features", "probe_where", "probe_store"} & set(found[0].settings)
    assert "probe store" in found[-1].parents
    images = [result.judge.probe.images for result in found[1:] if result.judge and result.judge.probe]
    assert len(set(images)) == 2  # the content of the training images, wherever they lie
    out = tmp_path / "f.json"
    evaluate_fidelity(middle_run, middle_store, out, study=PROBE, model=CPU)
    assert Fidelity.from_json(found[1].to_json(), "x") == found[1]
    with pytest.raises(SettingsError, match="judge: probe there, absent asked for"):
        evaluate_fidelity(middle_run, middle_store, out, model=CPU)


def test_bad_input_is_told_what_to_do(
    tmp_path: Path, middle_run: Path, middle_store: Path, make_images: Callable[..., Path], tiny_model: dict[str, str]
) -> None:
    extract(make_images(tmp_path / "two", 20, n_classes=2), tmp_path / "two.acts", **tiny_model, layers=[1])
    other = {**tiny_model, "pretrained": "random:1"}
    extract(make_images(tmp_path / "x", 6), tmp_path / "other.acts", **other, layers=[1])
    cases = {
        "judge must be one of auto, zero-shot, probe, head, got 'oracle'": {"judge": "oracle"},
        "probe-features must be cls, patch, pooled": {"judge": "probe", "probe_features": "cls,patch"},
        "names the unknown column 'color'": {"judge": "probe", "probe_where": "color == 1"},
        "No labeled image of the training split": {"judge": "probe", "probe_where": "label < 0"},
        "fewer than 2 training images of class2": {"judge": "probe", "probe_store": str(tmp_path / "two.acts")},
        "holds model": {"judge": "probe", "probe_store": str(tmp_path / "other.acts")},
        "has no classifier of its own": {"judge": "head"},
        "--probe-store trains a probe": {"judge": "zero-shot", "probe_store": "x"},
    }
    for words, options in cases.items():
        with pytest.raises(ValueError, match=words):
            evaluate_fidelity(middle_run, middle_store, study=StudyConfig(**options), model=CPU)


def test_without_scikit_learn_one_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, middle_run: Path, middle_store: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(SettingsError, match="needs the package scikit-learn"):
        evaluate_fidelity(middle_run, middle_store, study=PROBE, model=CPU)
