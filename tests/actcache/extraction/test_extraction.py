"""extract(): images that cannot be read, values that cannot be stored, and runs that are interrupted and repeated.

That the stored values are the model's is test_store.py's; that any kill is survived, test_writer.py's.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from warm_process import WarmProcess

from actcache import (
    ActivationStore,
    ImageFolder,
    ImageSourceError,
    IncompleteError,
    NonFiniteError,
    SettingsError,
    extract,
    verify,
)


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
    with pytest.raises(IncompleteError, match="2 of 5 shards are missing"):
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
    assert min(seen) == 48  # what was computed before the interrupt was committed
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


@pytest.mark.parametrize("count", [41, 73])
def test_killed_mid_run_it_can_be_repeated(
    tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str], tiny_store: Path, count: int, warm: WarmProcess
) -> None:
    words = ("-c", KILLED, str(count), tiny_images, tmp_path / "x.acts", *tiny_model.values())
    killed = warm.run(*words, cwd=tmp_path)
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
    order = ImageFolder(broken_images).plan().table["uri"].to_pylist()
    first = min(order.index("class1/0004.png"), order.index("class2/0011.png"))
    with pytest.raises(ImageSourceError, match=rf"cannot be read: {order[first]} cannot.*--on-error skip") as caught:
        extract(broken_images, tmp_path / "x.acts", **tiny_model, layers=[0], shard_images=16, batch_size=1)
    assert str(tmp_path) not in str(caught.value)
    committed = sorted(file.name for file in (tmp_path / "x.acts" / "commits").iterdir())
    assert committed == [f"{shard:06d}.json" for shard in range(first // 16)]
    with pytest.raises(IncompleteError, match="of 3 shards are missing"):
        ActivationStore.open(tmp_path / "x.acts")
    assert not list((tmp_path / "x.acts").rglob(".*"))


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
    with pytest.raises(NonFiniteError, match=r"is too large for float16 for image class\d/\d+\.png"):
        extract(tiny_images, tmp_path / "x.acts", **model, layers=[0])
    assert not list((tmp_path / "x.acts" / "commits").iterdir())
    assert extract(tiny_images, tmp_path / "y.acts", **model, layers=[0], dtype="float32").statistics(0).absmax > 9e4


def test_wrong_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str]
) -> None:
    wrong = [
        {"layers": []},
        {"layers": [0], "sites": ["mlp"]},
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


def test_real_images_through_a_trained_model(
    tmp_path: Path, real_data: Path, plain_forward: Callable[..., Any]
) -> None:
    folder = real_data / "clip-cifar"
    model = {"model": str(folder / "ViT-CIFAR-4.json"), "pretrained": str(folder / "vit_cifar4.safetensors")}
    images = real_data / "cifar10" / "test"
    store = extract(images, tmp_path / "x.acts", **model, layers=[4, 3], limit=100, precision="float32", batch_size=16)
    for layer in (3, 4):
        expected = plain_forward(images, store.images["uri"].to_pylist(), model, layer)
        np.testing.assert_array_equal(store.read(layer), expected.astype(np.float16))
    rounded = extract(images, tmp_path / "y.acts", **model, layers=[4], limit=100, precision="bfloat16")
    exact = store.read(4).astype(np.float64)
    assert np.linalg.norm(rounded.read().astype(np.float64) - exact) / np.linalg.norm(exact) < 0.02
