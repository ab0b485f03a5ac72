"""The adapted model's store: the same rows under another identity, prompt tokens apart, verify and repair."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_clip import checkpoint_tensors, image_forward
from safetensors.torch import load_file

from actcache import (
    ActivationStore,
    HookPoint,
    ModelError,
    NonFiniteError,
    ParentMismatchError,
    SettingsError,
    estimate,
    extract,
    open_stores,
    repair,
    verify,
)
from actcache.artifacts import begin_artifact, seal_artifact
from actcache.models import load_clip
from actcache.prompts import open_prompts, open_towers
from actcache.prompts.artifact import write_prompts
from actcache.sources import decode_image

TINY = {"width": 32, "text": 16, "embed": 16}


def save_checkpoint(path: Path, method: str, n: int = 3, depth: int = 2) -> Path:
    torch.save({"state_dict": checkpoint_tensors(method, **TINY, n=n, depth=depth), "epoch": 1}, path)
    return path


def save_artifact(path: Path, model_id: str, method: str = "maple") -> Path:
    """Write an artifact as `adapt` does."""
    settings = {"method": method, "model_id": model_id, "template": "a photo of a {}.", "position": "end"}
    artifact = begin_artifact(
        path, "prompts", settings=settings, parents={}, provenance={}, prepare=lambda folder: None
    )
    tensors = checkpoint_tensors(method, **TINY, n=3, depth=2)
    write_prompts(artifact, {name: value for name, value in tensors.items() if "token_" not in name})
    seal_artifact(path)
    return path


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path, tiny_model: dict[str, str]) -> Path:
    """Like tiny_store, but by a MaPLe model with three prompts up to block 1. Read-only."""
    folder = tmp_path_factory.mktemp("adapted")
    save_checkpoint(folder / "model.pth.tar-1", "maple")
    options: dict[str, Any] = {"layers": [2, 0], "shard_images": 16, "precision": "float32"}
    extract(tiny_images, folder / "maple.acts", **tiny_model, **options, prompts=folder / "model.pth.tar-1")
    return folder / "maple.acts"


def test_the_two_stores_join_row_by_row(adapted: Path, tiny_store: Path) -> None:
    mine, plain = ActivationStore.open(adapted), ActivationStore.open(tiny_store)
    assert mine.model_id == plain.model_id
    assert mine.store_id != plain.store_id
    assert mine.artifact.settings["rows_id"] == plain.artifact.settings["rows_id"]
    assert mine.images.equals(plain.images)
    assert mine.n_tokens == plain.n_tokens == 10
    assert mine.artifact.settings["prompts"]["method"] == "maple"
    assert "prompts" not in plain.artifact.settings
    assert mine.read(2).shape == plain.read(2).shape
    assert not np.array_equal(mine.read(0), plain.read(0))


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_every_token_is_that_of_the_formulas(
    adapted: Path, tiny_images: Path, tiny_model: dict[str, str], tmp_path: Path, codec: str
) -> None:
    if codec != "raw":
        options: dict[str, Any] = {"layers": [2, 0], "shard_images": 32, "precision": "float32", "codec": codec}
        prompts = adapted.parent / "model.pth.tar-1"
        adapted = tmp_path / "other.acts"
        extract(tiny_images, adapted, **tiny_model, **options, prompts=prompts)
    store, clip = ActivationStore.open(adapted), load_clip(**tiny_model)
    pixels = torch.stack([clip.transform(decode_image(tiny_images / uri)) for uri in store.images["uri"].to_pylist()])
    found = open_prompts(Path(adapted.parent if codec == "raw" else prompts.parent) / "model.pth.tar-1", clip)
    with torch.no_grad():
        streams, _ = image_forward(dict(clip.module.state_dict()), pixels, found.vision, head_width=16, quick=False)
    some = [70, 3, 16, 15, 3]
    for layer in (0, 2):
        wanted = streams[layer].numpy()
        np.testing.assert_allclose(store.read(layer), wanted[:, :10], rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(store.read_extra(layer), wanted[:, 10:], rtol=2e-3, atol=2e-3)
        np.testing.assert_array_equal(store.read_extra(layer, images=some), store.read_extra(layer)[some])
        statistics = store.statistics(layer)
        assert statistics.count == 75 * 10  # prompts are counted nowhere
        np.testing.assert_allclose(statistics.mean, store.read(layer).reshape(-1, 32).mean(0, np.float64), atol=1e-9)


def test_later_blocks_run_from_what_is_stored(adapted: Path, tiny_model: dict[str, str]) -> None:
    store = ActivationStore.open(adapted)
    towers = open_towers(store.artifact, device="cpu")
    assert (towers.vision.n_extra, towers.prompts is not None) == (3, True)
    tokens = torch.from_numpy(store.read(0)).float()
    with pytest.raises(SettingsError, match="10 tokens and 3 prompts, got 10 in total"):
        towers.vision.run_blocks(tokens, 1, 3)
    with torch.no_grad():
        x = torch.cat([tokens, torch.from_numpy(store.read_extra(0)).float()], 1)
        later = towers.vision.run_blocks(x, 1, 3)
    np.testing.assert_allclose(later[:, :10].numpy(), store.read(2), rtol=5e-3, atol=5e-3)
    assert towers.embed_classes(["cat", "dog"], ["{}"]).shape == (2, 16)


def test_several_stores_give_their_prompts_together(
    adapted: Path, tmp_path: Path, make_images: Callable[..., Path], tiny_model: dict[str, str], tiny_store: Path
) -> None:
    more = make_images(tmp_path / "more", 20, seed=5)
    extract(more, tmp_path / "more.acts", **tiny_model, layers=[2, 0], shard_images=16, precision="float32",
            prompts=adapted.parent / "model.pth.tar-1")  # fmt: skip
    group = open_stores([adapted, tmp_path / "more.acts"])
    parts = [store.read_extra(2) for store in group.stores]
    np.testing.assert_array_equal(group.read_extra(2), np.concatenate(parts))
    assert ActivationStore.open(tiny_store).read_extra(2).shape == (75, 0, 32)


def test_streams_of_different_prompts_are_refused_in_one_line(
    adapted: Path, tiny_store: Path, tiny_images: Path, tiny_model: dict[str, str], tmp_path: Path
) -> None:
    options: dict[str, Any] = {**tiny_model, "layers": [2, 0], "shard_images": 16, "precision": "float32"}
    other = save_checkpoint(tmp_path / "model.pth.tar-1", "maple", depth=1)  # as many prompts with other values
    extract(tiny_images, tmp_path / "other.acts", **options, prompts=other)
    texts = save_checkpoint(tmp_path / "model.pth.tar-2", "coop")
    extract(tiny_images, tmp_path / "coop.acts", **options, prompts=texts)
    for stores, words in (
        ([adapted, tiny_store], r"maple\.acts was extracted with 3 prompts of maple \(\w{8}\) and .* with no prompts"),
        ([adapted, tmp_path / "other.acts"], r"3 prompts of maple .* with 3 prompts of maple .* one store at a time"),
    ):
        group = open_stores(stores)
        assert group.read(2).shape == (150, 10, 32)
        for read in (group.read_stream, group.read_extra):
            with pytest.raises(ParentMismatchError, match=words):
                read(2)
    plain = open_stores([tiny_store, tmp_path / "coop.acts"])  # prompts of texts leave the stream as it is
    assert plain.read_stream(2).shape == (150, 10, 32)


def test_extra_is_verified_and_repaired(adapted: Path, tiny_model: dict[str, str]) -> None:
    store = Path(shutil.copytree(adapted, adapted.parent / "copy.acts"))  # beside it: paths still lead somewhere
    shard = store / "activations.zarr" / "blocks.2.hook_resid_post" / "extra" / "c" / "1" / "0" / "0"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    assert verify(store).shards == (1,)
    other = save_checkpoint(adapted.parent / "other.pth.tar-1", "maple", depth=1)
    with pytest.raises(SettingsError, match=r"other.pth.tar-1 does not hold the prompts of"):
        repair(store, prompts=str(other))
    assert repair(store).ok
    assert shard.read_bytes() == whole


def test_text_prompts_leave_every_byte_and_say_so(
    tmp_path: Path, tiny_store: Path, tiny_images: Path, tiny_model: dict[str, str]
) -> None:
    save_checkpoint(tmp_path / "model.pth.tar-1", "coop", n=4)
    options: dict[str, Any] = {"layers": [2, 0], "shard_images": 16, "precision": "float32"}
    store = extract(tiny_images, tmp_path / "coop.acts", **tiny_model, **options, prompts=tmp_path / "model.pth.tar-1")
    plain = ActivationStore.open(tiny_store)
    assert store.store_id != plain.store_id
    assert store.artifact.settings["prompts"] | {"hash": ""} == {
        "method": "coop", "template": "a photo of a {}.", "position": "end", "n_vision": 0, "hash": "",
    }  # fmt: skip
    assert store.layout.n_extra == 0
    np.testing.assert_array_equal(store.read(2), plain.read(2))


def test_an_artifact_of_prompts_is_read_for_its_model_only(
    tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str]
) -> None:
    clip = load_clip(**tiny_model)
    prompts = save_artifact(tmp_path / "x.prompts", clip.model_id)
    found = open_prompts(prompts, clip)
    assert (found.method, found.n_text, found.n_vision) == ("maple", 3, 3)
    assert set(load_file(prompts / "prompts.safetensors")) == set(found.tensors)
    assert verify(prompts).ok
    plan = estimate(tiny_images, tmp_path / "x.acts", **tiny_model, layers=[HookPoint(1).layer], prompts=prompts)
    assert plan.settings.layout.n_extra == 3
    assert plan.n_bytes > 75 * 13 * 32 * 2  # prompts need room too
    other = {"model": tiny_model["model"], "pretrained": "random:5"}
    with pytest.raises(ParentMismatchError, match="adapts model"):
        extract(tiny_images, tmp_path / "x.acts", **other, layers=[1], prompts=prompts)
    wide = checkpoint_tensors("vpt", width=768, text=512, embed=512, n=2, depth=1)
    torch.save({"state_dict": wide}, tmp_path / "b")
    with pytest.raises(ModelError, match="768 wide"):
        extract(tiny_images, tmp_path / "x.acts", **tiny_model, layers=[1], prompts=tmp_path / "b")
    assert not (tmp_path / "x.acts").exists()


def test_a_prompt_that_does_not_fit_the_dtype_is_refused(
    tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str]
) -> None:
    state = {"image_encoder.VPT": torch.zeros(1, 32),
             "image_encoder.transformer.resblocks.1.VPT_shallow": torch.full((1, 32), 1e6)}  # fmt: skip
    torch.save({"state_dict": state}, tmp_path / "model.pth.tar-1")
    with pytest.raises(NonFiniteError, match="too large for float16"):
        extract(tiny_images, tmp_path / "x.acts", **tiny_model, layers=[1], prompts=tmp_path / "model.pth.tar-1")
