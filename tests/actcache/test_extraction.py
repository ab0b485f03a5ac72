"""extract(): what is stored is what the model computes, in stored order; interrupted runs end as if they were not."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from numpy.typing import NDArray

from actcache import (
    ActivationStore,
    CorruptError,
    ImageSourceError,
    IncompleteError,
    NonFiniteError,
    SettingsError,
    decode_image,
    extract,
    load_vision_tower,
    verify,
)

TOKENS = {"all": slice(None), "cls": slice(0, 1), "patch": slice(1, None)}


@torch.no_grad()
def plain_forward(images: Path, uris: list[str], model: dict[str, str], layer: int) -> NDArray[np.float32]:
    """[I, T, D] by open_clip's own forward_intermediates, float32, the batches cut as extraction cuts them."""
    tower = load_vision_tower(**model, precision="float32", device="cpu")
    parts = []
    for first in range(0, len(uris), 16):
        x = torch.stack([tower.transform(decode_image(images / uri)) for uri in uris[first : first + 16]])
        out = tower.visual.forward_intermediates(
            x, indices=[layer], output_fmt="NLC", output_extra_tokens=True, intermediates_only=True, stop_early=True
        )
        parts.append(torch.cat([out["image_intermediates_prefix"][0], out["image_intermediates"][0]], 1))
    return torch.cat(parts).numpy()


@pytest.fixture(scope="module")
def oracle(tiny_store: Path, tiny_images: Path, tiny_model: dict[str, str]) -> dict[int, NDArray[np.float16]]:
    uris = ActivationStore.open(tiny_store).images["uri"].to_pylist()
    return {layer: plain_forward(tiny_images, uris, tiny_model, layer).astype(np.float16) for layer in (0, 2)}


@pytest.mark.parametrize("tokens", ["all", "patch", "cls"])
@pytest.mark.parametrize("layer", [0, 2])
def test_every_read_equals_a_plain_forward(
    tiny_store: Path, oracle: dict[int, NDArray[np.float16]], layer: int, tokens: str
) -> None:
    store = ActivationStore.open(tiny_store)
    expected = oracle[layer][:, TOKENS[tokens]]
    np.testing.assert_array_equal(store.read(layer, tokens=tokens), expected)  # type: ignore[arg-type]
    order = np.random.default_rng(0).permutation(75)
    np.testing.assert_array_equal(store.read(layer, images=order, tokens=tokens), expected[order])  # type: ignore[arg-type]
    np.testing.assert_array_equal(store.read(layer, images=slice(13, 50, 3), check=True), oracle[layer][13:50:3])
    out = np.empty_like(expected[5:40])
    assert store.read(layer, images=slice(5, 40), tokens=tokens, out=out) is out  # type: ignore[arg-type]
    np.testing.assert_array_equal(out, expected[5:40])


def test_statistics_are_those_of_the_stored_values(tiny_store: Path, oracle: dict[int, NDArray[np.float16]]) -> None:
    store = ActivationStore.open(tiny_store)
    for tokens, part in TOKENS.items():
        rows = oracle[2][:, part].reshape(-1, 32).astype(np.float64)
        statistics = store.statistics(2, tokens)  # type: ignore[arg-type]
        assert statistics.count == len(rows)
        np.testing.assert_allclose(statistics.mean, rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(statistics.variance, rows.var(0), rtol=1e-9)
        assert statistics.absmax == abs(rows).max()


def test_a_plain_zarr_reader_gets_the_same_values(tiny_store: Path, oracle: dict[int, NDArray[np.float16]]) -> None:
    import zarr

    group = zarr.open_group(tiny_store / "activations.zarr", mode="r")
    for layer in (0, 2):
        np.testing.assert_array_equal(group[f"blocks.{layer}.hook_resid_post/patches"][:], oracle[layer][:, 1:])
        np.testing.assert_array_equal(group[f"blocks.{layer}.hook_resid_post/cls"][:], oracle[layer][:, 0])
    assert group["blocks.0.hook_resid_post/patches"].metadata.dimension_names == ("image", "patch", "channel")


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_compression_changes_bytes_not_values(
    tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str], oracle: dict[int, NDArray[np.float16]], codec: str
) -> None:
    import zarr

    store = extract(
        tiny_images, tmp_path / "x.acts", **tiny_model, layers=[2], codec=codec, shard_images=32, precision="float32"
    )
    np.testing.assert_array_equal(store.read(images=[3, 70, 31, 32]), oracle[2][[3, 70, 31, 32]])
    np.testing.assert_array_equal(store.read(tokens="cls"), oracle[2][:, :1])
    array = zarr.open_array(tmp_path / "x.acts" / "activations.zarr" / "blocks.2.hook_resid_post" / "patches", mode="r")
    np.testing.assert_array_equal(array[:], oracle[2][:, 1:])
    assert verify(store.path).ok
    next((store.path / "activations.zarr/blocks.2.hook_resid_post/patches/c").glob("1/*/*")).unlink()
    with pytest.raises(CorruptError, match="Shard 1"):
        store.read(images=[40])


def test_float32_storage_keeps_float32(tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str]) -> None:
    store = extract(tiny_images, tmp_path / "x.acts", **tiny_model, layers=[1], dtype="float32", precision="float32")
    expected = plain_forward(tiny_images, store.images["uri"].to_pylist(), tiny_model, 1)
    np.testing.assert_allclose(store.read(), expected, rtol=1e-5, atol=1e-6)
    assert store.read().dtype == np.float32


def test_layers_may_be_named_in_any_order(
    tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str], tiny_store: Path
) -> None:
    again = extract(
        tiny_images, tmp_path / "x.acts", **tiny_model, layers=[0, 2, 0], shard_images=16, precision="float32"
    )
    assert again.store_id == ActivationStore.open(tiny_store).store_id
    assert not np.array_equal(again.read(0, images=[1]), again.read(2, images=[1]))


def test_blocks_after_the_last_wanted_one_are_not_run(
    tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    forward = open_clip.transformer.ResidualAttentionBlock.forward

    def counted(block: torch.nn.Module, *args: object, **kwargs: object) -> object:
        calls.append(id(block))
        return forward(block, *args, **kwargs)

    monkeypatch.setattr(open_clip.transformer.ResidualAttentionBlock, "forward", counted)
    extract(tiny_images, tmp_path / "x.acts", **tiny_model, layers=[0, 1], limit=16)
    assert len(set(calls)) == 2


def test_the_same_call_returns_the_store_and_others_are_refused(
    tiny_store: Path, tiny_images: Path, tiny_model: dict[str, str]
) -> None:
    before = {file: file.stat().st_mtime_ns for file in tiny_store.rglob("*")}
    wanted = {"layers": [2, 0], "shard_images": 16, "precision": "float32"}
    extract(tiny_images, tiny_store, **tiny_model, **wanted, batch_size=3)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=r"dtype: float16 there, float32 asked for"):
        extract(tiny_images, tiny_store, **tiny_model, **wanted, dtype="float32")  # type: ignore[arg-type]
    assert {file: file.stat().st_mtime_ns for file in tiny_store.rglob("*")} == before


def shards(store: Path) -> dict[str, bytes]:
    files = [file for file in store.rglob("*") if file.is_file() and file.name != "artifact.json"]
    return {str(f.relative_to(store)): f.read_bytes() for f in files if f.name != "manifest.json"}


def test_interrupted_and_repeated_it_writes_the_same_bytes(
    tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str], tiny_store: Path
) -> None:
    def stop(done: int, total: int) -> None:
        assert total == 75
        if done > 40:
            raise KeyboardInterrupt

    wanted = {"layers": [2, 0], "shard_images": 16, "precision": "float32"}
    with pytest.raises(KeyboardInterrupt):
        extract(tiny_images, tmp_path / "x.acts", **tiny_model, **wanted, on_progress=stop)  # type: ignore[arg-type]
    with pytest.raises(IncompleteError, match="3 of 5 shards are missing"):
        ActivationStore.open(tmp_path / "x.acts")
    assert not verify(tmp_path / "x.acts").ok
    seen: list[int] = []
    extract(
        tiny_images,
        tmp_path / "x.acts",
        **tiny_model,
        **wanted,
        on_progress=lambda done, total: seen.append(done),  # type: ignore[arg-type]
    )
    assert min(seen) == 32
    assert shards(tmp_path / "x.acts") == shards(tiny_store)
    assert verify(tmp_path / "x.acts").ok


KILLED = """
import os, signal, sys
from actcache import extract
count = int(sys.argv[1])
def killer(function):
    def wrapped(*args, **kwargs):
        global count
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped
os.fsync, os.replace, os.pwrite = killer(os.fsync), killer(os.replace), killer(os.pwrite)
extract(sys.argv[2], sys.argv[3], model=sys.argv[4], pretrained=sys.argv[5], layers=[2, 0], shard_images=16,
        precision="float32")
"""


@pytest.mark.parametrize("count", [1, 9, 25, 41, 57, 73])
def test_killed_at_any_step_of_a_commit_it_can_be_repeated(
    tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str], tiny_store: Path, count: int
) -> None:
    command = [sys.executable, "-c", KILLED, str(count), str(tiny_images), str(tmp_path / "x.acts")]
    killed = subprocess.run([*command, *tiny_model.values()], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    extract(tiny_images, tmp_path / "x.acts", **tiny_model, layers=[2, 0], shard_images=16, precision="float32")
    assert shards(tmp_path / "x.acts") == shards(tiny_store)
    assert verify(tmp_path / "x.acts").ok
    assert not [name for name in os.listdir(tmp_path / "x.acts" / "commits") if name.endswith(".tmp")]


@pytest.fixture
def broken_images(tmp_path: Path, make_images: Callable[..., Path]) -> Path:
    images = make_images(tmp_path / "images", 40)
    (images / "class1" / "0004.png").write_bytes(b"not an image")
    file = images / "class2" / "0011.png"
    file.write_bytes(file.read_bytes()[:300])
    return images


def test_an_unreadable_image_ends_the_run_and_is_listed(
    tmp_path: Path, broken_images: Path, tiny_model: dict[str, str]
) -> None:
    with pytest.raises(ImageSourceError, match=r"cannot be read: .*\.png .*--on-error skip"):
        extract(broken_images, tmp_path / "x.acts", **tiny_model, layers=[0])
    with pytest.raises(IncompleteError):
        ActivationStore.open(tmp_path / "x.acts")


@pytest.mark.parametrize("batch_size", [32, 1])
def test_skipped_images_keep_their_rows_marked(
    tmp_path: Path, broken_images: Path, tiny_model: dict[str, str], batch_size: int
) -> None:
    wanted = {"layers": [0], "on_error": "skip", "precision": "float32", "batch_size": batch_size}
    store = extract(broken_images, tmp_path / "x.acts", **tiny_model, **wanted)  # type: ignore[arg-type]
    uris = store.images["uri"].to_pylist()
    assert sorted(uris[image] for image in store.failed) == ["class1/0004.png", "class2/0011.png"]
    assert store.valid.sum() == 38
    assert not store.read(images=list(store.failed)).any()
    good = np.flatnonzero(store.valid)
    assert store.read(images=good).any((1, 2)).all()
    rows = store.read(images=good).reshape(-1, 32).astype(np.float64)
    np.testing.assert_allclose(store.statistics(0).mean, rows.mean(0), rtol=1e-12)
    assert verify(store.path).ok


def test_a_value_beyond_float16_names_its_image(tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str]) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny_model["pretrained"])
    weights["visual.transformer.resblocks.0.mlp.c_proj.bias"] += 1e5
    save_file(weights, tmp_path / "huge.safetensors")
    model = {"model": tiny_model["model"], "pretrained": str(tmp_path / "huge.safetensors")}
    with pytest.raises(NonFiniteError, match=r"image class\d/\d+\.png \(largest value .*float16"):
        extract(tiny_images, tmp_path / "x.acts", **model, layers=[0])
    assert extract(tiny_images, tmp_path / "y.acts", **model, layers=[0], dtype="float32").statistics(0).absmax > 9e4


def test_wrong_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str]
) -> None:
    wrong = [
        {"layers": []},
        {"layers": [0], "site": "mlp"},
        {"layers": [0], "dtype": "int8"},
        {"layers": [0], "codec": "gzip"},
        {"layers": [0], "on_error": "ignore"},
        {"layers": [0], "batch_size": 0},
        {"layers": [0], "shard_images": 20},
    ]
    for arguments in wrong:
        with pytest.raises(SettingsError):
            extract(tiny_images, tmp_path / "x.acts", **tiny_model, **arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_reads_out_of_range_are_refused(tiny_store: Path) -> None:
    store = ActivationStore.open(tiny_store)
    for images in ([75], [-1]):
        with pytest.raises(SettingsError, match=r"0\.\.74"):
            store.read(0, images=images)
    with pytest.raises(SettingsError, match="tokens must be one of"):
        store.read(0, tokens="register")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="C-contiguous"):
        store.read(0, out=np.empty((75, 10, 32), dtype=np.float32))


def test_real_images_through_a_trained_model(tmp_path: Path, real_data: Path) -> None:
    folder = real_data / "clip-cifar"
    model = {"model": str(folder / "ViT-CIFAR-4.json"), "pretrained": str(folder / "vit_cifar4.safetensors")}
    images = real_data / "cifar10" / "test"
    store = extract(images, tmp_path / "x.acts", **model, layers=[4, 3], limit=64, precision="float32", batch_size=16)
    for layer in (3, 4):
        expected = plain_forward(images, store.images["uri"].to_pylist(), model, layer)
        np.testing.assert_array_equal(store.read(layer), expected.astype(np.float16))
    rounded = extract(images, tmp_path / "y.acts", **model, layers=[4], limit=64, precision="bfloat16")
    exact = store.read(4).astype(np.float64)
    assert np.linalg.norm(rounded.read().astype(np.float64) - exact) / np.linalg.norm(exact) < 0.02
