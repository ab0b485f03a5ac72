"""encode(): codes are what the SAE computes, complete after interruptions, the same from any number of workers."""

import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import sign_file
from worker_processes import start_workers

from actcache import (
    ActivationStore,
    CorruptError,
    IncompleteError,
    NonFiniteError,
    ParentMismatchError,
    SettingsError,
    verify,
)
from saetrain import CodeStore, Run, SAEConfig, TrainConfig, encode, train

TOPK = SAEConfig(n_latents=96, k=3)
SHORT = TrainConfig(n_steps=90, batch_size=256, lr=3e-3, dead_tokens=5000, pool_tokens=2000, resample_every=30)


@pytest.fixture(scope="module")
def planted_run(tmp_path_factory: pytest.TempPathFactory, planted_store: Path) -> Run:
    return train(planted_store, tmp_path_factory.mktemp("run") / "run", sae=TOPK, config=SHORT)


@pytest.fixture(scope="module")
def planted_codes(tmp_path_factory: pytest.TempPathFactory, planted_run: Run, planted_store: Path) -> CodeStore:
    return encode(planted_run, planted_store, tmp_path_factory.mktemp("codes") / "x.codes")


def dense_codes(codes: CodeStore) -> np.ndarray:
    dense = np.zeros((codes.n_images * codes.n_tokens, codes.n_latents), dtype=np.float16)
    for number in range(codes.n_shards):
        shard = codes.read_shard(number)
        rows = shard.first_row + np.repeat(np.arange(len(shard.indptr) - 1), np.diff(shard.indptr))
        dense[rows, shard.latent] = shard.value
    return dense.reshape(codes.n_images, codes.n_tokens, codes.n_latents)


def test_codes_are_what_the_sae_computes(planted_codes: CodeStore, planted_run: Run, planted_store: Path) -> None:
    store, sae = ActivationStore.open(planted_store), planted_run.sae()
    dense = dense_codes(planted_codes)
    for image in (0, 5, 63, 64, 200, 319):
        rows, latents, values = sae.encode(torch.from_numpy(store.read(images=[image])[0]))
        expected = np.zeros((17, 96), dtype=np.float16)
        expected[rows, latents] = values.half()
        if not store.valid[image]:
            expected[:] = 0
        np.testing.assert_allclose(dense[image], expected, rtol=2e-3, atol=1e-3)
    assert planted_codes.n_entries == (dense != 0).sum()
    assert planted_codes.valid.sum() == 317


def test_both_orders_hold_the_same_entries(planted_codes: CodeStore) -> None:
    dense = dense_codes(planted_codes).reshape(-1, 96)
    for latent in range(96):
        rows, values = planted_codes.read_latent(latent)
        assert np.array_equal(rows, np.flatnonzero(dense[:, latent]))
        assert np.array_equal(values, dense[rows, latent])


def test_plain_zarr_reads_the_codes(planted_codes: CodeStore) -> None:
    import zarr

    group = zarr.open_group(planted_codes.path / "codes.zarr", mode="r")
    shard = planted_codes.read_shard(3)
    for name in ("indptr", "latent", "value", "latent_indptr", "row", "latent_value"):
        assert np.array_equal(group[f"3/{name}"][:], getattr(shard, name))
    assert verify(planted_codes.path).ok


def test_interrupted_encoding_ends_with_the_same_bytes(
    tmp_path: Path, planted_codes: CodeStore, planted_run: Run, planted_store: Path
) -> None:
    def stop(done: int, total: int) -> None:
        if done > 150:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(planted_run, planted_store, tmp_path / "x.codes", on_progress=stop)
    with pytest.raises(IncompleteError, match="3 of 5 shards"):
        CodeStore.open(tmp_path / "x.codes")
    shutil.copytree(tmp_path / "x.codes" / "codes.zarr" / "0", tmp_path / "x.codes" / "codes.zarr" / "2")  # no record
    again = encode(planted_run, planted_store, tmp_path / "x.codes")
    for number in range(5):
        for name, value in vars(planted_codes.read_shard(number)).items():
            assert np.array_equal(getattr(again.read_shard(number), name), value)
    assert verify(again.path).ok


def test_patch_saes_write_no_cls_rows(tmp_path: Path, planted_store: Path) -> None:
    config = TrainConfig(n_steps=30, batch_size=256, tokens="patch")
    run = train(planted_store, tmp_path / "run", sae=TOPK, config=config)
    dense = dense_codes(encode(run, planted_store, tmp_path / "x.codes"))
    assert not dense[:, 0].any()
    assert dense[0, 1:].any()
    assert set(run.quality) == {"patch", "silent", "dense", "n_tokens", "dead"}


def test_another_models_store_is_refused(tmp_path: Path, planted_run: Run, tiny_store: Path) -> None:
    with pytest.raises(ParentMismatchError, match="trained on model planted"):
        encode(planted_run, tiny_store, tmp_path / "x.codes")
    assert not (tmp_path / "x.codes").exists()


def test_values_beyond_float16_name_their_image(tmp_path: Path, planted_run: Run, planted_store: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(planted_run.path, tmp_path / "run"))
    tensors = load_file(copy / "sae.safetensors")
    tensors["encoder"] *= 1e6
    save_file(tensors, copy / "sae.safetensors")
    sign_file(copy, "sae.safetensors")
    with pytest.raises(NonFiniteError, match=r"image \d+\.png .*beyond the range of float16"):
        encode(copy, planted_store, tmp_path / "x.codes")


def test_damaged_codes_are_an_error(tmp_path: Path, planted_codes: CodeStore) -> None:
    copy = Path(shutil.copytree(planted_codes.path, tmp_path / "x.codes"))
    file = copy / "codes.zarr" / "1" / "latent" / "c" / "0"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(CorruptError, match="Shard 1"):
        CodeStore.open(copy).read_shard(1)
    file.unlink()
    with pytest.raises(CorruptError, match="has no readable array latent"):
        CodeStore.open(copy).read_shard(1)
    assert any("latent/c/0: is missing" in str(problem) for problem in verify(copy).problems)


def test_two_workers_one_of_them_killed_then_three_give_the_same_codes(
    tmp_path: Path, planted_codes: CodeStore, planted_run: Run, planted_store: Path
) -> None:
    path = tmp_path / "x.codes"
    workers = start_workers(2, 0.2, encode, planted_run.path, planted_store, path)  # of five shards worker 0 owns three
    deadline = time.monotonic() + 60
    while not (path / "codes.zarr" / "0").is_dir() and time.monotonic() < deadline:
        time.sleep(0.02)
    workers[0].kill()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL, 3]
    with pytest.raises(IncompleteError, match="of 5 shards are missing"):
        CodeStore.open(path)

    workers = start_workers(3, 0.0, encode, planted_run.path, planted_store, path)
    for worker in workers:
        worker.join(60)
    exit_codes = {worker.exitcode for worker in workers}
    assert 0 in exit_codes  # the last one sealed
    assert exit_codes <= {0, 3}
    again = CodeStore.open(path)
    for number in range(5):
        for name, value in vars(planted_codes.read_shard(number)).items():
            assert np.array_equal(getattr(again.read_shard(number), name), value)
    assert verify(path).ok
    assert not list(path.rglob("*.tmp"))


def test_overwriting_is_refused_to_one_of_several(
    tmp_path: Path, planted_run: Run, planted_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="Remove the codes by hand"):
        encode(planted_run, planted_store, tmp_path / "x.codes", overwrite=True)
