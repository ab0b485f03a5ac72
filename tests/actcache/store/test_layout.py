"""The arithmetic of the format: chunks tile a shard without gap or overlap, ranges partition the images."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actcache import SettingsError
from actcache.store import StoreLayout, choose_shape
from actcache.store.layout import INDEX_ABSENT


@st.composite
def layouts(draw: st.DrawFn) -> StoreLayout:
    chunk = draw(st.sampled_from([16, 64]))
    return StoreLayout(
        n_images=draw(st.integers(1, 700)),
        grid=(draw(st.integers(1, 5)), draw(st.integers(1, 5))),
        d_model=draw(st.integers(1, 9)),
        chunk_images=chunk,
        shard_images=chunk * draw(st.integers(1, 4)),
        itemsize=draw(st.sampled_from([2, 4])),
    )


@given(layouts())
def test_shards_and_blocks_partition_the_images(layout: StoreLayout) -> None:
    images = [
        image
        for shard in range(layout.n_shards)
        for block in range(layout.n_blocks(shard))
        for image in layout.block_range(shard, block)
    ]
    assert images == list(range(layout.n_images))


@given(layouts(), st.sampled_from(["patches", "cls"]))
def test_raw_chunks_tile_the_shard_and_the_index_says_where(layout: StoreLayout, array: str) -> None:
    for shard in range(layout.n_shards):
        size = layout.chunk_bytes(array)
        offsets = {
            (block, row): layout.chunk_offset(array, shard, block, row)
            for block in range(layout.n_blocks(shard))
            for row in range(layout.n_rows(array))
        }
        assert sorted(offsets.values()) == [i * size for i in range(len(offsets))]
        index = layout.raw_index(array, shard).reshape(layout.blocks_per_shard, layout.n_rows(array), 2)
        for block in range(layout.blocks_per_shard):
            for row in range(layout.n_rows(array)):
                expected = [offsets[block, row], size] if (block, row) in offsets else [INDEX_ABSENT] * 2
                assert index[block, row].tolist() == expected
        assert layout.shard_bytes(array, shard) == len(offsets) * size + index.nbytes + 4


@given(st.integers(1, 3_000_000))
def test_the_chosen_shape_is_within_bounds(n_images: int) -> None:
    chunk, shard = choose_shape(n_images)
    assert chunk == (64 if n_images >= 1024 else 16)
    assert 256 <= shard <= 1024
    assert shard % chunk == 0


def test_a_given_shard_size_is_kept_or_refused() -> None:
    assert choose_shape(201, 16) == (16, 16)
    assert choose_shape(5000, 128) == (64, 128)
    assert choose_shape(5000, 48) == (16, 48)
    for wrong in (0, -16, 40):
        with pytest.raises(SettingsError, match=f"(multiple of 16|at least 16), got {wrong}"):
            choose_shape(100, wrong)


def test_a_chunk_of_vit_b_16_is_a_multiple_of_a_page() -> None:
    layout = StoreLayout(n_images=50_000, grid=(14, 14), d_model=768, chunk_images=64, shard_images=1024)
    assert layout.chunk_bytes("patches") == 1_376_256
    assert layout.chunk_bytes("patches") % 4096 == 0
    assert np.prod(layout.chunk_shape("patches")) * 2 == 1_376_256


def test_shapes_are_chosen_by_the_number_of_images() -> None:
    found = {n: choose_shape(n) for n in (1, 1023, 1024, 6_400, 10_000, 50_000)}
    assert found == {1: (16, 256), 1023: (16, 256), 1024: (64, 256), 6_400: (64, 448), 10_000: (64, 640),
                     50_000: (64, 1024)}  # fmt: skip
    assert [choose_shape(*given) for given in ((1024, 16), (1023, 64), (1024, 64))] == [(16, 16), (16, 64), (64, 64)]
