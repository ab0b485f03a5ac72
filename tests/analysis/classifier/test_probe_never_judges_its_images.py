"""Images that trained a probe are never judged by it, whatever they are called and wherever they lie."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from actcache import ActivationStore, extract, open_stores
from analysis import ModelOptions, RulesConfig, StudyConfig, evaluate_fidelity, learn_rules, mask_latents
from analysis.classifier import choose_training, predict_classes
from saetrain import SAEConfig, TrainConfig, encode, train

CPU = ModelOptions(device="cpu")
N_COPIES = 12


@pytest.fixture(scope="module")
def judged_store(
    tmp_path_factory: pytest.TempPathFactory, make_images: Callable[..., Path], middle_store: Path, tiny_images: Path,
    tiny_model: dict[str, str],
) -> Path:  # fmt: skip
    """60 new images and copies of 12 training images of middle_store, under other names."""
    folder = tmp_path_factory.mktemp("judged")
    images = make_images(folder / "images", 60, seed=9)
    for i, row in enumerate(ActivationStore.open(middle_store).images.to_pylist()[:N_COPIES]):
        shutil.copy(tiny_images / row["uri"], images / row["label_name"] / f"copy{i}.png")
    extract(images, folder / "x.acts", **tiny_model, layers=[1], precision="float32")  # type: ignore[arg-type]
    return folder / "x.acts"


@pytest.fixture(scope="module")
def foreign_run(
    tmp_path_factory: pytest.TempPathFactory, make_images: Callable[..., Path], tiny_model: dict[str, str]
) -> Path:
    """A run that has learned from none of the images of these tests."""
    folder = tmp_path_factory.mktemp("foreign")
    extract(make_images(folder / "i", 30, seed=21), folder / "x.acts", **tiny_model, layers=[1])  # type: ignore[arg-type]
    config = TrainConfig(n_steps=20, batch_size=64)
    return train(folder / "x.acts", folder / "run", layer=1, sae=SAEConfig(n_latents=32, k=4), config=config).path


def test_copies_of_the_training_images_are_left_out_by_content(
    foreign_run: Path, judged_store: Path, middle_store: Path
) -> None:
    config = StudyConfig(judge="probe", probe_store=str(middle_store))
    found = evaluate_fidelity(foreign_run, judged_store, study=config, model=CPU)
    (seen,) = found.seen or ()
    assert (seen.n, seen.of, seen.known_by) == (N_COPIES, 60 + N_COPIES, "content")
    assert "probe" in seen.by
    assert found.runs[0].n_images == 60
    plain = evaluate_fidelity(foreign_run, judged_store, model=CPU)
    assert plain.runs[0].n_images == 60 + N_COPIES  # they are seen by the probe, not by the run
    used = StudyConfig(judge="probe", probe_store=str(middle_store), on_seen="use")
    assert evaluate_fidelity(foreign_run, judged_store, study=used, model=CPU).runs[0].n_images == 60 + N_COPIES


def test_of_its_own_store_only_held_out_images_are_judged(foreign_run: Path, middle_store: Path) -> None:
    found = evaluate_fidelity(foreign_run, middle_store, study=StudyConfig(judge="probe"), model=CPU)
    (seen,) = found.seen or ()
    assert (seen.n, seen.of) == (71, 75)
    assert found.runs[0].n_images == 4


def test_images_that_a_condition_keeps_from_training_are_judged(foreign_run: Path, middle_store: Path) -> None:
    uris = ActivationStore.open(middle_store).images["uri"].to_pylist()
    config = StudyConfig(judge="probe", probe_where=f"uri in {uris[:40]}")
    found = evaluate_fidelity(foreign_run, middle_store, study=config, model=CPU)
    assert found.judge is not None
    assert found.judge.probe is not None
    assert found.judge.probe.n_images == 40
    assert found.runs[0].n_images == 35


def test_masks_are_chosen_and_judged_on_other_images_than_the_probes(
    foreign_run: Path, judged_store: Path, middle_store: Path
) -> None:
    config = StudyConfig(judge="probe", probe_store=str(middle_store))
    found = mask_latents(foreign_run, judged_store, study=config, model=CPU)
    assert found.seen is not None
    assert found.seen[0].n == N_COPIES
    assert found.n_judged + found.n_chosen <= 60 + N_COPIES
    assert found.n_judged <= 60


def test_rules_that_explain_a_probe_are_judged_on_images_that_are_new_to_it(
    tmp_path: Path, foreign_run: Path, judged_store: Path, middle_store: Path
) -> None:
    codes = encode(foreign_run, judged_store, tmp_path / "x.codes")
    config = RulesConfig(explain="probe", n_patches=1, probe_store=str(middle_store))
    found = learn_rules(codes, tmp_path / "r.json", config)
    n_learned = round(0.8 * codes.n_images)
    table = codes.images["uri"].to_pylist()
    n_copies = sum("copy" in uri for uri in table[n_learned:])
    (seen,) = found.seen or ()
    assert seen.n == n_copies
    assert found.n_judged == codes.n_images - n_learned - n_copies
    assert found.judge is not None
    assert found.judge.kind == "probe"
    assert found.parents["probe store"].id == ActivationStore.open(middle_store).store_id
    assert learn_rules(codes, tmp_path / "r.json", config) == found
    said = predict_classes(
        codes, "probe", config=config, training=choose_training(open_stores(judged_store), config, other=middle_store)
    ).classes
    judged = [i for i in range(n_learned, codes.n_images) if "copy" not in table[i]]
    labels = codes.images["label_name"].to_numpy(zero_copy_only=False)
    assert found.model_accuracy == pytest.approx((said[judged] == labels[judged]).mean())
    plain = learn_rules(codes, None, RulesConfig(n_patches=1))
    assert plain.judge is None
    assert plain.id != found.id
