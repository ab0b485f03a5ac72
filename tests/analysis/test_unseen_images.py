"""Everything that judges leaves out the images that its ancestors have learned from, counts them, and refuses where
nothing is left; --on-seen use overrides. The images come under other names, in another order, from another folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from earlier_version import forget_hashes
from PIL import Image
from typer.testing import CliRunner

import cli
from actcache import ActivationStore, PromptConfig, SettingsError, adapt, extract, open_stores
from actcache.options import JudgingConfig
from actcache.seen import SeenImages
from analysis import (
    AnalyzeConfig,
    ComparisonConfig,
    DeletionConfig,
    MaskingConfig,
    ModelOptions,
    RulesConfig,
    SteerabilityConfig,
    StudyConfig,
    analyze,
    compare,
    delete_latents,
    evaluate_fidelity,
    inspect_dictionaries,
    learn_rules,
    localize,
    mask_latents,
    measure_steerability,
    set_latents,
)
from saetrain import CodeStore, SAEConfig, TrainConfig, encode, train
from saetrain.lineage import find_seen

CPU = ModelOptions(device="cpu")
SMALL: dict[str, Any] = {"layers": [1], "shard_images": 16, "precision": "float32"}
N_OLD, N_NEW = 60, 18
N_TRAINED = 57  # of the old ones; three are held out
N_SHOTS = 6  # of the new ones


class World:
    """`first.acts` with its run; and `asked.acts`, which holds its images under other names among new ones.

    base.concepts and adapted.concepts are of the asked images; the prompts were trained on some of the new ones.
    """

    def __init__(self, folder: Path, model: dict[str, str], make_images: Callable[..., Path]) -> None:
        self.folder, self.model = folder, model
        old = make_images(folder / "old", N_OLD, seed=0)
        new = make_images(folder / "new", N_NEW, seed=5)
        self.first = extract(old, folder / "first.acts", **model, **SMALL).path
        self.old_files = sorted(old.rglob("*.png"))
        self.new_files = sorted(new.rglob("*.png"))
        masks = np.kron(np.array([[0, 1], [2, 3]], np.uint8), np.ones((12, 12), np.uint8))
        for i, file in enumerate([*self.old_files, *self.new_files]):
            place = folder / "asked" / file.parent.name / f"{i * 61 % 331:03d}.png"
            for target in (place, folder / "masks" / file.parent.name / place.name):
                target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
            Image.fromarray(masks).save(folder / "masks" / file.parent.name / place.name)
        masked = {**SMALL, "masks": folder / "masks"}
        self.asked = extract(folder / "asked", folder / "asked.acts", **model, **masked, seed=7).path
        config = TrainConfig(n_steps=40, batch_size=128, lr=3e-3)
        self.run = train(self.first, folder / "run", sae=SAEConfig(n_latents=64, k=4), config=config, device="cpu").path
        self.first_codes = encode(self.run, self.first, folder / "first.codes").path
        self.asked_codes = encode(self.run, self.asked, folder / "asked.codes").path
        prompts = PromptConfig(method="coop", shots=2, n_epochs=1, lr=0.1)
        self.prompts = adapt(new, folder / "a.prompts", **model, config=prompts, precision="float32").artifact.path
        adapted = extract(folder / "asked", folder / "adapted.acts", **model, **SMALL, seed=7, prompts=self.prompts)
        encode(self.run, adapted, folder / "adapted.codes")
        for name in ("asked", "adapted"):
            analyze(folder / f"{name}.codes", folder / f"{name}.concepts", config=AnalyzeConfig(n_gallery=2))

    def positions(self, store: Path, files: list[Path]) -> set[int]:
        """Of some files in a store, by their bytes."""
        wanted, opened = {file.read_bytes() for file in files}, ActivationStore.open(store)
        source = opened.artifact.parent_path("images")
        uris = opened.images["uri"].to_pylist()
        return {i for i, uri in enumerate(uris) if (source / uri).read_bytes() in wanted}


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: dict[str, str], make_images: Callable[..., Path]
) -> World:
    return World(tmp_path_factory.mktemp("world"), tiny_model, make_images)


def judge_fidelity(world: World, store: Path, study: StudyConfig) -> Any:
    found = evaluate_fidelity(world.run, store, study=study, model=CPU)
    return found, found.runs[0].n_images


def judge_masks(world: World, store: Path, study: StudyConfig) -> Any:
    found = mask_latents(world.run, store, None, MaskingConfig(k=(2,), n_random=1), study=study, model=CPU)
    return found, found.n_judged


def judge_set(world: World, store: Path, study: StudyConfig) -> Any:
    found = set_latents(world.run, store, set={3: 1.0}, study=study, model=CPU)
    return found, found.n_judged


def judge_deletion(world: World, store: Path, study: StudyConfig) -> Any:
    found = delete_latents(world.run, store, None, DeletionConfig(n=(1,)), study=study, model=CPU)
    return found, found.n_judged


def judge_steering(world: World, store: Path, study: StudyConfig) -> Any:
    study = StudyConfig(limit=1000, on_seen=study.on_seen)
    config = SteerabilityConfig(latents=(3,), strengths=(1.0,))
    (world.folder / "words.txt").write_text("red\nblue\n")
    found = measure_steerability(
        world.run, store, None, config, vocabulary=world.folder / "words.txt", study=study, model=CPU
    )
    return found, found.n_judged


def judge_dictionary(world: World, store: Path, study: StudyConfig) -> Any:
    found = inspect_dictionaries(world.run, store, n_tokens=4096, judging=JudgingConfig(on_seen=study.on_seen))
    return found, found.runs[0].gap.n_tokens // 10  # every token of the judged images is in the sample


STUDIES = [judge_fidelity, judge_masks, judge_set, judge_deletion, judge_steering, judge_dictionary]


@pytest.mark.parametrize("judge", STUDIES)
def test_a_study_judges_the_images_that_are_new_to_its_run(world: World, judge: Any) -> None:
    found, n_judged = judge(world, world.asked, StudyConfig())
    n = N_OLD + N_NEW
    assert n_judged == n - N_TRAINED
    assert found.seen[0] == SeenImages("run run", N_TRAINED, n, False, "content")
    assert "57 of 78 images are left out because they were learned from (run run)" in found.notes()
    assert found.to_json()["seen"][0]["n"] == N_TRAINED


@pytest.mark.parametrize("judge", STUDIES)
def test_a_study_uses_all_images_if_it_is_told_to(world: World, judge: Any) -> None:
    found, n_judged = judge(world, world.asked, StudyConfig(on_seen="use"))
    halves = judge is judge_masks  # latents have to be chosen on the other half
    assert n_judged == (N_OLD + N_NEW) // 2 if halves else N_OLD + N_NEW
    assert (found.seen[0].n, found.seen[0].used) == (N_TRAINED, True)
    assert found.settings["on_seen"] == "use"


@pytest.mark.parametrize("judge", STUDIES)
def test_a_study_of_training_images_alone_is_refused(world: World, judge: Any, tmp_path: Path) -> None:
    run_files = world.positions(world.first, world.old_files)
    names = ActivationStore.open(world.first).images["uri"].to_pylist()
    for i in sorted(run_files)[:N_TRAINED]:
        place = tmp_path / "trained" / names[i]
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(world.folder / "old" / names[i], place)
    extract(tmp_path / "trained", tmp_path / "x.acts", **world.model, **SMALL, seed=9)
    with pytest.raises(SettingsError, match=r"Nothing is left to judge: all 57 .*run run.*--on-seen use") as caught:
        judge(world, tmp_path / "x.acts", StudyConfig())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("judge", STUDIES)
def test_a_store_without_hashes_is_known_by_name_and_the_result_says_so(
    world: World, judge: Any, tmp_path: Path
) -> None:
    extract(world.folder / "old", tmp_path / "again.acts", **world.model, **SMALL, seed=11)
    forget_hashes(tmp_path / "again.acts")
    found, n_judged = judge(world, tmp_path / "again.acts", StudyConfig())
    assert n_judged == N_OLD - N_TRAINED
    assert found.seen[0].known_by == "uri"
    assert any("by name" in line for line in found.notes())


def test_latents_are_not_judged_on_copies_of_the_images_they_were_chosen_on(world: World, tmp_path: Path) -> None:
    """The codes to choose on hold half of the new images, under other names."""
    for i, file in enumerate(world.new_files[::2]):
        place = tmp_path / "half" / file.parent.name / f"h{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    extract(tmp_path / "half", tmp_path / "half.acts", **world.model, **SMALL)
    codes = encode(world.run, tmp_path / "half.acts", tmp_path / "half.codes")
    options: dict[str, Any] = {"config": MaskingConfig(k=(2,), n_random=1), "chosen_on": codes, "model": CPU}
    found = mask_latents(world.run, world.asked, **options)
    assert found.seen is not None
    assert (found.seen[1].by, found.seen[1].n, found.seen[1].known_by) == ("choice of latents", N_NEW // 2, "content")
    assert found.n_judged == N_OLD + N_NEW - N_TRAINED - N_NEW // 2
    used = mask_latents(world.run, world.asked, **options, study=StudyConfig(on_seen="use"))
    assert used.n_judged == N_OLD + N_NEW
    with pytest.raises(SettingsError, match="used both to choose latents and to judge them"):
        mask_latents(world.run, tmp_path / "half.acts", **options)


def test_rules_are_judged_on_images_that_neither_they_nor_the_run_know(world: World) -> None:
    config = RulesConfig(n_patches=1)
    found = learn_rules(world.first_codes, None, config, judge=world.asked_codes)
    assert (found.n_learned, found.n_judged) == (N_OLD, N_NEW)  # the rules know the three held-out images, too
    assert found.seen == (SeenImages("rules, run run", N_OLD, N_OLD + N_NEW, False, "content"),)
    used = learn_rules(
        world.first_codes, None, RulesConfig(n_patches=1, on_seen="use"), judge=world.asked_codes
    )  # fmt: skip
    assert used.n_judged == N_OLD + N_NEW
    for judge in (world.first_codes, encode(world.run, world.first, world.folder / "same.codes").path):
        with pytest.raises(SettingsError, match="Nothing is left to judge"):
            learn_rules(world.first_codes, None, config, judge=judge)
    alone = learn_rules(world.first_codes, None, config)  # of the last 20 %, the run has learned from the first 15
    assert (alone.n_judged, alone.seen) == (3, (SeenImages("rules, run run", 9, 12, False, "content"),))


def test_latents_are_localized_on_images_that_are_new_to_the_run(world: World) -> None:
    codes = CodeStore.open(world.asked_codes)
    fresh = set(range(N_OLD + N_NEW)) - world.positions(world.asked, _trained(world))
    judged = {i for i in fresh if i >= (N_OLD + N_NEW) // 2}
    found = localize(codes)
    assert {row.n_images for row in found.concepts} == {len(judged)}
    assert found.seen is not None
    assert (found.seen[0].n, found.seen[0].of) == (39 - len(judged), 39)
    used = localize(codes, judging=JudgingConfig(on_seen="use"))
    assert {row.n_images for row in used.concepts} == {39}


def _trained(world: World) -> list[Path]:
    uris = ActivationStore.open(world.first).images["uri"].to_pylist()[:N_TRAINED]
    return [world.folder / "old" / uri for uri in uris]


def test_a_comparison_leaves_out_training_images_and_shots(world: World) -> None:
    base, adapted = world.folder / "asked.concepts", world.folder / "adapted.concepts"
    options: dict[str, Any] = {"k": (2,), "n_top": 2, "n_random": 1}
    found = compare(base, adapted, None, ComparisonConfig(**options), device="cpu")
    n = N_OLD + N_NEW
    assert found.n_chosen + found.n_judged == n - N_TRAINED - N_SHOTS
    assert found.seen == (SeenImages("run run, prompts a.prompts", N_TRAINED + N_SHOTS, n, False, "content"),)
    used = compare(base, adapted, None, ComparisonConfig(**options, on_seen="use"), device="cpu")
    assert used.n_chosen + used.n_judged == n


def test_a_study_of_an_adapted_store_leaves_out_the_shots(world: World, tmp_path: Path) -> None:
    _, n_judged = judge_fidelity(world, world.folder / "adapted.acts", StudyConfig())
    assert n_judged == N_OLD + N_NEW - N_TRAINED - N_SHOTS
    moved = tmp_path / "far" / "away" / "adapted.acts"  # the prompts are not where it says, so its own record counts
    shutil.copytree(world.folder / "adapted.acts", moved)
    assert find_seen(open_stores(moved)).images.sum() == N_SHOTS


def test_the_command_line_has_the_option_and_says_what_was_left_out(world: World, tmp_path: Path) -> None:
    def ask(*words: Any) -> Any:
        done = CliRunner().invoke(cli.app, ["--quiet", *map(str, words)])
        assert done.exit_code == 0, done.output
        return done.stdout

    text = ask("evaluate", world.run, world.asked, "--device", "cpu")
    assert "57 of 78 images are left out because they were learned from (run run)" in " ".join(text.split())
    for verb in (
        ["evaluate", world.run, world.asked, "--device", "cpu"], ["inspect", world.run, "--store", world.asked],
        ["localize", world.asked_codes], ["rules", world.first_codes, "--n-patches", "1", "--judge", world.asked_codes],
    ):  # fmt: skip
        assert json.loads(ask("--json", *verb))["seen"][0]["used"] is False
        assert json.loads(ask("--json", *verb, "--on-seen", "use"))["seen"][0]["used"] is True
    wrong = CliRunner().invoke(cli.app, ["evaluate", str(world.run), str(world.asked), "--on-seen", "maybe"])
    assert wrong.exit_code == 1
