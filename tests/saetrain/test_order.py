"""Which rows come when: every training image once an epoch, in an order that (seed, epoch, window) decide."""

from collections.abc import Iterable

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from saetrain import held_out_images, train_images
from saetrain.order import plan_windows, window_order


@settings(deadline=None)
@given(st.integers(2, 20_000))
def test_train_and_held_out_images_partition_the_store(n: int) -> None:
    train, held_out = train_images(n), held_out_images(n)
    assert [*train, *held_out] == list(range(n))
    assert 1 <= len(held_out) <= max(1, round(n / 20))
    assert len(train) >= 1


def test_a_single_image_is_trained_on() -> None:
    assert (train_images(1), len(held_out_images(1))) == (range(1), 0)


@st.composite
def plans(draw: st.DrawFn) -> dict[str, int]:
    return {
        "tokens_per_image": draw(st.integers(1, 20)),
        "block_images": draw(st.sampled_from([16, 64])),
        "pool_tokens": draw(st.integers(0, 5000)),
        "seed": draw(st.integers(0, 2**40)),
        "epoch": draw(st.integers(0, 10)),
    }


def cut(images: Iterable[int], plan: dict[str, int]) -> list[NDArray[np.int64]]:
    """Ascending images in parts that share a block, as StoreGroup.blocks cuts them."""
    array = np.array(list(images), dtype=np.int64)
    return np.split(array, np.flatnonzero(np.diff(array // plan["block_images"])) + 1)


@settings(deadline=None)
@given(st.sets(st.integers(0, 600), min_size=1), plans())
def test_every_image_is_in_exactly_one_window_beside_its_block(stored: set[int], plan: dict[str, int]) -> None:
    images = np.array(sorted(stored), dtype=np.int64)
    windows = plan_windows(cut(images, plan), **plan)
    assert sorted(np.concatenate(windows).tolist()) == images.tolist()
    blocks = [set((window // plan["block_images"]).tolist()) for window in windows]
    assert sum(map(len, blocks)) == len(set.union(*blocks))


@settings(deadline=None)
@given(st.sets(st.integers(0, 600), min_size=1), plans())
def test_a_window_fits_the_pool_or_is_one_block(stored: set[int], plan: dict[str, int]) -> None:
    windows = plan_windows(cut(sorted(stored), plan), **plan)
    rows = max(map(len, windows)) * plan["tokens_per_image"]
    assert rows <= max(plan["pool_tokens"], plan["block_images"] * plan["tokens_per_image"])


@settings(deadline=None)
@given(st.sets(st.integers(0, 600), min_size=1), plans(), st.integers(0, 100))
def test_a_pool_that_holds_all_rows_makes_one_window(stored: set[int], plan: dict[str, int], spare: int) -> None:
    """Also when blocks are short: failed images, the end of the training split."""
    plan["pool_tokens"] = len(stored) * plan["tokens_per_image"] + spare
    assert len(plan_windows(cut(sorted(stored), plan), **plan)) == 1


def test_each_epoch_and_seed_forms_its_own_windows_and_repeats_them() -> None:
    def windows(seed: int, epoch: int) -> list[list[int]]:
        settings = {"tokens_per_image": 17, "block_images": 16, "pool_tokens": 1000, "seed": seed, "epoch": epoch}
        return [window.tolist() for window in plan_windows(cut(range(640), settings), **settings)]

    assert windows(1, 0) == windows(1, 0)
    assert len({str(windows(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 100), st.integers(0, 100))
def test_a_window_order_is_a_permutation_that_repeats(n_rows: int, seed: int, epoch: int, window: int) -> None:
    order = window_order(n_rows, seed=seed, epoch=epoch, window=window)
    assert sorted(order.tolist()) == list(range(n_rows))
    assert np.array_equal(order, window_order(n_rows, seed=seed, epoch=epoch, window=window))


def test_every_seed_epoch_and_window_has_its_own_order() -> None:
    orders = {
        tuple(window_order(500, seed=seed, epoch=epoch, window=window).tolist())
        for seed in range(3)
        for epoch in range(3)
        for window in range(3)
    }
    assert len(orders) == 27
