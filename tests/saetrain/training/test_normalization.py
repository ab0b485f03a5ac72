"""The mean and the scale of an SAE's input come from its training images alone, whatever the others hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_store import make_plan, make_settings, make_values, write_store

from actcache import ActivationStore, HookPoint, open_stores
from actcache.artifacts import ARTIFACT_FILE, encode_json
from actcache.artifacts.opening import Parent, artifact_id
from actcache.store import ShardWriter, StoreSettings, begin_store, seal_store, statistics_of_images
from saetrain import SAEConfig, TrainConfig, train
from saetrain.data import split_wanted

SAE = SAEConfig(n_latents=16, k=2)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Stores of 40, 70 and 150 images in shards of 32, in which some images failed."""
    folder = tmp_path_factory.mktemp("small")
    paths = []
    for n in (40, 70, 150):
        paths.append(folder / f"{n}.acts")
        fields = make_settings(n, rows_id=f"{n:016d}", codec="zstd" if n == 70 else "raw")
        write_store(paths[-1], fields, failed={3: "broken", n - 1: "broken"})
    return paths


@settings(max_examples=40, deadline=None)
@given(data=st.data(), tokens=st.sampled_from(["all", "patch", "cls"]))
def test_statistics_of_any_images_are_those_of_their_rows(small: list[Path], data: Any, tokens: Any) -> None:
    group = open_stores(list(small))
    share = data.draw(st.sampled_from([0.02, 0.5, 0.97, 1.0]))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    images = np.flatnonzero(rng.random(group.n_images) < share)
    first, last = sorted(data.draw(st.tuples(st.integers(0, 260), st.integers(0, 260))))
    images = images[(images < first) | (images >= last)]  # whole shards and parts of shards are missing
    found = statistics_of_images(group, None, tokens, images)
    x = group.read(images=images[group.valid[images]], tokens=tokens).astype(np.float64).reshape(-1, 4)
    assert found.count == len(x)
    np.testing.assert_allclose(found.sum, x.sum(0), atol=1e-9)
    np.testing.assert_allclose(found.sum_squares, np.square(x).sum(0), atol=1e-9)


@pytest.mark.parametrize("unwanted", [0.0, 1.0, 3e4])
def test_huge_values_elsewhere_leave_no_trace(tmp_path: Path, unwanted: float) -> None:
    """Taking 1e9 from a sum of 1e9 + 1e-6 would leave rounding errors."""
    fields = make_settings(100)
    values = make_values(fields)["blocks.3.hook_resid_post"]
    values[:] = np.float16(0.001) * (1 + np.arange(values.size).reshape(values.shape) % 7)
    values[95:] = unwanted
    _write(tmp_path / "y.acts", fields, values)
    found = statistics_of_images(open_stores(tmp_path / "y.acts"), None, "all", np.arange(95))
    x = values[:95].astype(np.float64).reshape(-1, 4)
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-9)
    np.testing.assert_allclose(found.variance, x.var(0), rtol=1e-6)


def _write(path: Path, fields: dict[str, Any], values: Any) -> None:
    chosen = StoreSettings.from_json(fields)
    plan = make_plan(fields["n_images"])
    artifact = begin_store(path, plan=plan, images_path=path.parent / "images", settings=chosen, provenance={})
    for shard in range(chosen.layout.n_shards):
        with ShardWriter(artifact, shard) as writer:
            for block in range(chosen.layout.n_blocks(shard)):
                images = chosen.layout.block_range(shard, block)
                part = values[images.start : images.stop]
                patches = part[:, 1:].reshape(len(part), *chosen.layout.grid, -1).transpose(1, 0, 2, 3)
                writer.write(HookPoint(3), block, patches, part[:, 0])
            writer.commit({})
    seal_store(path)


@pytest.mark.parametrize("tokens", ["all", "patch", "cls"])
@pytest.mark.parametrize("where", [None, "bytes > 75", "bytes < 40 or bytes > 80"])
@pytest.mark.parametrize("several", [False, True])
def test_mean_and_scale_are_those_of_the_training_rows(
    tmp_path: Path, make_store: Callable[..., Path], tokens: Any, where: str | None, several: bool
) -> None:
    stores = [make_store(tmp_path / "a.acts", n_images=150, rows_id="a", dtype="float32")]
    if several:
        stores.append(make_store(tmp_path / "b.acts", n_images=90, rows_id="b", dtype="float32", offset=-5.0, seed=9))
    config = TrainConfig(n_steps=1, batch_size=16, tokens=tokens, where=where)
    run = train([str(path) for path in stores], tmp_path / "run", sae=SAE, config=config, device="cpu")
    group = open_stores([ActivationStore.open(path) for path in stores])
    images, held_out = split_wanted(group, where)
    assert len(images) + len(held_out) <= group.valid.sum()
    x = group.read(images=images, tokens=tokens).astype(np.float64).reshape(-1, group.layout.d_model)
    sae = run.sae()
    np.testing.assert_allclose(sae.mean.numpy(), x.mean(0), rtol=1e-5, atol=1e-6)
    assert float(sae.scale) == pytest.approx((x.shape[1] / x.var(0).sum()) ** 0.5, rel=1e-5)
    assert run.artifact.settings["normalized_from"] == "training images"


def test_a_run_that_an_earlier_version_began_goes_on_with_the_statistics_of_the_whole_store(
    tmp_path: Path, planted_store: Path
) -> None:
    config = TrainConfig(n_steps=2, batch_size=64)
    new = train(planted_store, tmp_path / "new", sae=SAE, config=config, device="cpu")
    (tmp_path / "old").mkdir()
    body = json.loads((new.path / ARTIFACT_FILE).read_text())
    del body["settings"]["normalized_from"]
    parents = {name: Parent(parent["id"], parent["path"]) for name, parent in body["parents"].items()}
    body["id"] = artifact_id("run", body["settings"], parents)
    (tmp_path / "old" / ARTIFACT_FILE).write_bytes(encode_json(body))
    (tmp_path / "old" / "commits").mkdir()
    old = train(planted_store, tmp_path / "old", sae=SAE, config=config, device="cpu")
    assert old.run_id == body["id"] != new.run_id
    x = ActivationStore.open(planted_store)
    whole = x.statistics(None)
    np.testing.assert_allclose(old.sae().mean.numpy(), whole.mean, rtol=1e-5)
    assert not np.allclose(old.sae().mean.numpy(), new.sae().mean.numpy(), rtol=1e-5)
    files = {file: file.read_bytes() for file in old.path.rglob("*") if file.is_file()}
    assert train(planted_store, tmp_path / "old", sae=SAE, config=config, device="cpu").run_id == old.run_id
    assert {file: file.read_bytes() for file in old.path.rglob("*") if file.is_file()} == files
    again = train(planted_store, tmp_path / "old", sae=SAE, config=config, device="cpu", overwrite=True)
    assert again.run_id == new.run_id
