"""`import` on the command line, and every verb that comes after it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import cli
from actcache import ActivationStore

SMALL = "--n-latents 32 --k 4 --n-steps 40 --batch-size 128 --device cpu"


def ask(folder: Path, command: str, code: int = 0) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = CliRunner().invoke(cli.app, ["--json", *command.split()])
    assert done.exit_code == code, (command, done.output)
    return json.loads(done.stdout) if code == 0 else done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sparse combinations of 16 directions: [90, 10, 24]."""
    folder = tmp_path_factory.mktemp("import")
    rng = np.random.default_rng(0)
    codes = rng.exponential(size=(90, 10, 16)) * (rng.random((90, 10, 16)) < 0.1)
    np.save(folder / "x.npy", (codes @ rng.normal(size=(16, 24)) + 0.01 * rng.normal(size=(90, 10, 24))).astype("f4"))
    return folder


def test_the_whole_path_without_a_model_and_without_images(folder: Path) -> None:
    answer = ask(folder, "import x.npy x.acts --layer 5 --model-name my-vit")
    assert (answer["n_images"], answer["n_tokens"], answer["grid"], answer["prefix"]) == (90, 10, "3x3", "cls")
    assert (answer["guessed"], answer["has_images"], answer["model"]) == (["prefix", "grid"], False, "my-vit")
    run = ask(folder, f"train x.acts run {SMALL}")
    assert run["hook_point"] == "blocks.5.hook_resid_post"
    assert run["quality"]["all"]["fvu"] < 0.9
    assert ask(folder, "encode run x.acts x.codes --device cpu")["n_images"] == 90
    assert ask(folder, "analyze x.codes x.concepts --device cpu")["left_out"]["pictures"]
    rows = ask(folder, "query x.codes --image 3")["rows"]
    hits = ask(folder, f"query x.codes --latent {rows[0]['latent']}")["rows"]
    store = ActivationStore.open(folder / "x.acts")
    assert {row["uri"] for row in hits} <= set(store.images["uri"].to_pylist())
    assert ask(folder, "report x.concepts x.html")["bytes"] > 1000
    assert len(ask(folder, "inspect run --store x.acts --n-tokens 20")["runs"]) == 1
    assert ask(folder, "verify x.acts")["ok"] is True
    assert ask(folder, "info x.acts")["imported"]["format"] == "npy"
    for command, message in (
        ("query x.codes --image 3 --sheet x.png", "imported without their images. Import them again"),
        ("localize x.codes", "without images, so there are no pixels"),
        ("analyze x.codes y.concepts --embeddings clip", "imported with the name of their model only (my-vit)"),
    ):
        assert message in ask(folder, command, code=1)
    assert "x.npy" in ask(folder, "import x.npy y.acts --model-name my-vit", code=1)


def test_an_imported_copy_is_judged_as_what_was_extracted(
    tmp_path: Path, tiny_store: Path, tiny_images: Path, tiny_model: dict[str, str], tiny_run: Path
) -> None:
    """With the model and the images, the tower runs on it, and gives the same numbers."""
    theirs = ActivationStore.open(tiny_store)
    order = np.argsort(theirs.images["source_index"].to_numpy())
    np.save(tmp_path / "x.npy", theirs.read_stream(2)[order])
    model = f"--model {tiny_model['model']} --pretrained {tiny_model['pretrained']}"
    answer = ask(tmp_path, f"import x.npy x.acts --layer 2 {model} --images {tiny_images} --shard-images 16")
    assert (answer["guessed"], answer["has_images"], answer["model_id"]) == ([], True, theirs.model_id)
    judged = [ask(tmp_path, f"evaluate {tiny_run} {store} --device cpu") for store in (tiny_store, "x.acts")]
    for one in judged:
        one.pop("parents", None)
    assert judged[0].keys() == judged[1].keys()
    numbers = [{key: value for key, value in one.items() if key not in ("out", "id", "stores")} for one in judged]
    assert json.dumps(numbers[1], sort_keys=True) == json.dumps(numbers[0], sort_keys=True)
