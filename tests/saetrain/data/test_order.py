"""The order of rows: every training image once per epoch, in an order that (seed, epoch, stream, window) decide."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from saetrain import held_out_images, train_images
from saetrain.data.order import count_steps, plan_epoch, window_order


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
def plans(draw: st.DrawFn) -> dict[str, Any]:
    n_streams = draw(st.sampled_from([1, 2, 4, 8]))
    return {
        "counts": np.array(draw(st.lists(st.integers(1, 40), min_size=1, max_size=60))),
        "batch_size": n_streams * draw(st.integers(1, 8)),
        "n_streams": n_streams,
        "window_rows": draw(st.integers(1, 300)),
        "seed": draw(st.integers(0, 2**40)),
        "epoch": draw(st.integers(0, 10)),
    }


@settings(deadline=None)
@given(plans())
def test_every_row_is_in_one_window_and_streams_are_equally_long(plan: dict[str, Any]) -> None:
    streams = plan_epoch(**plan)
    steps = count_steps(int(plan["counts"].sum()), plan["batch_size"])
    seen = set()
    for number, windows in enumerate(streams):
        position = 0
        for window in windows:
            assert (window.stream, window.start) == (number, position)
            position += window.n_rows
            for unit, low, high in zip(window.units, window.skip, window.stop, strict=True):
                assert 0 <= low < high <= plan["counts"][unit]
                seen |= {(unit, row) for row in range(low, high)}
        assert position == steps * plan["batch_size"] // plan["n_streams"]
    assert len(seen) == steps * plan["batch_size"]


@settings(deadline=None)
@given(plans())
def test_a_window_is_cut_at_units_and_keeps_near_its_size(plan: dict[str, Any]) -> None:
    largest = int(plan["counts"].max())
    for stream, windows in enumerate(plan_epoch(**plan)):
        for number, window in enumerate(windows):
            share = (stream + 1) / plan["n_streams"] if number == 0 else 1
            assert window.n_rows <= max(1, plan["window_rows"] * share) + 2 * largest
            inner = slice(1 if number == 0 else 0, -1 if number == len(windows) - 1 else None)
            assert (window.skip[inner] == 0).all()
            assert (window.stop[inner] == plan["counts"][window.units[inner]]).all()


def test_the_first_windows_end_one_after_the_other() -> None:
    plan = plan_epoch(np.full(1000, 10), batch_size=8, n_streams=8, window_rows=160, seed=0, epoch=0)
    assert [windows[0].n_rows for windows in plan] == [20, 40, 60, 80, 100, 120, 140, 160]
    assert {window.n_rows for windows in plan for window in windows[1:-1]} == {160}


def test_each_epoch_and_seed_forms_its_own_windows_and_repeats_them() -> None:
    def windows(seed: int, epoch: int) -> str:
        plan = plan_epoch(np.full(100, 17), batch_size=64, n_streams=4, window_rows=200, seed=seed, epoch=epoch)
        return str([window.units.tolist() for stream in plan for window in stream])

    assert windows(1, 0) == windows(1, 0)
    assert len({windows(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 100), st.integers(0, 7), st.integers(0, 100))
def test_a_window_order_is_a_permutation_that_repeats(n: int, seed: int, epoch: int, stream: int, window: int) -> None:
    order = window_order(n, seed=seed, epoch=epoch, stream=stream, window=window)
    assert sorted(order.tolist()) == list(range(n))
    assert np.array_equal(order, window_order(n, seed=seed, epoch=epoch, stream=stream, window=window))


def test_every_seed_epoch_stream_and_window_has_its_own_order() -> None:
    orders = {
        tuple(window_order(500, seed=seed, epoch=epoch, stream=stream, window=window).tolist())
        for seed in range(3)
        for epoch in range(3)
        for stream in range(3)
        for window in range(3)
    }
    assert len(orders) == 81
