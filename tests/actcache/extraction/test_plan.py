"""What is known before extraction: bytes, space, time; and what to do when the source has grown."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from actcache import ActivationStore, SettingsError, StorageError, estimate, extract, open_stores

Usage = namedtuple("Usage", "total used free")


def test_a_dry_run_counts_what_extraction_then_writes(
    tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str]
) -> None:
    path = tmp_path / "x.acts"
    plan = estimate(tiny_images, path, **tiny_model, layers=[0, 2], sites=["resid_post", "mlp_out"], shard_images=16)
    assert not path.exists()
    store = extract(tiny_images, path, **tiny_model, layers=[0, 2], sites=["resid_post", "mlp_out"], shard_images=16)
    written = sum(f.stat().st_size for f in (path / "activations.zarr").rglob("c/**/*") if f.is_file())
    assert plan.n_bytes == plan.missing_bytes == written
    assert (plan.n_images, plan.n_tokens) == (75, 75 * store.n_tokens)
    assert (plan.n_shards, plan.n_missing_shards) == (5, 5)
    assert plan.fits
    assert plan.seconds == pytest.approx(75 / plan.images_per_s)
    again = estimate(tiny_images, path, **tiny_model, layers=[0, 2], sites=["resid_post", "mlp_out"], shard_images=16)
    assert (again.n_missing_shards, again.missing_bytes, again.seconds) == (0, 0, 0)


def test_extraction_does_not_begin_what_the_disk_cannot_hold(
    tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6, 1000))
    plan = estimate(tiny_images, tmp_path / "x.acts", **tiny_model, layers=[0])
    assert not plan.fits
    with pytest.raises(StorageError, match=r"needs .* GB more, but the disk has only 0\.00 GB free"):
        extract(tiny_images, tmp_path / "x.acts", **tiny_model, layers=[0])
    monkeypatch.undo()
    assert extract(tiny_images, tmp_path / "x.acts", **tiny_model, layers=[0]).n_images == 75


def test_a_source_that_grew_goes_into_a_further_store(
    tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str]
) -> None:
    images = Path(shutil.copytree(tiny_images, tmp_path / "images"))
    moved = sorted((images / "class1").iterdir())[:7]
    for file in moved:
        file.rename(tmp_path / file.name)
    first = extract(images, tmp_path / "a.acts", **tiny_model, layers=[0])
    for file in moved:
        (tmp_path / file.name).rename(file)
    with pytest.raises(SettingsError, match=r"has 7 images that .*a\.acts.*--not-in .*a\.acts"):
        extract(images, tmp_path / "a.acts", **tiny_model, layers=[0])
    second = extract(images, tmp_path / "b.acts", **tiny_model, layers=[0], not_in=[tmp_path / "a.acts"])
    assert second.n_images == 7
    assert set(second.images["uri"].to_pylist()) == {f"class1/{file.name}" for file in moved}
    assert first.model_id == second.model_id
    group = open_stores([tmp_path / "a.acts", tmp_path / "b.acts"])
    assert group.n_images == 75
    whole = ActivationStore.open(extract(images, tmp_path / "c.acts", **tiny_model, layers=[0]).path)
    assert {*first.images["uri"].to_pylist(), *second.images["uri"].to_pylist()} == {*whole.images["uri"].to_pylist()}
