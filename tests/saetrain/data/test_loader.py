"""The batch stream: every row comes once per epoch, the same from any starting point, no held-out or failed image."""

import shutil
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from actcache import ActivationStore, CorruptError, SettingsError
from saetrain import ActivationLoader, Batch, held_out_images, train_images

POOLS = [1 << 20, 1000, 1]  # everything at once, windows of three blocks, windows of one block
BATCH_SIZE = 96
STEPS_PER_EPOCH = 302 * 17 // BATCH_SIZE  # 304 training images, two of them failed


def loader(
    store: Path, pool: int, tokens: str = "all", batch_size: int = BATCH_SIZE, seed: int = 0
) -> ActivationLoader:
    opened = ActivationStore.open(store)
    return ActivationLoader(opened, tokens=tokens, batch_size=batch_size, pool_tokens=pool, seed=seed)


def copied(batch: Batch) -> Batch:
    return Batch(batch.activations.clone(), batch.image.clone(), batch.token.clone())


def rows_of(batch: Batch) -> list[tuple[int, int]]:
    return list(zip(batch.image.tolist(), batch.token.tolist(), strict=True))


@pytest.fixture(scope="module", params=POOLS, ids=["whole", "windows", "blocks"])
def stream(request: pytest.FixtureRequest, planted_store: Path) -> tuple[int, list[Batch]]:
    """The pool_tokens, and a little more than three epochs of batches."""
    batches = loader(planted_store, request.param).batches()
    return request.param, [copied(batch) for batch in islice(batches, 3 * STEPS_PER_EPOCH + 5)]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(("tokens", "numbers"), [("all", range(17)), ("patch", range(1, 17)), ("cls", range(1))])
def test_an_epoch_gives_every_training_row_once(planted_store: Path, pool: int, tokens: str, numbers: range) -> None:
    """All rows except those of the partial last batch, each with the values that the store holds for it."""
    batches = loader(planted_store, pool, tokens)
    whole = batches.store.read()
    seen = []
    for batch in islice(batches.batches(), batches.steps_per_epoch):
        np.testing.assert_array_equal(batch.activations.numpy(), whole[batch.image.numpy(), batch.token.numpy()])
        seen += rows_of(batch)
    wanted = {(i, t) for i in train_images(320) for t in numbers if batches.store.valid[i]}
    assert len(seen) == len(set(seen)) == len(wanted) // BATCH_SIZE * BATCH_SIZE
    assert set(seen) <= wanted


def test_later_epochs_are_complete_too_and_in_their_own_order(stream: tuple[int, list[Batch]]) -> None:
    epochs = [
        [row for batch in stream[1][first : first + STEPS_PER_EPOCH] for row in rows_of(batch)]
        for first in range(0, 3 * STEPS_PER_EPOCH, STEPS_PER_EPOCH)
    ]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == STEPS_PER_EPOCH * BATCH_SIZE
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_failed_and_held_out_images_never_appear(stream: tuple[int, list[Batch]]) -> None:
    images = {image for batch in stream[1] for image in batch.image.tolist()}
    assert images.isdisjoint({5, 77, 310, *held_out_images(320)})
    assert len(images) == 302


@pytest.mark.parametrize("start", [0, 1, 7, 31, 52, 53, 54, 105, 106, 107, 158, 159])
def test_starting_later_continues_the_same_stream(
    planted_store: Path, stream: tuple[int, list[Batch]], start: int
) -> None:
    """Also at and across the end of an epoch (every 53 steps)."""
    pool, whole = stream
    late = [copied(batch) for batch in islice(loader(planted_store, pool).batches(start), 3)]
    for expected, got in zip(whole[start : start + 3], late, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected[:3], got[:3], strict=True))


@pytest.mark.parametrize("pool", POOLS)
def test_each_seed_has_its_own_order_and_repeats_it(planted_store: Path, pool: int) -> None:
    first = [rows_of(next(loader(planted_store, pool, seed=seed).batches())) for seed in (0, 0, 1)]
    assert first[0] == first[1] != first[2]


@pytest.mark.parametrize("pool", POOLS)
def test_streams_of_one_loader_do_not_disturb_each_other(planted_store: Path, pool: int) -> None:
    one = loader(planted_store, pool)
    whole = one.store.read()
    streams = [one.batches(), one.batches(25)]
    for _ in range(60):
        for batch in map(next, streams):
            np.testing.assert_array_equal(batch.activations.numpy(), whole[batch.image.numpy(), batch.token.numpy()])


def test_memory_is_allocated_once_per_stream(planted_store: Path) -> None:
    batches = loader(planted_store, 1000).batches()
    first = next(batches).activations
    before = first.clone()
    addresses = [next(batches).activations.data_ptr() for _ in range(2 * STEPS_PER_EPOCH)]
    assert set(addresses) - {first.data_ptr()} == {addresses[0]}  # one that is used, one that is filled meanwhile
    assert not torch.equal(first, before)


@pytest.mark.parametrize("pool", POOLS)
def test_a_batch_stays_as_it_is_while_it_is_used(planted_store: Path, pool: int) -> None:
    """The next one is copied meanwhile, and its windows are read."""
    whole = ActivationStore.open(planted_store).read()
    for batch in islice(loader(planted_store, pool).batches(), STEPS_PER_EPOCH + 2):
        time.sleep(0.005)
        np.testing.assert_array_equal(batch.activations.numpy(), whole[batch.image.numpy(), batch.token.numpy()])


@pytest.mark.parametrize("pool", POOLS)
def test_float32_stores_give_float32_batches(tmp_path: Path, make_store: Callable[..., Path], pool: int) -> None:
    batches = loader(make_store(tmp_path / "x.acts", n_images=50, dtype="float32"), pool)
    batch = next(batches.batches())
    assert batch.activations.dtype == torch.float32
    expected = batches.store.read()[batch.image.numpy(), batch.token.numpy()]
    np.testing.assert_array_equal(batch.activations.numpy(), expected)


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("pool", POOLS)
def test_ranks_together_see_what_one_process_sees(planted_store: Path, pool: int, world_size: int) -> None:
    alone = loader(planted_store, pool).batches(40)
    ranks = [
        ActivationLoader(planted_store, batch_size=BATCH_SIZE, pool_tokens=pool, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    streams = [rank.batches(40) for rank in ranks]
    for _ in range(30):  # across the border of an epoch
        part = BATCH_SIZE // 8
        whole = rows_of(next(alone))
        parts = [rows_of(next(stream)) for stream in streams]
        for v in range(8):
            local = v // world_size * part
            assert parts[v % world_size][local : local + part] == whole[v * part : (v + 1) * part]


def test_the_number_of_threads_changes_nothing(planted_store: Path) -> None:
    streams = [ActivationLoader(planted_store, batch_size=96, pool_tokens=1000, n_threads=n).batches() for n in (1, 5)]
    for _ in range(70):
        one, other = (next(stream) for stream in streams)
        assert torch.equal(one.activations, other.activations)


def test_several_hook_points_give_the_same_rows(tmp_path: Path, make_store: Callable[..., Path]) -> None:
    store = ActivationStore.open(make_store(tmp_path / "x.acts", n_images=80, failed=(), layers=(0, 3)))
    for pool in POOLS:
        batches = ActivationLoader(store, [3, 0], batch_size=64, pool_tokens=pool)
        for batch in islice(batches.batches(), 30):
            at = batch.image.numpy(), batch.token.numpy()
            np.testing.assert_array_equal(batch.activations.numpy(), store.read(3)[at])
            np.testing.assert_array_equal(batch.others[0].numpy(), store.read(0)[at])


def test_chosen_images_only(planted_store: Path) -> None:
    images = np.array([0, 1, 17, 40, 41, 63, 64, 200, 301])
    for pool in POOLS:
        batches = ActivationLoader(planted_store, images=images, tokens="patch", batch_size=16, pool_tokens=pool)
        seen = {row for batch in islice(batches.batches(), batches.steps_per_epoch) for row in rows_of(batch)}
        assert seen == {(i, t) for i in images.tolist() for t in range(1, 17)}


def test_a_compressed_store_gives_the_same_batches(tmp_path: Path, make_store: Callable[..., Path]) -> None:
    raw, packed = (make_store(tmp_path / codec, n_images=100, codec=codec) for codec in ("raw", "zstd"))
    for tokens, pool in (("all", 1), ("patch", 700), ("cls", 10), ("all", 1 << 20)):
        ours, theirs = (loader(path, pool, tokens, batch_size=24) for path in (raw, packed))
        for one, other in islice(zip(ours.batches(), theirs.batches(), strict=False), ours.steps_per_epoch + 3):
            for mine, same in zip(one[:3], other[:3], strict=True):
                np.testing.assert_array_equal(mine.numpy(), same.numpy())


def damage(store: Path, how: str) -> None:
    file = store / "activations.zarr/blocks.0.hook_resid_post/patches/c/2/0/0"
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("how", ["missing", "short"])
def test_a_damaged_shard_surfaces_in_the_consumer(planted_store: Path, tmp_path: Path, pool: int, how: str) -> None:
    """Every request must fail: memory that was never read must not pass for activations."""
    store = Path(shutil.copytree(planted_store, tmp_path / "x.acts"))
    damage(store, how)
    batches = loader(store, pool)
    for _ in range(2):
        with pytest.raises(CorruptError, match=r"Shard 2 of .*verify"):
            list(islice(batches.batches(), STEPS_PER_EPOCH))
    assert reading_threads() == []


def test_what_precedes_a_damaged_shard_is_not_lost(planted_store: Path, tmp_path: Path) -> None:
    """The batch before is whole, although the next one is begun while it is used."""
    store = Path(shutil.copytree(planted_store, tmp_path / "x.acts"))
    damage(store, "short")
    for step in range(STEPS_PER_EPOCH):  # with windows of one unit, a batch reads only what it holds
        stream = loader(planted_store, 1).batches(step)
        images, tokens = (column.numpy() for column in next(stream)[1:3])
        stream.close()
        damaged = loader(store, 1).batches(step)
        if ((images // 64 == 2) & (tokens > 0)).any():
            with pytest.raises(CorruptError, match="Shard 2"):
                next(damaged)
        else:
            assert next(damaged).image.numpy().tolist() == images.tolist()
        damaged.close()


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.mark.parametrize("pool", POOLS)
def test_no_thread_stays_after_breaking_out(planted_store: Path, pool: int) -> None:
    before = threading.enumerate()
    for seen, batch in enumerate(loader(planted_store, pool).batches()):
        assert len(batch.image) == BATCH_SIZE
        assert reading_threads() or pool == POOLS[0]
        if seen == 2:
            break
    assert threading.enumerate() == before


def test_too_few_tokens_for_a_batch_are_refused(planted_store: Path) -> None:
    with pytest.raises(SettingsError, match="302 training tokens, fewer than one batch of 512"):
        loader(planted_store, 1000, "cls", batch_size=512)


def test_an_empty_batch_or_an_unknown_kind_of_token_is_refused(planted_store: Path) -> None:
    with pytest.raises(SettingsError, match="--batch-size must be at least 1, got 0"):
        loader(planted_store, 1000, batch_size=0)
    with pytest.raises(SettingsError, match="all, patch, cls, got 'pixel'"):
        loader(planted_store, 1000, "pixel")
