"""Tables from extract to query: columns are chosen on the command line, recorded, and found again by later verbs."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from typer.testing import CliRunner

import cli
from actcache import ActivationStore, ImageFolder, SettingsError, extract, repair
from analysis.lineage import find_images
from analysis.pictures import Pictures
from saetrain import CodeStore, SAEConfig, TrainConfig, encode, train


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


@pytest.fixture
def table(tmp_path: Path, tiny_images: Path) -> Path:
    """Two columns of paths, two of labels, and columns whose names are no words of Python."""
    names = sorted(str(file.relative_to(tiny_images)) for file in tiny_images.rglob("*.png"))
    (tmp_path / "photos").symlink_to(tiny_images)
    paths = [f"photos/{name}" for name in names]
    columns = {
        "path": paths[:40],
        "other view": paths[35:75],
        "fine": [f"00{i % 4}" for i in range(40)],
        "class": ["x" if i % 2 else "y" for i in range(40)],
        "5_o_Clock_Shadow": [i % 3 == 0 for i in range(40)],
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    return tmp_path / "x.parquet"


def test_columns_are_chosen_once_and_found_again(table: Path, tmp_path: Path, tiny_model: dict[str, str]) -> None:
    options: dict[str, Any] = {**tiny_model, "layers": [0], "precision": "float32"}
    usual = extract(table, tmp_path / "usual.acts", **options)
    assert "columns" not in usual.artifact.settings
    assert usual.artifact.id == extract(table, tmp_path / "same.acts", **options, path_column="path").artifact.id
    assert set(usual.images["label_name"].to_pylist()) == {"x", "y"}
    assert set(usual.images["class"].to_pylist()) == {"x", "y"}

    chosen = {"path_column": "other view", "label": "fine"}
    store = extract(table, tmp_path / "x.acts", **options, **chosen)
    assert store.artifact.settings["columns"] == {"path": "other view", "label": "fine"}
    assert set(store.images["label_name"].to_pylist()) == {"000", "001", "002", "003"}
    assert extract(table, tmp_path / "x.acts", **options, **chosen).artifact.id == store.artifact.id
    with pytest.raises(SettingsError, match="columns"):
        extract(table, tmp_path / "x.acts", **options, path_column="other view", label="class")

    shard = next(file for file in (tmp_path / "x.acts").rglob("*") if file.is_file() and "/c/" in str(file))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert repair(tmp_path / "x.acts").ok
    assert ActivationStore.open(tmp_path / "x.acts").artifact.id == store.artifact.id

    sae, config = SAEConfig(n_latents=16, k=2), TrainConfig(n_steps=3, batch_size=32)
    trained = train(tmp_path / "x.acts", tmp_path / "run", sae=sae, config=config)
    encode(trained, tmp_path / "x.acts", tmp_path / "x.codes")
    codes = CodeStore.open(tmp_path / "x.codes")
    pictures = Pictures(codes, find_images(codes))
    uri = codes.images["uri"][0].as_py()
    assert uri in set(pq.read_table(table)["other view"].to_pylist())
    assert pictures.see(0).tobytes() == _decoded(tmp_path / uri)


def _decoded(path: Path) -> bytes:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB").tobytes()  # it has the size of the model's input


def test_the_flags_of_the_command_line(table: Path, tmp_path: Path, tiny_model: dict[str, str]) -> None:
    model = ["--model", tiny_model["model"], "--pretrained", tiny_model["pretrained"], "--layer", 0, "--quiet"]
    done = run("extract", table, tmp_path / "x.acts", *model, "--path-column", "other view", "--label", "fine")
    assert done.exit_code == 0, done.stderr
    wrong = run("extract", table, tmp_path / "y.acts", *model, "--label", "nothing")
    assert wrong.exit_code == 1
    assert wrong.stderr.startswith(
        "error: x.parquet has no column 'nothing' for --label. Its columns are other view, fine"
    )
    assert wrong.stderr.count("\n") == 1
    assert not (tmp_path / "y.acts").exists()


def test_what_could_be_labels_is_said_before_the_work(
    tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    lines = ["file_name;animal"]
    names = sorted(str(file.relative_to(tiny_images)) for file in tiny_images.rglob("*.png"))[:20]
    lines += [f"{tiny_images / name};{'dog' if i % 2 else 'cat'}" for i, name in enumerate(names)]
    (tmp_path / "x.csv").write_text("\n".join(lines))
    model = [
        "--model",
        tiny_model["model"],
        "--pretrained",
        tiny_model["pretrained"],
        "--layer",
        0,
        "--quiet",
        "--json",
    ]
    done = run("extract", tmp_path / "x.csv", tmp_path / "x.acts", *model)
    assert done.exit_code == 0, done.stderr
    (record,) = caplog.records  # without a handler, Python prints warnings on stderr
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        "x.csv has no column called label, so its images have none. Columns that could be labels: animal. "
        "Choose one with --label COLUMN."
    )
    assert json.loads(done.stdout)["store"] == str(tmp_path / "x.acts")


def test_a_folder_has_its_labels_in_the_names_of_folders(
    tiny_images: Path, tmp_path: Path, tiny_model: dict[str, str]
) -> None:
    with pytest.raises(Exception, match=r"--label x is for tables"):
        extract(tiny_images, tmp_path / "x.acts", **tiny_model, layers=[0], label="x")
    with pytest.raises(Exception, match=r"--label needs a path"):
        extract(ImageFolder(tiny_images), tmp_path / "x.acts", **tiny_model, layers=[0], label="x")
