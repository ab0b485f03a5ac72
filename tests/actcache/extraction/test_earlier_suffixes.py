"""Stores of folders whose images end in suffixes that an earlier version did not take are resumed and repaired."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import actcache.sources.folder as folders
from actcache import ActivationStore, ExtractConfig, SettingsError, extract, repair, verify
from actcache.extraction.plan import plan_extraction

OPTIONS: dict[str, Any] = {"layers": [1], "shard_images": 16, "precision": "float32", "device": "cpu"}


@pytest.fixture
def mixed(tmp_path: Path, make_images: Callable[..., Path]) -> Path:
    """40 images that every version takes, and six that only this one does."""
    images = make_images(tmp_path / "images", 40)
    for i, suffix in enumerate((".gif", ".bmp", ".tif", ".jfif", ".ppm", ".JPE")):
        kind = "JPEG" if suffix in (".jfif", ".JPE") else None
        Image.new("RGB", (24, 24), (40 * i, 9, 200)).save(images / f"class{i % 3}" / f"new{i}{suffix}", format=kind)
    return images


def extract_as_before(images: Path, store: Path, model: dict[str, str], patch: pytest.MonkeyPatch) -> ActivationStore:
    """As a version did that knew four suffixes."""
    with patch.context() as inside:
        real = folders.list_files
        inside.setattr(folders, "list_files", lambda path, suffixes: real(path, folders.EARLIER_SUFFIXES))
        return extract(images, store, **model, **OPTIONS)


def contents(store: Path) -> dict[str, bytes]:
    return {str(file.relative_to(store)): file.read_bytes() for file in store.rglob("*") if file.is_file()}


def test_an_older_store_is_complete_resumed_and_repaired(
    tmp_path: Path, mixed: Path, tiny_model: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "x.acts"
    before = extract_as_before(mixed, store, tiny_model, monkeypatch)
    assert before.n_images == 40
    whole = contents(store)
    assert extract(mixed, store, **tiny_model, **OPTIONS).store_id == before.store_id
    assert contents(store) == whole
    shard = next(iter(sorted((store / "activations.zarr").rglob("patches/c/1/0/0"))))
    shard.write_bytes(shard.read_bytes()[:-5])
    assert repair(store, device="cpu").ok
    assert shard.read_bytes() == whole[str(shard.relative_to(store))]
    shard.unlink()
    (store / "commits" / "000001.json").unlink()
    (store / "manifest.json").unlink()
    resumed = extract(mixed, store, **tiny_model, **OPTIONS)
    assert resumed.store_id == before.store_id
    assert verify(store).ok
    assert shard.read_bytes() == whole[str(shard.relative_to(store))]


def test_a_new_store_and_one_that_is_replaced_hold_all_images(
    tmp_path: Path, mixed: Path, tiny_model: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    extract_as_before(mixed, tmp_path / "x.acts", tiny_model, monkeypatch)
    assert extract(mixed, tmp_path / "new.acts", **tiny_model, **OPTIONS).n_images == 46
    assert extract(mixed, tmp_path / "x.acts", **tiny_model, **OPTIONS, overwrite=True).n_images == 46


def test_the_plan_says_what_the_older_store_left_out(
    tmp_path: Path, mixed: Path, tiny_model: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    extract_as_before(mixed, tmp_path / "x.acts", tiny_model, monkeypatch)
    config = ExtractConfig(**tiny_model, layers=[1], shard_images=16, precision="float32")
    plan = plan_extraction(mixed, tmp_path / "x.acts", config, "cpu")
    assert sum(plan.images.left_out.values()) == 6
    assert not plan_extraction(mixed, tmp_path / "new.acts", config, "cpu").images.left_out


def test_a_folder_that_has_changed_is_still_refused(
    tmp_path: Path, mixed: Path, tiny_model: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    extract_as_before(mixed, tmp_path / "x.acts", tiny_model, monkeypatch)
    shutil.copy(next(mixed.rglob("*.png")), mixed / "class0" / "another.png")
    with pytest.raises(SettingsError):
        extract(mixed, tmp_path / "x.acts", **tiny_model, **OPTIONS)
