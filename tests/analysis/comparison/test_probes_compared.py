"""compare with a probe: one for each model, trained on its own features, and neither judges what it was trained on."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_clip import checkpoint_tensors

from actcache import ActivationStore, extract
from analysis import AnalyzeConfig, ComparisonConfig, StudyConfig, analyze, compare, evaluate_fidelity
from analysis.report.comparison import write_adaptation_page
from saetrain import encode

LAYER = 1


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory, make_images: Callable[..., Path], tiny_model: dict[str, str],
    middle_run: Path,
) -> tuple[Path, Path]:  # fmt: skip
    """Concepts of 100 images that are new to middle_run, by the plain model and by one with visual prompts."""
    folder = tmp_path_factory.mktemp("probes")
    images = make_images(folder / "images", 100, seed=6)
    for i, file in enumerate(sorted(images.rglob("*.png"))[::5]):  # under another name, and never judged either
        shutil.copy(file, file.with_name(f"copy{i}.png"))
    state = checkpoint_tensors("vpt", width=32, text=16, embed=16, n=4, depth=2)
    torch.save({"state_dict": {name: 5 * value for name, value in state.items()}}, folder / "vpt.tar")
    made = []
    for name, options in (("base", {}), ("adapted", {"prompts": folder / "vpt.tar"})):
        store: dict[str, Any] = {"layers": [LAYER], "precision": "float32", "dtype": "float32", **options}
        extract(images, folder / f"{name}.acts", **tiny_model, **store)
        encode(middle_run, folder / f"{name}.acts", folder / f"{name}.codes")
        made.append(
            analyze(folder / f"{name}.codes", folder / f"{name}.concepts", config=AnalyzeConfig(n_gallery=2)).path
        )
    return made[0], made[1]


def test_each_model_has_a_probe_that_is_trained_on_other_images(pair: tuple[Path, Path], tmp_path: Path) -> None:
    table = ActivationStore.open(pair[0].with_suffix(".acts")).images.to_pylist()
    chosen = [row["uri"] for row in table[:60]]
    trained = {row["content_hash"] for row in table[:60]}
    judged = sum(row["content_hash"] not in trained for row in table)
    assert judged < len(table) - 60  # some of the others are copies
    config = ComparisonConfig(judge="probe", probe_where=f"uri in {chosen}", k=(3,), n_top=3)
    found = compare(*pair, tmp_path / "x.json", config, device="cpu")
    assert found.judge is not None
    assert found.judge.probe is not None
    assert found.judge.probe.n_images == 60
    (seen,) = found.seen or ()
    assert seen.of - seen.n == judged
    assert found.n_chosen + found.n_judged == judged
    for side in ("base", "adapted"):
        assert found.accuracy[f"{side} image, {side} text"].accuracy > 0.9  # each class has a color of its own
    assert compare(*pair, tmp_path / "x.json", config, device="cpu") == found
    page = write_adaptation_page(found, *pair, tmp_path / "x.html")
    assert "linear probe on cls and patch" in page.read_text()


def test_the_base_models_probe_is_the_one_of_evaluate(pair: tuple[Path, Path], middle_run: Path) -> None:
    store = pair[0].with_suffix(".acts")
    uris = [row["uri"] for row in ActivationStore.open(store).images.to_pylist()[:60]]
    study = StudyConfig(judge="probe", probe_where=f"uri in {uris}")
    alone = evaluate_fidelity(middle_run, store, study=study)
    config = ComparisonConfig(judge="probe", probe_where=f"uri in {uris}", k=(3,), n_top=3)
    found = compare(*pair, None, config, device="cpu")
    assert alone.judge is not None
    assert found.judge is not None
    assert alone.judge.probe is not None
    assert found.judge.probe is not None
    assert alone.judge.probe.images == found.judge.probe.images  # the same images, though not the same features
