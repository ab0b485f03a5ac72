"""Masks equal whole forward passes over a dense SAE with its codes zeroed by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actcache import ActivationStore, ParentMismatchError, SettingsError, extract
from actcache.artifacts import digest
from analysis import MaskingConfig, MaskingCurve, ModelOptions, StudyConfig, mask_latents
from analysis.interventions.latent_choice import rank_latents
from saetrain import encode

PLACES = {"all": slice(0, 10), "patch": slice(1, 10), "cls": slice(0, 1)}
CPU = ModelOptions(device="cpu")
TAU = 0.2
K = (1, 3, 7)


@pytest.fixture(scope="module")
def other_store(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path, tiny_model: dict[str, str]) -> Path:
    """The images that the run was trained on, in another order."""
    path = tmp_path_factory.mktemp("masks") / "other.acts"
    options: dict[str, Any] = {"dtype": "float32", "precision": "float32", "seed": 5, "shard_images": 32}
    extract(tiny_images, path, **tiny_model, layers=[1], **options)
    return path


def row_of(found: MaskingCurve, selection: str, mode: str, k: int | str) -> Any:
    (row,) = [r for r in found.curve if (r.selection, r.mode, r.k) == (selection, mode, k)]
    return row


@pytest.mark.parametrize(("tokens", "keep_error"), [("all", False), ("patch", True), ("cls", False)])
def test_the_curve_is_that_of_whole_forward_passes(
    other_store: Path, middle_run: Path, plain_sae: Any, plain_clip: Any, full_forward: Callable[..., Any],
    class_texts: Any, tokens: str, keep_error: bool,
) -> None:  # fmt: skip
    study = StudyConfig(tokens=tokens, where="label >= 0", on_seen="use")
    config = MaskingConfig(k=K, keep_error=keep_error, tau=TAU)
    found = mask_latents(middle_run, other_store, None, config, study=study, model=CPU)
    store, part = ActivationStore.open(other_store), PLACES[tokens]
    labels = np.asarray(store.images["label"])
    codes = plain_sae.encode(torch.from_numpy(store.read(1)[:, part]))  # [I, t, F]
    counts = np.asarray((codes > TAU).sum(1))
    from analysis.interventions.latent_choice import split_halves

    chosen, judged = split_halves(labels.astype(np.int64), seed=0)
    assert (found.n_chosen, found.n_judged) == (len(chosen), len(judged))
    by_class = np.stack([counts[chosen][labels[chosen] == c].sum(0) for c in range(3)])
    by_dataset = by_class.sum(0)
    uris, truth = store.images["uri"].take(judged).to_pylist(), labels[judged]
    scale = float(plain_clip.logit_scale.exp())

    def judge_plainly(masks: list[set[int]], mode: str) -> tuple[float, float, Any]:
        def edit(x: torch.Tensor) -> torch.Tensor:
            z = plain_sae.encode(x[:, part])
            kept = torch.zeros(len(x), 1, z.shape[-1], dtype=torch.float64)
            for i, mask in enumerate(masks):
                kept[i, 0, sorted(mask)] = 1
            new = plain_sae.decode(z * (kept if mode == "keep" else 1 - kept))
            if keep_error:
                new = new + x[:, part].double() - plain_sae.decode(z)
            x = x.clone()
            x[:, part] = new.float()
            return x

        logits = scale * full_forward(uris, edit).astype(np.float64) @ class_texts.T
        loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(truth)), truth]
        return float(np.mean(logits.argmax(1) == truth)), float(loss.mean()), logits.argmax(1)

    predicted = (full_forward(uris) @ class_texts.T).argmax(1)
    everything = set(range(64))
    assert row_of(found, "all", "original", "all").accuracy == pytest.approx(np.mean(predicted == truth))
    for mode, mask in (("keep", everything), ("drop", everything)):
        accuracy, loss, _ = judge_plainly([mask] * len(judged), mode)
        row = row_of(found, "all", mode, "all")
        assert (row.accuracy, row.loss) == (pytest.approx(accuracy), pytest.approx(loss, rel=3e-5))
    for k in K:
        own = [set(row[row >= 0].tolist()) for row in rank_latents(by_class, k)]
        dataset = set(rank_latents(by_dataset[None], k)[0].tolist()) - {-1}
        for mode in ("keep", "drop"):
            for selection, masks in (
                ("class", [own[c] for c in truth]),
                ("predicted", [own[c] for c in predicted]),
                ("dataset", [dataset] * len(judged)),
            ):
                accuracy, loss, _ = judge_plainly(masks, mode)
                row = row_of(found, selection, mode, k)
                assert row.accuracy == pytest.approx(accuracy), (selection, mode, k)
                assert row.loss == pytest.approx(loss, rel=3e-5), (selection, mode, k)
            live = int((by_dataset > 0).sum())
            if any(live - len(mask) < len(mask) for mask in own):  # not as many others
                assert ("random", k) not in {(r.selection, r.k) for r in found.curve}
                continue
            random = row_of(found, "random", mode, k)
            assert len(random.draws) == 3
            assert random.accuracy == pytest.approx(np.mean(random.draws))
            assert random.accuracy_low <= random.accuracy <= random.accuracy_high
            (margin,) = [
                m for m in found.margins if (m.selection, m.mode, m.k) == ("class", mode, k)
            ]  # fmt: skip
            assert margin.margin == pytest.approx(row_of(found, "class", mode, k).accuracy - random.accuracy)
            assert margin.low <= margin.margin <= margin.high
    assert ("random", 1) in {(r.selection, r.k) for r in found.curve}


def test_latents_are_chosen_on_codes_of_other_images_too(tmp_path: Path, other_store: Path, middle_run: Path) -> None:
    codes = encode(middle_run, other_store, tmp_path / "other.codes")
    first = "(source_index < 12 or 25 <= source_index < 37 or 50 <= source_index < 62)"
    half = first, f"not {first}"
    config, study = MaskingConfig(k=(2,), chosen_where=half[0]), StudyConfig(where=half[1], on_seen="use")
    stored = mask_latents(middle_run, other_store, None, config, study=study, chosen_on=codes, model=CPU)
    encoded = mask_latents(middle_run, other_store, None, config, study=study, model=CPU)
    assert stored.curve == encoded.curve
    assert (stored.n_chosen, stored.n_judged) == (36, 39)


def test_of_its_own_store_a_run_is_judged_on_held_out_images(middle_run: Path, middle_store: Path) -> None:
    found = mask_latents(middle_run, middle_store, None, MaskingConfig(k=(2,), n_random=1), model=CPU)
    labels = np.asarray(ActivationStore.open(middle_store).images["label"])
    assert found.classes == tuple(f"class{c}" for c in sorted(set(labels[71:])))
    assert (found.n_chosen, found.n_judged) == (int(np.isin(labels[:71], labels[71:]).sum()), 4)


def test_a_list_is_kept_or_dropped_for_every_image(
    other_store: Path, middle_run: Path, plain_sae: Any, full_forward: Callable[..., Any], class_texts: Any
) -> None:
    study = StudyConfig(on_seen="use")
    found = mask_latents(middle_run, other_store, None, MaskingConfig(latents=(5, 41, 17)), study=study, model=CPU)
    assert {(r.selection, r.k) for r in found.curve} == {("all", "all"), ("list", 3), ("random", 3)}
    from analysis.interventions.latent_choice import split_halves

    store = ActivationStore.open(other_store)
    labels = np.asarray(store.images["label"]).astype(np.int64)
    judged = split_halves(labels, seed=0)[1]

    def edit(x: torch.Tensor) -> torch.Tensor:
        z = plain_sae.encode(x)
        z[..., [5, 41, 17]] = 0
        return plain_sae.decode(z).float()  # type: ignore[no-any-return]

    logits = full_forward(store.images["uri"].take(judged).to_pylist(), edit) @ class_texts.T
    assert row_of(found, "list", "drop", 3).accuracy == pytest.approx(np.mean(logits.argmax(1) == labels[judged]))


def test_the_same_call_twice_returns_the_file(tmp_path: Path, other_store: Path, middle_run: Path) -> None:
    out = tmp_path / "masks.json"
    config = MaskingConfig(k=(1,))
    first = mask_latents(middle_run, other_store, out, config, model=ModelOptions(device="cpu", batch_size=7))
    written = out.read_bytes()
    kept = json.loads(written)
    assert kept.pop("digest") == digest(kept)
    assert kept == first.to_json()
    assert mask_latents(middle_run, other_store, out, config, model=CPU) == first
    with pytest.raises(SettingsError, match=r"tau: 0\.2 there, 0\.3 asked for"):
        mask_latents(middle_run, other_store, out, MaskingConfig(k=(1,), tau=0.3), model=CPU)
    assert out.read_bytes() == written


def test_bad_input_is_told_what_to_do(
    tmp_path: Path, other_store: Path, middle_run: Path, middle_store: Path, tiny_codes: Path, make_images: Any,
    tiny_model: dict[str, str], tiny_run: Path,
) -> None:  # fmt: skip
    codes = encode(middle_run, other_store, tmp_path / "other.codes")
    lonely = make_images(tmp_path / "lonely", 7, seed=9)
    for file in list((lonely / "class2").iterdir())[1:]:
        file.unlink()  # one image of class2 is left: judged, and none to choose on
    extract(lonely, tmp_path / "lonely.acts", **tiny_model, layers=[1])
    extract(lonely, tmp_path / "random.acts", model=tiny_model["model"], pretrained="random:4", layers=[1])
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ParentMismatchError, "was encoded by run", {"chosen_on": tiny_codes}),
        (SettingsError, r"0\.\.63, got 64", {"config": MaskingConfig(latents=(64,))}),
        (SettingsError, "names a latent twice", {"config": MaskingConfig(latents=(6, 6))}),
        (
            SettingsError,
            "--k must be below .* 64 latents, got 64, 99",
            {"config": MaskingConfig(k=(64, 99))},
        ),
        (SettingsError, "both to choose latents and to judge them", {"chosen_on": codes}),
        (
            SettingsError,
            "both to choose latents and to judge them",
            {"config": MaskingConfig(chosen_where="label >= 0")},
        ),
        (
            SettingsError,
            "no image of class0, class1, class2 to choose",
            {"config": MaskingConfig(chosen_where="label == 7"), "study": StudyConfig(on_seen="use")},
        ),
        (SettingsError, "no image of class2 to choose latents on", {"store": tmp_path / "lonely.acts"}),
        (ParentMismatchError, "was trained on model", {"store": tmp_path / "random.acts"}),
        (SettingsError, "template", {"study": StudyConfig(templates="nothing")}),
    ]
    for error, message, options in cases:
        store = options.pop("store", other_store)
        with pytest.raises(error, match=message):
            mask_latents(middle_run, store, tmp_path / "out.json", model=CPU, **options)
    assert not (tmp_path / "out.json").exists()
