"""`extract` on folders as people have them: what it says before the work, what it skips, and when nothing is left."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import cli
from actcache import ActivationStore, ImageSourceError, PromptConfig, SettingsError, adapt, extract, repair


def run(*arguments: str | Path, model: dict[str, str]) -> Result:
    named = ["--model", model["model"], "--pretrained", model["pretrained"]]
    return CliRunner().invoke(cli.app, ["extract", *map(str, arguments), *named, "--layer", "0"])


def paint(folder: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 30), (i * 40 % 256, 100, 200)).save(folder / name, "PNG")
    return folder


def test_classes_and_what_is_left_out_are_said_before_the_work_and_in_json(
    tmp_path: Path, tiny_model: dict[str, str]
) -> None:
    images = paint(tmp_path / "images", *(f"train/class{i:02d}/1.png" for i in range(12)), "val/class00/2.png")
    (images / "readme.txt").write_text("x")
    (images / "train" / "@eaDir").mkdir()
    (images / "train" / "class00" / "bad.jpg").write_text("x")
    done = run(images, tmp_path / "x.acts", "--json", "--on-error", "skip", model=tiny_model)
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["classes"] == [f"class{i:02d}" for i in range(12)]
    assert facts["left_out"] == {".txt files": 1, "of the operating system": 1}
    assert facts["n_skipped"] == 1
    assert facts["skipped"][0]["reason"].startswith("train/class00/bad.jpg cannot be read")
    assert "12 classes: class00, class01" in done.stderr
    assert "left out: 1 .txt files, 1 of the operating system" in done.stderr
    store = ActivationStore.open(tmp_path / "x.acts")
    assert sorted(set(store.images["split"].to_pylist())) == ["train", "val"]
    quiet = run(images, tmp_path / "x.acts", "--json", "--quiet", "--dry-run", model=tiny_model)
    assert quiet.exit_code == 0, repr(quiet.exception)
    assert json.loads(quiet.stdout)["classes"] == facts["classes"]
    assert quiet.stderr == ""


@pytest.mark.parametrize("shard_images", [16, 32])
@pytest.mark.parametrize("n_images", [1, 20])
def test_a_source_of_bad_images_is_an_error_and_leaves_nothing(
    tmp_path: Path, tiny_model: dict[str, str], shard_images: int, n_images: int
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(n_images):
        (images / f"{i}.jpg").write_bytes(b"\xff\xd8\xff not a JPEG")
    arguments = (images, tmp_path / "x.acts", "--on-error", "skip", "--shard-images", str(shard_images))
    for _ in range(2):
        done = run(*arguments, model=tiny_model)
        assert done.exit_code == 1
        assert f"None of the {n_images} images of" in done.stderr.replace("\n", " ")
        assert "nothing was stored" in done.stderr.replace("\n", " ")
        assert not (tmp_path / "x.acts").exists()
    paint(images, "0.jpg")  # the same command goes on once an image can be read
    assert run(*arguments, model=tiny_model).exit_code == 0


def test_every_kind_of_bad_file_is_skipped_and_the_rest_is_stored(tmp_path: Path, tiny_model: dict[str, str]) -> None:
    import os

    images = paint(tmp_path / "images", "a/1.png", "b/2.png", "b/strip.png")
    Image.new("RGB", (2, 20_000)).save(images / "b" / "strip.png")
    bad = {
        "eps.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "float.tif": b"",
        "dark.png": b"",
        "bomb.bmp": b"BM" + (54).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little")
        + (40).to_bytes(4, "little") + (60_000).to_bytes(4, "little") * 2 + b"\1\0\x18\0" + bytes(24),
        "empty.gif": b"",
        "cut.avif": b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miaf",
    }  # fmt: skip
    for name, data in bad.items():
        (images / "a" / name).write_bytes(data)
    Image.new("F", (9, 9), 0.5).save(images / "a" / "float.tif")
    Image.new("I;16", (9, 9), 200).save(images / "a" / "dark.png")
    os.mkfifo(images / "a" / "pipe.png")
    store = extract(images, tmp_path / "x.acts", **tiny_model, layers=[0], on_error="skip")
    uris = store.images["uri"].to_pylist()
    assert sorted(uris[i] for i in store.failed) == sorted(f"a/{name}" for name in bad)
    assert len(uris) == len(bad) + 3
    with pytest.raises(ImageSourceError, match="--on-error skip"):
        extract(images, tmp_path / "y.acts", **tiny_model, layers=[0])


def test_the_limit_of_pixels_is_a_flag_that_a_repair_knows(tmp_path: Path, tiny_model: dict[str, str]) -> None:
    images = paint(tmp_path / "images", "1.png", "2.png")
    done = run(images, tmp_path / "x.acts", "--max-pixels", "899", model=tiny_model)
    assert done.exit_code == 1
    assert "30 x 30 pixels, and the limit is 899" in " ".join(done.stderr.split())
    assert run(images, tmp_path / "y.acts", "--max-pixels", "900", model=tiny_model).exit_code == 0
    with pytest.raises(SettingsError, match="--max-pixels must be at least 1, got 0"):
        extract(images, tmp_path / "z.acts", **tiny_model, layers=[0], max_pixels=0)
    store = ActivationStore.open(tmp_path / "y.acts")
    assert store.artifact.provenance["max_pixels"] == 900


@pytest.mark.parametrize("options", [{}, {"class_level": 1}, {"class_level": -1}, {"class_names": "names.csv"}])
def test_a_repair_restores_the_classes_that_were_chosen(
    tmp_path: Path, tiny_model: dict[str, str], options: dict[str, object]
) -> None:
    images = paint(tmp_path / "images", "train/cat/1.png", "train/dog/2.png", "test/cat/old/3.png")
    if "class_names" in options:
        (tmp_path / "names.csv").write_text("cat,a tabby\n")
        options = {"class_names": tmp_path / "names.csv"}
    store = extract(images, tmp_path / "x.acts", **tiny_model, layers=[0], **options)  # type: ignore[arg-type]
    before = store.images
    (tmp_path / "x.acts" / "images.parquet").write_bytes(b"x")
    assert repair(tmp_path / "x.acts").ok
    assert ActivationStore.open(tmp_path / "x.acts").images.equals(before)
    if "class_names" in options:
        assert sorted(set(before["label_name"].to_pylist())) == ["a tabby", "dog"]


def test_shared_texts_are_warned_about_and_a_file_tells_the_classes_apart(
    tmp_path: Path, tiny_model: dict[str, str]
) -> None:
    images = paint(tmp_path / "images", "n02012849_crane/1.png", "n03126707_crane/2.png", "n02123045_tabby/3.png")
    done = run(images, tmp_path / "x.acts", model=tiny_model)
    assert done.exit_code == 0
    assert "n02012849_crane and n03126707_crane have the same text, 'crane'" in " ".join(done.stderr.split())
    (tmp_path / "names.txt").write_text("n02012849_crane crane (bird)\nn03126707_crane crane (machine)\n")
    arguments = (images, "--class-names", tmp_path / "names.txt", "--json")
    done = run(*arguments, tmp_path / "y.acts", model=tiny_model)
    assert json.loads(done.stdout)["classes"] == ["crane (bird)", "crane (machine)", "n02123045_tabby"]
    assert "same text" not in done.stderr
    stores = [ActivationStore.open(tmp_path / name) for name in ("x.acts", "y.acts")]
    assert stores[0].images["label"].equals(stores[1].images["label"])
    assert stores[0].store_id == stores[1].store_id
    done = run(*arguments, tmp_path / "x.acts", model=tiny_model)
    assert done.exit_code == 1
    assert "stored with other names of classes" in " ".join(done.stderr.split())


def test_adapt_takes_the_level_and_the_names_too(
    tmp_path: Path, make_images: Callable[..., Path], tiny_model: dict[str, str]
) -> None:
    for split in ("train", "val"):
        make_images(tmp_path / "images" / split, 8, n_classes=2)
    (tmp_path / "names.csv").write_text("class0,red\nclass1,blue\n")
    quick = {"method": "coop", "shots": 2, "n_epochs": 1, "n_prompts": 2}
    plain = adapt(tmp_path / "images", tmp_path / "a.prompts", **tiny_model, config=PromptConfig(**quick))  # type: ignore[arg-type]
    assert plain.artifact.settings["classes"] == ["class0", "class1"]
    named = PromptConfig(**quick, class_names=tmp_path / "names.csv", class_level=2)  # type: ignore[arg-type]
    other = adapt(tmp_path / "images", tmp_path / "b.prompts", **tiny_model, config=named)
    assert other.artifact.settings["classes"] == ["blue", "red"]
    assert "class_names" not in other.artifact.settings["config"]
