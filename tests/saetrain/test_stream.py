"""The batch stream: every row once an epoch, the same from any starting point, nothing held out or failed in it."""

import shutil
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache import ActivationStore, CorruptError, SettingsError
from saetrain import ActivationLoader, held_out_images, train_images
from saetrain.order import plan_windows, window_order

POOLS = [1 << 20, 1000]  # everything at once, and several windows


@given(st.integers(2, 100_000))
def test_held_out_images_are_the_last_twentieth(n: int) -> None:
    assert [*train_images(n), *held_out_images(n)] == list(range(n)) or n > 1000
    assert train_images(n).stop == held_out_images(n).start
    assert held_out_images(n).stop == n
    assert 1 <= len(held_out_images(n)) <= max(1, round(n / 20))
    assert len(train_images(n)) >= 1


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 20), st.sampled_from([16, 64]), st.integers(1, 5000), st.integers(0, 3))
def test_every_image_is_in_exactly_one_window(n: int, tokens: int, block: int, pool: int, epoch: int) -> None:
    images = np.flatnonzero(np.arange(n) % 7 != 3).astype(np.int64)
    plan = plan_windows(images, tokens_per_image=tokens, block_images=block, pool_tokens=pool, seed=5, epoch=epoch)
    assert sorted(np.concatenate(plan).tolist()) == images.tolist()
    assert max(len(window) for window in plan) * tokens <= max(pool, block * tokens)


def test_orders_differ_by_epoch_and_window_and_repeat_by_seed() -> None:
    first = window_order(500, seed=1, epoch=0, window=0)
    assert sorted(first.tolist()) == list(range(500))
    assert np.array_equal(first, window_order(500, seed=1, epoch=0, window=0))
    for other in ({"seed": 2}, {"epoch": 1}, {"window": 1}):
        assert not np.array_equal(first, window_order(500, **{"seed": 1, "epoch": 0, "window": 0, **other}))


def loader(store: Path, pool: int, tokens: str = "all", batch_size: int = 96, seed: int = 0) -> ActivationLoader:
    opened = ActivationStore.open(store)
    return ActivationLoader(opened, tokens=tokens, batch_size=batch_size, pool_tokens=pool, seed=seed)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(("tokens", "numbers"), [("all", range(17)), ("patch", range(1, 17)), ("cls", range(1))])
def test_an_epoch_gives_every_training_row_once(planted_store: Path, pool: int, tokens: str, numbers: range) -> None:
    stream = loader(planted_store, pool, tokens)
    whole = stream.store.read()
    seen = []
    for batch in islice(stream.batches(), stream.steps_per_epoch):
        np.testing.assert_array_equal(batch.activations.numpy(), whole[batch.image.numpy(), batch.token.numpy()])
        seen += list(zip(batch.image.tolist(), batch.token.tolist(), strict=True))
    wanted = {(i, t) for i in train_images(320) for t in numbers if stream.store.valid[i]}
    assert len(seen) == len(set(seen)) == len(wanted) // 96 * 96
    assert set(seen) <= wanted


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("start", [1, 7, 50, 53, 54, 120])
def test_starting_later_continues_the_same_stream(planted_store: Path, pool: int, start: int) -> None:
    whole = [b.activations.clone() for b in islice(loader(planted_store, pool).batches(), start + 3)]
    late = [b.activations.clone() for b in islice(loader(planted_store, pool).batches(start), 3)]
    for expected, got in zip(whole[start:], late, strict=True):
        assert torch.equal(expected, got)


@pytest.mark.parametrize("pool", POOLS)
def test_each_epoch_and_seed_has_its_own_order(planted_store: Path, pool: int) -> None:
    stream = loader(planted_store, pool)
    n = stream.steps_per_epoch
    images = [b.image.tolist() for b in islice(stream.batches(), n + 1)]
    assert images[0] != images[n]
    assert images[0] != next(loader(planted_store, pool, seed=1).batches()).image.tolist()


def test_a_damaged_shard_surfaces_and_no_thread_stays(planted_store: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(planted_store, tmp_path / "x.acts"))
    next((store / "activations.zarr/blocks.0.hook_resid_post/cls/c").glob("2/*")).unlink()
    before = threading.active_count()
    with pytest.raises(CorruptError, match=r"Shard 2 of .*verify"):
        list(islice(loader(store, 1000).batches(), 60))
    stream = loader(planted_store, 1000).batches()
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_too_few_tokens_are_refused(planted_store: Path) -> None:
    with pytest.raises(SettingsError, match="302 training tokens, fewer than one batch of 512"):
        loader(planted_store, 1000, "cls", batch_size=512)
