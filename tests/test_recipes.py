"""docs/recipes: the classes of demo_adaptation.py match the scenes, and its verdict can disagree with `compare`;
benchmark.sh runs on a few images, goes on where it was, and leaves its tables and pages. imagenet.sh and dinov2.sh run
at a thousandth of their size.
"""

import csv
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from small_codes import write_codes
from warm_process import WarmProcess

from actcache.demo import sample_scene, write_demo
from analysis import read_result
from analysis.results import Benchmark, Fidelity, Share
from saetrain import CodeStore, Run

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[1] / "docs" / "recipes"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_adaptation", RECIPES / "demo_adaptation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_class_holds_the_scenes_with_one_object_that_its_word_means(recipe: ModuleType, tmp_path: Path) -> None:
    truth = write_demo(tmp_path / "demo", n_images=60, seed=3)
    scenes = {f"{i:06d}": sample_scene(3, i) for i in range(60)}
    expected: dict[str, dict[str, str]] = {case: {} for case in recipe.WORDS}
    for name, scene in scenes.items():
        if len(scene.objects) == 1:
            only = scene.objects[0]
            if only.texture != "dotted":
                expected["renamed"][name] = {"solid": "dax", "striped": "fep", "checkered": "zib"}[only.texture]
            if only.position in ("left", "right"):
                expected["missing"][name] = {"left": "nib", "right": "rop"}[only.position]
    for case, words in recipe.WORDS.items():
        with open(recipe.write_table(tmp_path / "x.csv", truth, words), newline="") as file:
            labels = {Path(row["path"]).stem: row["label"] for row in csv.DictReader(file)}
        assert labels == expected[case]
        assert len(labels) > 8


def test_a_latent_is_judged_on_images_it_was_not_chosen_on(recipe: ModuleType, tmp_path: Path) -> None:
    labels = np.array([0, 0, 1, 1] * 10, dtype=np.int32)
    dense = np.zeros((40, 3, 3), dtype=np.float16)
    dense[:, 1, 0] = labels  # recognizes class1 everywhere
    dense[::2, 2, 1] = 1 - labels[::2]  # recognizes class0 on the images where latents are chosen
    dense[1::2, 2, 1] = labels[1::2]  # and class1 on those where they are judged
    auroc = recipe.best_latents(write_codes(tmp_path / "x.codes", dense, [16, 16, 8], labels))
    assert auroc == {"class0": 0.0, "class1": 1.0}


@pytest.mark.parametrize(
    ("before", "after", "share", "verdict"),
    [
        (0.99, 0.99, (1.0, 0.9, 1.1), "the two agree"),
        (0.99, 0.99, (0.6, 0.4, 0.8), "the two do not agree"),
        (0.99, 0.99, None, "the two do not agree"),
        (0.5, 0.55, None, "the two agree"),
        (0.5, 0.55, (1.0, 0.9, 1.1), "the two do not agree"),
        (0.5, 0.9, (0.2, 0.1, 0.4), "the two agree"),
        (0.8, 0.9, (1.0, 0.9, 1.1), "the two do not agree"),
    ],
)
def test_the_verdict_follows_the_truth(
    recipe: ModuleType, before: float, after: float, share: tuple[float, ...] | None, verdict: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    gain = Share(*(share or (None,) * 3))
    names = ("base image, base text", "base image, adapted text", "adapted image, adapted text")
    comparison = SimpleNamespace(
        conclusion=SimpleNamespace(without_new_concepts=gain, sentence="So it is."),
        accuracy={name: SimpleNamespace(accuracy=0.5) for name in names},
    )
    recipe.print_verdict("case", {"a": before, "b": before}, {"a": after, "b": after}, comparison)
    assert f"; {verdict}\n" in capsys.readouterr().out


def test_the_benchmark_recipe_runs_on_a_few_images_and_then_does_nothing(
    real_data: Path, tmp_path: Path, warm: WarmProcess
) -> None:
    for split, n in (("train", 12), ("test", 5)):
        for folder in sorted((real_data / "cifar10" / split).iterdir())[:3]:
            (tmp_path / "data" / "cifar10" / split / folder.name).mkdir(parents=True)
            for image in sorted(folder.iterdir())[:n]:
                shutil.copy(image, tmp_path / "data" / "cifar10" / split / folder.name)
    (tmp_path / "data" / "clip-cifar").symlink_to(real_data / "clip-cifar")
    out = tmp_path / "out"
    command = ["bash", str(RECIPES / "benchmark.sh"), str(tmp_path / "data"), str(out)]

    def run() -> None:
        with warm.as_command() as python:
            settings = {"PATCHSAE": f"{python} cli.py --quiet", "STEPS": "3", "SEEDS": "0 1", "PARTS": "cifar"}
            done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    run()
    result = read_result(out / "cifar" / "benchmark.json", Benchmark)
    assert {subject.variant for subject in result.subjects} == {"topk", "relu", "batchtopk", "matryoshka topk"}
    assert {subject.n_latents for subject in result.subjects if subject.baseline is None} == {384, 1536}
    assert len({subject.group for subject in result.subjects if subject.baseline is None}) == 7
    assert result.n_judged == 15
    assert result.n_choosing == 36
    for name in ("tables.md", "tables.tex", "tables.csv"):
        assert "topk/k16-seed" in (out / "cifar" / name).read_text()
    assert "k-sparse accuracy against L0" in (out / "cifar" / "report.html").read_text()
    written = (out / "cifar" / "benchmark.json").stat().st_mtime_ns
    run()
    assert (out / "cifar" / "benchmark.json").stat().st_mtime_ns == written


@pytest.fixture(scope="module")
def thousandth(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thousandth of ImageNet: 1,280 images to train on and 50 to judge, of ten classes, and a line for each class."""
    folder = tmp_path_factory.mktemp("imagenet")
    for split, source, n in (("train", "train", 128), ("val", "test", 5)):
        for images in sorted((real_data / "cifar10" / source).iterdir()):
            (folder / split / images.name).mkdir(parents=True)
            for image in sorted(images.iterdir())[:n]:
                shutil.copy(image, folder / split / images.name)
    (folder / "classes.txt").write_text("".join(f"{path.name},{path.name}\n" for path in (folder / "train").iterdir()))
    return folder


def run_recipe(name: str, data: Path, out: Path, **settings: str) -> str:
    command = ["bash", str(RECIPES / name), str(data), str(out)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


SMALL = {"BATCH": "64", "LATENTS": "512", "STEPS": "20", "ROWS": "2048", "SAMPLE": "200", "SHOTS": "2", "EPOCHS": "1",
         "WORKERS": "1"}  # fmt: skip


def test_the_imagenet_recipe_runs_at_a_thousandth_of_its_size(
    real_data: Path, thousandth: Path, tmp_path: Path, warm: WarmProcess
) -> None:
    clip, out = real_data / "clip-cifar", tmp_path / "out"
    settings = SMALL | {"MODEL": f"--model {clip}/ViT-CIFAR-4.json --pretrained {clip}/vit_cifar4.safetensors"}
    with warm.as_command() as python:
        settings |= {"PATCHSAE": f"{python} cli.py", "LAYER": "4"}
        plan = run_recipe("imagenet.sh", thousandth, out, PARTS="plan", **settings)
        assert [line.split()[1] for line in plan.splitlines() if line.startswith("images")] == ["1,280", "50"]
        assert list(out.iterdir()) == []
        run_recipe("imagenet.sh", thousandth, out, **settings)
        made = {path.name for path in out.iterdir()}
        run = Run.open(out / "run")
        assert (run.sae_config.variant, run.sae_config.n_latents, run.sae_config.l1) == ("relu", 512, 8e-5)
        assert {"train.acts", "sample.codes", "val.concepts", "maple.prompts", "report.html"} <= made
        assert read_result(out / "fidelity.json", Fidelity).runs[0].n_images == 50
        written = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
        run_recipe("imagenet.sh", thousandth, out, PARTS="train encode analyze judge", **settings)
        assert [path for path in written if path.stat().st_mtime_ns != written[path]] == []


def test_two_processes_of_torchrun_train_and_encode_by_the_imagenet_recipe(tiny_store: Path, tmp_path: Path) -> None:
    """LAUNCH, with the processes that torchrun starts."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("train", "sample", "val"):
        (out / f"{name}.acts").symlink_to(tiny_store)
    launch = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 --no-python"
    run_recipe(
        "imagenet.sh", tmp_path, out, PATCHSAE=f"{sys.executable} {RECIPES.parents[1] / 'cli.py'}", LAUNCH=launch,
        PARTS="train encode", LAYER="2", LATENTS="64", STEPS="5", ROWS="64",
    )  # fmt: skip
    assert Run.open(out / "run").quality["all"]["l0"] >= 0
    assert CodeStore.open(out / "val.codes").n_images == CodeStore.open(out / "sample.codes").n_images > 0


def test_the_dinov2_recipe_runs_at_a_thousandth_of_its_size(
    real_data: Path, thousandth: Path, tmp_path: Path, warm: WarmProcess
) -> None:
    clip, out = real_data / "clip-cifar", tmp_path / "out"
    spec = importlib.util.spec_from_file_location("small_vits", RECIPES / "small_vits.py")
    assert spec is not None
    assert spec.loader is not None
    small_vits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small_vits)
    small_vits.write_registers(tmp_path / "registers")
    settings = SMALL | {
        "MODEL": f"--model timm:local-dir:{tmp_path / 'registers'}", "LAYER": "2", "SAE": "--k 8 --tokens patch",
        "CLIP": f"--model {clip}/ViT-CIFAR-4.json --pretrained {clip}/vit_cifar4.safetensors --layer 4",
    }  # fmt: skip
    with warm.as_command() as python:
        run_recipe("dinov2.sh", thousandth, out, PATCHSAE=f"{python} cli.py", **settings)
    assert read_result(out / "fidelity.json", Fidelity).judge.kind == "probe"
    assert (out / "val.concepts" / "notes" / "names.parquet").exists()
    assert Run.open(out / "run").artifact.settings["train"]["tokens"] == "patch"
    assert not (out / "maple.prompts").exists()
    assert (out / "report.html").exists()
