"""Fidelity equals whole forward passes with the block's output replaced, and a loss computed by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actcache import ActivationStore, ParentMismatchError, SettingsError, extract
from actcache.artifacts import digest
from analysis import ModelOptions, StudyConfig, evaluate_fidelity
from saetrain import convert

CPU = ModelOptions(device="cpu")
PLACES = {"all": slice(0, 10), "patch": slice(1, 10), "cls": slice(0, 1)}


@pytest.mark.parametrize("tokens", ["all", "patch", "cls"])
def test_the_numbers_are_those_of_whole_forward_passes(
    middle_run: Path, middle_store: Path, plain_sae: Any, plain_clip: Any, full_forward: Callable[..., Any],
    class_texts: Any, tokens: str,
) -> None:  # fmt: skip
    store = ActivationStore.open(middle_store)
    found = evaluate_fidelity(middle_run, middle_store, study=StudyConfig(tokens=tokens, where="label >= 0"), model=CPU)
    images = list(range(71, 75))  # the held-out ones: max(1, round(0.05 * 75))
    assert found.runs[0].n_images == len(images)
    table = store.images.to_pylist()
    labels = [sorted({table[i]["label_name"] for i in images}).index(table[i]["label_name"]) for i in images]
    texts = class_texts[[int(name[-1]) for name in found.classes]]
    everything = store.read(1).astype(np.float64)
    means = np.concatenate([everything[:, :1].mean((0, 1))[None], np.tile(everything[:, 1:].mean((0, 1)), (9, 1))])
    part = PLACES[tokens]

    def replaced(new: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def edit(x: Any) -> Any:
            x = x.clone()
            x[:, part] = new(x[:, part]).float()
            return x

        return edit

    edits = {
        "original": lambda x: x,
        "sae": replaced(lambda x: plain_sae.decode(plain_sae.encode(x))),
        "sae+error": lambda x: x,
        "zero": replaced(torch.zeros_like),
        "mean": replaced(lambda x: torch.from_numpy(means[part]).expand_as(x)),
    }
    scale = float(plain_clip.logit_scale.exp())
    for name, edit in edits.items():
        logits = scale * full_forward([table[i]["uri"] for i in images], edit) @ texts.T
        wrong = -logits[np.arange(len(images)), labels] + np.log(np.exp(logits.astype(np.float64)).sum(1))
        numbers = found.runs[0].variants[name]
        assert numbers.loss == pytest.approx(wrong.mean(), rel=2e-5), name
        assert numbers.accuracy == pytest.approx(np.mean(logits.argmax(1) == labels))
    sae, zero, original = (found.runs[0].variants[name].loss for name in ("sae", "zero", "original"))
    if zero > original:
        assert found.runs[0].recovered.loss_zero == pytest.approx((zero - sae) / (zero - original))
    else:
        assert found.runs[0].recovered.loss_zero is None


def test_of_another_store_every_labeled_image_counts_and_the_error_term_restores_it(
    tmp_path: Path, middle_run: Path, make_images: Callable[..., Path], tiny_model: dict[str, str]
) -> None:
    other = make_images(tmp_path / "other", 75, seed=9)
    extract(other, tmp_path / "other.acts", **tiny_model, layers=[1], seed=5)  # float16
    (run,) = evaluate_fidelity(middle_run, tmp_path / "other.acts", model=CPU).runs
    assert run.n_images == 75
    variants = run.variants
    assert variants["sae+error"].loss == pytest.approx(variants["original"].loss, abs=2**-11)
    assert variants["sae+error"].same_prediction == 1
    assert variants["sae"].loss != pytest.approx(variants["original"].loss, abs=1e-6)


def test_of_the_same_images_extracted_anew_the_held_out_ones_count(
    tmp_path: Path, middle_run: Path, tiny_images: Path, tiny_model: dict[str, str]
) -> None:
    extract(tiny_images, tmp_path / "again.acts", **tiny_model, layers=[1], codec="zstd", shard_images=64)
    (run,) = evaluate_fidelity(middle_run, tmp_path / "again.acts", model=CPU).runs
    assert run.n_images == 4


def test_an_imported_sae_was_not_trained_on_any(tmp_path: Path, middle_run: Path, middle_store: Path) -> None:
    convert(middle_run, tmp_path / "lens", to="saelens", store=middle_store)
    convert(tmp_path / "lens", tmp_path / "back", store=middle_store, layer=1)
    (run,) = evaluate_fidelity(tmp_path / "back", middle_store, model=CPU).runs
    assert run.n_images == 75


def test_the_same_call_twice_returns_the_file(tmp_path: Path, middle_run: Path, middle_store: Path) -> None:
    out = tmp_path / "deep" / "fidelity.json"
    first = evaluate_fidelity(middle_run, middle_store, out, model=CPU)
    written = out.read_bytes()
    kept = json.loads(written)
    assert kept.pop("digest") == digest(kept)
    assert kept == first.to_json()
    assert evaluate_fidelity(middle_run, middle_store, out, model=CPU) == first
    with pytest.raises(SettingsError, match="templates: photo there, simple asked for"):
        evaluate_fidelity(middle_run, middle_store, out, study=StudyConfig(templates="simple"), model=CPU)
    assert out.read_bytes() == written
    evaluate_fidelity(middle_run, middle_store, out, study=StudyConfig(templates="simple"), model=CPU, overwrite=True)
    assert json.loads(out.read_text())["settings"]["templates"] == "simple"
    out.write_text("{}")
    with pytest.raises(SettingsError, match="not a result file"):
        evaluate_fidelity(middle_run, middle_store, out, model=CPU)


def test_bad_input_is_told_what_to_do(
    tmp_path: Path, middle_run: Path, tiny_run: Path, tiny_store: Path, middle_store: Path, tiny_images: Path,
    tiny_model: dict[str, str],
) -> None:  # fmt: skip
    flat, other = tmp_path / "flat", ModelOptions(pretrained="random:1")
    flat.mkdir()
    for file in list(tiny_images.rglob("*.png"))[:20]:
        (flat / file.name).write_bytes(file.read_bytes())
    extract(flat, tmp_path / "flat.acts", **tiny_model, layers=[1])
    extract(tiny_images, tmp_path / "mid.acts", **tiny_model, layers=[1], sites=["resid_mid"])

    def evaluate(**study: Any) -> object:
        return evaluate_fidelity(middle_run, middle_store, study=StudyConfig(**study))

    cases: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (SettingsError, "has a label", lambda: evaluate_fidelity(middle_run, tmp_path / "flat.acts")),
        (SettingsError, "template", lambda: evaluate(templates="no such")),
        (SettingsError, "one class, class1", lambda: evaluate(where="label == 1")),
        (SettingsError, "holds for none of the", lambda: evaluate(where="label == 9")),
        (SettingsError, "Columns", lambda: evaluate(where="color == 9")),
        (SettingsError, "--tokens must be", lambda: evaluate(tokens="some")),
        (SettingsError, "not in", lambda: evaluate_fidelity(middle_run, tiny_store)),
        (ParentMismatchError, "not the model", lambda: evaluate_fidelity(middle_run, middle_store, model=other)),
    ]  # fmt: skip
    for error, words, call in cases:
        with pytest.raises(error, match=words):
            call()
