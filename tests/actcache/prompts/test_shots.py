"""adapt is not measured on its shots, whatever they are called; stores and artifacts know which images these were."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from earlier_version import forget_hashes
from typer.testing import CliRunner

import cli
from actcache import ActivationStore, Adaptation, PromptConfig, SettingsError, adapt, extract, verify
from actcache.artifacts import digest, encode_json, open_artifact, read_manifest
from actcache.prompts.few_shot import choose_shots
from actcache.prompts.shots import learned_by_model, recorded_shots
from actcache.seen import SeenImages, hash_content
from actcache.sources import open_source

QUICK: dict[str, Any] = {"method": "coop", "shots": 3, "n_epochs": 1, "lr": 0.1}


def shots_of(images: Path, seed: int) -> list[str]:
    table = open_source(images).plan().table
    labels = table["label_name"].to_pylist()
    rows = choose_shots(table["uri"].to_pylist(), labels, sorted(set(labels)), 3, seed)
    return [table["uri"][int(row)].as_py() for row in rows]


@pytest.mark.parametrize(("seed", "n_more"), [(0, 0), (1, 4), (2, 30)])
def test_shots_among_the_test_images_are_left_out_and_counted(
    tmp_path: Path, tiny_model: dict[str, str], make_images: Callable[..., Path], seed: int, n_more: int
) -> None:
    images = make_images(tmp_path / "images", 36, seed=seed)
    shots = shots_of(images, seed)
    others = [uri for uri in open_source(images).plan().table["uri"].to_pylist() if uri not in shots]
    others = others[:n_more]
    for i, uri in enumerate([*shots, *others]):
        place = tmp_path / "test" / Path(uri).parent / f"t{i:02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(images / uri, place)
    options: dict[str, Any] = {"test": tmp_path / "test", "precision": "float32", "device": "cpu", **tiny_model}
    config = PromptConfig(**QUICK, seed=seed)
    out = tmp_path / "x.prompts"
    if not others:
        with pytest.raises(SettingsError, match=r"all 9 images of .*test were learned from \(shots\).*--on-seen use"):
            adapt(images, out, config=config, **options)
        assert not out.exists()
    else:
        made = adapt(images, out, config=config, **options)
        assert made.seen == SeenImages("shots", 9, 9 + len(others), False, "content")
        assert read_manifest(made.artifact)["n_test"] == len(others)
        assert adapt(images, out, config=config, **options) == made == Adaptation.open(out)
        assert verify(out).ok
    used = adapt(images, tmp_path / "used.prompts", config=PromptConfig(**QUICK, seed=seed, on_seen="use"), **options)
    assert used.seen is not None
    assert (used.seen.n, used.seen.used) == (9, True)
    assert used.artifact.settings["config"]["on_seen"] == "use"


def test_the_rest_of_the_images_is_searched_for_copies_of_shots(
    tmp_path: Path, tiny_model: dict[str, str], make_images: Callable[..., Path]
) -> None:
    images = make_images(tmp_path / "images", 30)
    for uri in sorted(path.relative_to(images) for path in images.rglob("*.png"))[:12]:
        shutil.copyfile(images / uri, images / uri.parent / f"copy-{uri.name}")
    made = adapt(images, tmp_path / "x.prompts", config=PromptConfig(**QUICK), **tiny_model)
    data = [(images / uri).read_bytes() for uri in shots_of(images, 0)]
    rest = [path for path in images.rglob("*.png") if str(path.relative_to(images)) not in shots_of(images, 0)]
    assert made.seen is not None
    assert made.seen.n == sum(path.read_bytes() in data for path in rest) > 0


def test_prompts_and_stores_know_the_shots_and_older_ones_draw_them_again(
    tmp_path: Path, tiny_model: dict[str, str], make_images: Callable[..., Path]
) -> None:
    images = make_images(tmp_path / "images", 30)
    made = adapt(images, tmp_path / "x.prompts", config=PromptConfig(**QUICK, seed=4), **tiny_model)
    shots = shots_of(images, 4)
    wanted = {"uri": shots, "content_hash": [hash_content((images / uri).read_bytes()) for uri in shots]}
    assert recorded_shots(made.artifact.path) == wanted
    store = extract(images, tmp_path / "x.acts", **tiny_model, layers=[1], prompts=made.artifact.path)
    assert store.artifact.provenance["shots"] == wanted
    assert str(tmp_path) not in json.dumps(wanted)
    shutil.rmtree(images)
    plain = learned_by_model(store)
    assert plain is not None
    assert plain.content.to_pylist() == wanted["content_hash"]
    make_images(images, 30)
    summary = dict(read_manifest(open_artifact(made.artifact.path)))
    del summary["shots"], summary["seen"]  # as an earlier version sealed it
    (made.artifact.path / "manifest.json").write_bytes(encode_json({**summary, "digest": digest(summary)}))
    assert Adaptation.open(made.artifact.path).seen is None
    assert recorded_shots(made.artifact.path) == wanted
    older = ActivationStore.open(forget_hashes(tmp_path / "x.acts"))
    found = learned_by_model(older)
    assert found is not None
    assert set(older.images["uri"].filter(found.find(older.images).images).to_pylist()) == set(shots)
    shutil.rmtree(images)
    assert recorded_shots(made.artifact.path) is None
    lost = learned_by_model(older)
    assert lost is not None
    assert not lost.known


def test_the_command_line_counts_the_shots(
    tmp_path: Path, tiny_model: dict[str, str], make_images: Callable[..., Path]
) -> None:
    images = make_images(tmp_path / "images", 30)
    model = ["--model", tiny_model["model"], "--pretrained", tiny_model["pretrained"]]
    few = ["--method", "coop", "--shots", "3", "--n-epochs", "1", "--test", str(images)]
    words = ["--quiet", "--json", "adapt", str(images), str(tmp_path / "x.prompts"), *model, *few]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["seen"] == asdict(SeenImages("shots", 9, 30, False, "content"))
