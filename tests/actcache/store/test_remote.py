"""Stores on an object store, against a real S3 server on this machine."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from any_prefix import write_places

from actcache import (
    ActivationStore,
    ArtifactNotFoundError,
    CorruptError,
    IncompleteError,
    SettingsError,
    describe,
    extract,
    open_stores,
    verify,
)
from actcache.artifacts import artifact_path
from saetrain import SAEConfig, TrainConfig, encode, train

pytest.importorskip("s3fs")
pytest.importorskip("moto")

WANTED: dict[str, Any] = {"layers": [2, 0], "shard_images": 16, "precision": "float32"}


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """s3://bucket on a server in a separate process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "tests",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": url,
        }.items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # one that knows another server's address
        for _ in range(200):
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT"), timeout=5).close()
        yield "s3://bucket"
    server.kill()
    server.wait()


@pytest.fixture(scope="module")
def remote(bucket: str, tiny_images: Path, tiny_model: dict[str, str]) -> str:
    """The tiny store, extracted to the bucket, raw."""
    extract(tiny_images, f"{bucket}/tiny.acts", **tiny_model, **WANTED)
    return f"{bucket}/tiny.acts"


def test_extraction_writes_the_same_objects_as_files(remote: str, tiny_store: Path) -> None:
    opened, local = ActivationStore.open(remote), ActivationStore.open(tiny_store)
    assert (opened.store_id, opened.n_images) == (local.store_id, local.n_images)
    for file in (tiny_store / "activations.zarr").rglob("*"):
        if file.is_file():
            assert (opened.path / str(file.relative_to(tiny_store))).read_bytes() == file.read_bytes()
    for tokens in ("all", "patch", "cls"):
        np.testing.assert_array_equal(opened.read(2, tokens=tokens), local.read(2, tokens=tokens))  # type: ignore[arg-type]
    np.testing.assert_array_equal(opened.read(0, images=[70, 3, 4, 17]), local.read(0, images=[70, 3, 4, 17]))
    np.testing.assert_array_equal(opened.read(0, images=[33], check=True), local.read(0, images=[33]))
    assert opened.statistics(0).count == local.statistics(0).count
    found = verify(remote)
    assert found.ok, found.problems
    assert describe(remote)["complete"]


def test_the_same_command_again_returns_it_and_other_settings_are_refused(
    remote: str, tiny_images: Path, tiny_model: dict[str, str]
) -> None:
    extract(tiny_images, remote, **tiny_model, **WANTED)
    with pytest.raises(SettingsError, match="dtype: float16 there, float32 asked for"):
        extract(tiny_images, remote, **tiny_model, **WANTED, dtype="float32")


def test_interrupted_and_repeated_it_is_whole(
    bucket: str, tiny_images: Path, tiny_model: dict[str, str], tiny_store: Path
) -> None:
    def stop(done: int, total: int) -> None:
        if done > 40:
            raise KeyboardInterrupt

    path = f"{bucket}/resumed.acts"
    with pytest.raises(KeyboardInterrupt):
        extract(tiny_images, path, **tiny_model, **WANTED, on_progress=stop)
    with pytest.raises(IncompleteError, match="2 of 5 shards are missing"):
        ActivationStore.open(path)
    store = extract(tiny_images, path, **tiny_model, **WANTED)
    np.testing.assert_array_equal(store.read(2), ActivationStore.open(tiny_store).read(2))
    assert verify(path).ok


def test_damage_is_found_and_a_missing_object_is_no_zeros(
    bucket: str, tiny_images: Path, tiny_model: dict[str, str]
) -> None:
    path = f"{bucket}/damaged.acts"
    store = extract(tiny_images, path, **tiny_model, layers=[0], shard_images=16, codec="zstd")
    shard = store.path / "activations.zarr/blocks.0.hook_resid_post/patches/c/1/0/0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(bytes(data))
    found = verify(path)
    assert [(problem.shard, problem.what[:24]) for problem in found.problems] == [(1, "differs from what was wr")]
    with pytest.raises(CorruptError, match="Shard 1"):
        ActivationStore.open(path).read(images=[20], check=True)
    shard.unlink()
    with pytest.raises(CorruptError, match=r"Shard 1 .* is missing"):
        ActivationStore.open(path).read(images=[20])


def test_training_and_encoding_read_from_the_bucket(remote: str, tmp_path: Path, tiny_store: Path) -> None:
    config = TrainConfig(n_steps=3, batch_size=64)
    sae = SAEConfig(n_latents=32, k=4)
    runs = [train(store, tmp_path / name, layer=2, sae=sae, config=config) for name, store in
            (("far", remote), ("near", tiny_store))]  # fmt: skip
    assert runs[0].run_id == runs[1].run_id
    assert (runs[0].path / "sae.safetensors").read_bytes() == (runs[1].path / "sae.safetensors").read_bytes()
    codes = encode(runs[0], remote, tmp_path / "x.codes")
    assert codes.n_images == open_stores(remote).n_images


@pytest.mark.parametrize(
    ("prefix", "codec"), [([], "raw"), (["reg", "reg"], "zstd"), (["cls", "reg", "dist"], "raw")], ids=str
)
def test_special_tokens_lie_in_the_bucket_as_on_a_disk(
    bucket: str, tmp_path: Path, prefix: list[str], codec: str
) -> None:
    path = artifact_path(f"{bucket}/{codec}-{'-'.join(prefix) or 'none'}.acts")
    options: dict[str, Any] = {"n_extra": 1, "codec": codec, "failed": {4: "broken"}}
    write_places(path, prefix, tidy=False, **options)
    write_places(tmp_path / "x.acts", prefix, **options)
    opened, local = ActivationStore.open(path), ActivationStore.open(tmp_path / "x.acts")
    assert opened.store_id == local.store_id
    for images in (slice(None), [39, 3, 17, 16]):
        for check in (False, True):
            np.testing.assert_array_equal(
                opened.read_stream(images=images, check=check), local.read_stream(images=images)
            )
            np.testing.assert_array_equal(
                opened.read_registers(images=images, check=check), local.read_registers(images=images)
            )
    assert verify(path).ok
    if "cls" not in prefix:
        with pytest.raises(SettingsError, match="the model of this store has none"):
            opened.read(tokens="cls")
    if prefix:
        shard = opened.path / "activations.zarr/blocks.3.hook_resid_post/registers/c/1/0/0"
        data = bytearray(shard.read_bytes())
        data[9] ^= 1
        shard.write_bytes(bytes(data))
        assert verify(path).shards == (1,)


def test_what_is_not_there_is_said_in_one_line(bucket: str) -> None:
    with pytest.raises(ArtifactNotFoundError, match=r"s3://bucket/nowhere\.acts"):
        ActivationStore.open(f"{bucket}/nowhere.acts")
    with pytest.raises(SettingsError, match="nosuch"):
        ActivationStore.open("nosuch://bucket/x.acts")
    assert os.environ["AWS_ENDPOINT_URL"].startswith("http://127.0.0.1")
