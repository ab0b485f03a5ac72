"""docs/recipes/demo_adaptation.py: its classes are what the scenes hold, and its verdict can be against `compare`."""

import csv
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from small_codes import write_codes

from actcache.demo import sample_scene, write_demo

RECIPES = Path(__file__).parents[1] / "docs" / "recipes"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_adaptation", RECIPES / "demo_adaptation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_classes_are_of_scenes_with_one_object(recipe: ModuleType, tmp_path: Path) -> None:
    truth = write_demo(tmp_path / "demo", n_images=60, seed=3)
    scenes = {f"{i:06d}": sample_scene(3, i) for i in range(60)}
    wanted: dict[str, dict[str, str]] = {case: {} for case in recipe.WORDS}
    for name, scene in scenes.items():
        if len(scene.objects) == 1:
            thing = scene.objects[0]
            if thing.texture != "dotted":
                wanted["renamed"][name] = {"solid": "dax", "striped": "fep", "checkered": "zib"}[thing.texture]
            if thing.position in ("left", "right"):
                wanted["missing"][name] = {"left": "nib", "right": "rop"}[thing.position]
    for case, words in recipe.WORDS.items():
        with open(recipe.write_table(tmp_path / "x.csv", truth, words), newline="") as file:
            found = {Path(row["path"]).stem: row["label"] for row in csv.DictReader(file)}
        assert found == wanted[case]
        assert len(found) > 8


def test_a_latent_is_judged_on_images_it_was_not_chosen_on(recipe: ModuleType, tmp_path: Path) -> None:
    labels = np.array([0, 0, 1, 1] * 10, dtype=np.int32)
    dense = np.zeros((40, 3, 3), dtype=np.float16)
    dense[:, 1, 0] = labels  # tells class1 everywhere
    dense[::2, 2, 1] = 1 - labels[::2]  # tells class0 where latents are chosen
    dense[1::2, 2, 1] = labels[1::2]  # and the opposite where they are judged
    found = recipe.best_latents(write_codes(tmp_path / "x.codes", dense, [16, 16, 8], labels))
    assert found == {"class0": 0.0, "class1": 1.0}


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
def test_the_verdict_is_the_truths(
    recipe: ModuleType, before: float, after: float, share: tuple[float, ...] | None, verdict: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    gain: dict[str, Any] = dict(zip(("share", "low", "high"), share or (None,) * 3, strict=True))
    names = ("base image, base text", "base image, adapted text", "adapted image, adapted text")
    found = {
        "conclusion": {"without_new_concepts": gain, "sentence": "So it is."},
        "accuracy": {name: {"accuracy": 0.5} for name in names},
    }
    recipe.tell("case", {"a": before, "b": before}, {"a": after, "b": after}, found)
    assert f"; {verdict}\n" in capsys.readouterr().out
