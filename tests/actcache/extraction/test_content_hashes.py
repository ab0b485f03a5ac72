"""A store knows its images by a hash of their bytes, whatever the source, the order, the interruptions, the repairs."""

import csv
import hashlib
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from earlier_version import forget_hashes

from actcache import ActivationStore, CorruptError, SettingsError, extract, open_stores, repair, verify
from actcache.seen import CONTENT_HASH
from actcache.store import IMAGES_FILE, read_images

SMALL: dict[str, Any] = {"layers": [2], "shard_images": 16, "precision": "float32"}


def plain_hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def as_folder(images: Path, folder: Path) -> Path:
    return images


def as_renamed_copy(images: Path, folder: Path) -> Path:
    for i, file in enumerate(sorted(images.rglob("*.png"))):
        new = folder / "copy" / file.parent.name / f"{997 * i % 1009:04d}-renamed.png"
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, new)
    return folder / "copy"


def as_table(images: Path, folder: Path) -> Path:
    with open(folder / "images.csv", "w", newline="") as out:
        csv.writer(out).writerows([["path"], *([str(file)] for file in sorted(images.rglob("*.png")))])
    return folder / "images.csv"


def as_tars(images: Path, folder: Path) -> Path:
    with tarfile.open(folder / "images.tar", "w") as tar:
        for i, file in enumerate(sorted(images.rglob("*.png"))):
            tar.add(file, f"{i:05d}.png")
    return folder / "images.tar"


def as_dataset(images: Path, folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    files = [str(file) for file in sorted(images.rglob("*.png"))]
    made = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
    made.save_to_disk(str(folder / "images.hf"))
    return folder / "images.hf"


@pytest.mark.parametrize("options", [{}, {"seed": 3}, {"limit": 20, "seed": 1}], ids=str)
@pytest.mark.parametrize("source", [as_folder, as_renamed_copy, as_table, as_tars, as_dataset])
def test_the_hashes_are_those_of_the_bytes_in_stored_order(
    tmp_path: Path, tiny_model: dict[str, str], make_images: Callable[..., Path], source: Any, options: dict[str, int]
) -> None:
    images = make_images(tmp_path / "images", 40)
    found = extract(source(images, tmp_path), tmp_path / "x.acts", **tiny_model, **SMALL, **options)
    files = [file.read_bytes() for file in sorted(images.rglob("*.png"))]
    if source is as_renamed_copy:  # its listing has another order
        listed = sorted((tmp_path / "copy").rglob("*.png"), key=lambda f: str(f.relative_to(tmp_path / "copy")))
        files = [file.read_bytes() for file in listed]
    wanted = [plain_hash(files[index]) for index in found.images["source_index"].to_pylist()]
    assert found.images[CONTENT_HASH].to_pylist() == wanted
    assert CONTENT_HASH not in read_images(found.path).column_names  # images.parquet is written before images are read
    assert verify(found.path).ok


def test_an_unreadable_image_is_known_if_its_bytes_are(
    tmp_path: Path, tiny_model: dict[str, str], make_images: Callable[..., Path]
) -> None:
    images = make_images(tmp_path / "images", 18)
    broken = images / "class0" / "broken.png"
    broken.write_bytes(b"no image")
    found = extract(images, tmp_path / "x.acts", **tiny_model, **SMALL, on_error="skip")
    (row,) = [row for row in found.images.to_pylist() if row["uri"] == "class0/broken.png"]
    assert row[CONTENT_HASH] == plain_hash(b"no image")
    assert len(found.failed) == 1


def test_after_a_kill_and_with_several_workers_the_hashes_are_the_same(
    tmp_path: Path, tiny_model: dict[str, str], make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from actcache import IncompleteError

    images = make_images(tmp_path / "images", 60)
    whole = extract(images, tmp_path / "whole.acts", **tiny_model, **SMALL)
    shutil.copytree(whole.path, tmp_path / "killed.acts")  # as a killed writer leaves it
    for name in ("manifest.json", "content.bin", "commits/000001.json"):
        (tmp_path / "killed.acts" / name).unlink()
    extract(images, tmp_path / "killed.acts", **tiny_model, **SMALL)
    for rank in ("1", "0"):
        with monkeypatch.context() as patch:
            patch.setenv("RANK", rank)
            patch.setenv("WORLD_SIZE", "2")
            try:
                extract(images, tmp_path / "ranks.acts", **tiny_model, **SMALL)
            except IncompleteError:
                assert rank == "1"
    for name in ("killed.acts", "ranks.acts"):
        other = ActivationStore.open(tmp_path / name)
        assert other.store_id == whole.store_id
        assert other.images.equals(whole.images)
        assert verify(tmp_path / name).ok


def test_a_store_of_an_earlier_version_has_no_hashes_or_only_those_it_got_later(
    tmp_path: Path, tiny_model: dict[str, str], make_images: Callable[..., Path]
) -> None:
    images = make_images(tmp_path / "images", 40)
    extract(images, tmp_path / "new.acts", **tiny_model, **SMALL)
    for name, shards in (("old", None), ("mixed", [1])):
        shutil.copytree(tmp_path / "new.acts", tmp_path / f"{name}.acts")
        forget_hashes(tmp_path / f"{name}.acts", shards)
        assert verify(tmp_path / f"{name}.acts").ok
    new, old, mixed = (ActivationStore.open(tmp_path / f"{name}.acts") for name in ("new", "old", "mixed"))
    assert old.images.equals(new.images.drop_columns([CONTENT_HASH]))
    hashes = new.images[CONTENT_HASH].to_pylist()
    assert mixed.images[CONTENT_HASH].to_pylist() == [*hashes[:16], *[None] * 16, *hashes[32:]]
    extract(images, tmp_path / "other.acts", **tiny_model, **SMALL, seed=1)
    both = open_stores([old, ActivationStore.open(tmp_path / "other.acts")])
    assert both.images[CONTENT_HASH].null_count == 40


@pytest.mark.parametrize("damage", ["missing", "short", "flipped"])
def test_damaged_hashes_are_noticed_and_made_again(
    tmp_path: Path, tiny_model: dict[str, str], make_images: Callable[..., Path], damage: str
) -> None:
    images = make_images(tmp_path / "images", 20)
    wanted = extract(images, tmp_path / "x.acts", **tiny_model, **SMALL).images
    file = tmp_path / "x.acts" / "content.bin"
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "short":
        file.write_bytes(data[:-1])
    else:
        data[5] ^= 1
        file.write_bytes(data)
    if damage != "flipped":
        with pytest.raises(CorruptError, match=r"content\.bin .*verify .* --repair"):
            _ = ActivationStore.open(tmp_path / "x.acts").images
    assert [problem.file for problem in verify(tmp_path / "x.acts").problems] == ["content.bin"]
    assert repair(tmp_path / "x.acts").ok
    assert ActivationStore.open(tmp_path / "x.acts").images.equals(wanted)


def test_a_column_of_that_name_is_refused(tmp_path: Path, make_images: Callable[..., Path]) -> None:
    from actcache import ImageSourceError, ImageTable

    images = make_images(tmp_path / "images", 2)
    (tmp_path / "t.csv").write_text(f"path,{CONTENT_HASH}\n{next(images.rglob('*.png'))},x\n")
    with pytest.raises((ImageSourceError, SettingsError), match="reserved"):
        ImageTable(tmp_path / "t.csv").plan()
    assert IMAGES_FILE == "images.parquet"
