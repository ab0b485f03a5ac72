"""Several workers write one store: each takes its own shards, and any number can finish the rest in the next run."""

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from worker_processes import start_workers

from actcache import ActivationStore, IncompleteError, SettingsError, extract, verify
from actcache.artifacts.commits import committed_shards
from actcache.workers import Worker, find_worker

WANTED: dict[str, Any] = {"layers": [2, 0], "shard_images": 16, "precision": "float32"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Worker(0, 1, 0)),
        ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Worker(2, 4, 1)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "3"}, Worker(3, 8, 3)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Worker(0, 1, 0)),  # a batch script: srun was not used
        ({"RANK": "1"}, Worker(0, 1, 0)),
    ],
)
def test_the_launchers_variables_say_which_worker_this_is(environment: dict[str, str], expected: Worker) -> None:
    assert find_worker(environment) == expected


@pytest.mark.parametrize("values", [("4", "4"), ("-1", "4"), ("x", "4"), ("0", "")])
def test_variables_that_make_no_sense_are_refused(values: tuple[str, str]) -> None:
    with pytest.raises(SettingsError, match="torchrun set"):
        find_worker({"RANK": values[0], "WORLD_SIZE": values[1]})


def test_every_shard_has_one_owner() -> None:
    for world_size in range(1, 9):
        for shard in range(50):
            assert sum(Worker(rank, world_size).owns(shard) for rank in range(world_size)) == 1


def shards(store: Path) -> dict[str, bytes]:
    return {str(f.relative_to(store)): f.read_bytes() for f in (store / "activations.zarr").rglob("*") if f.is_file()}


@pytest.mark.slow
def test_four_workers_two_of_them_killed_then_three_give_the_same_store(
    tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str], tiny_store: Path
) -> None:
    path, settings = tmp_path / "x.acts", {**tiny_model, **WANTED, "batch_size": 8}
    workers = start_workers(4, 1.0, extract, tiny_images, path, **settings)  # five shards: worker 0 owns two of them
    deadline = time.monotonic() + 120
    while not (path / "commits").is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    for worker in workers[:2]:
        worker.kill()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL, -signal.SIGKILL, 3, 3]
    assert committed_shards(path) == {2, 3}
    with pytest.raises(IncompleteError, match="3 of 5 shards are missing"):
        ActivationStore.open(path)

    workers = start_workers(
        3, 0.0, extract, tiny_images, path, **settings
    )  # now shards 0 and 3 are worker 0's, 1 and 4 worker 1's
    for worker in workers:
        worker.join(120)
    codes = [worker.exitcode for worker in workers]
    assert set(codes) <= {0, 3}
    assert 0 in codes  # the last one sealed
    assert shards(path) == shards(tiny_store)
    assert verify(path).ok
    assert not list(path.rglob("*.tmp"))


def test_overwriting_is_refused_to_one_of_several(
    tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="Remove the store first"):
        extract(tiny_images, tmp_path / "x.acts", **tiny_model, **WANTED, overwrite=True)


@pytest.mark.slow
def test_killed_ten_times_at_random_on_photographs_it_ends_as_if_nothing_had_been(
    tmp_path: Path, real_data: Path, tiny_model: dict[str, str]
) -> None:
    images, path, settings = real_data / "photos", tmp_path / "x.acts", {**tiny_model, **WANTED, "batch_size": 8}
    whole = extract(images, tmp_path / "whole.acts", **settings)
    rng = random.Random(5)
    n_killed = 0
    while n_killed < 10:
        (worker,) = start_workers(1, 0.6, extract, images, path, **settings)
        deadline = time.monotonic() + rng.uniform(0.4, 2.5)
        while worker.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert worker.is_alive(), "it was to be killed before it ends"
        worker.kill()
        worker.join()
        n_killed += 1
    extract(images, path, **settings)
    assert shards(path) == shards(whole.path)
    assert verify(path).ok
    assert not list(path.rglob("*.tmp"))
