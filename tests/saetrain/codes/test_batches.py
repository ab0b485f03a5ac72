"""Batches hold what is read shard by shard."""

from pathlib import Path

import numpy as np
import pytest

from saetrain import CodeStore
from saetrain.codes import batches, read_batches


@pytest.mark.parametrize("n_entries", [1, 50, 1 << 20])
@pytest.mark.parametrize("pointer_bytes", [1, 1 << 20])
def test_batches_hold_what_is_read_shard_by_shard(
    tiny_codes: Path, n_entries: int, pointer_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = CodeStore.open(tiny_codes)
    monkeypatch.setattr(batches, "POINTER_BYTES", pointer_bytes)
    start, stop = 3, codes.n_latents - 2
    shard = 0
    for batch in read_batches(codes, start, stop, n_entries):
        for column in range(batch.pointers.shape[1]):
            expected = codes.read_latents(shard, start, stop)
            first, last = batch.pointers[[0, -1], column]
            np.testing.assert_array_equal(batch.pointers[:, column] - first, expected.latent_indptr)
            np.testing.assert_array_equal(batch.row[first:last], expected.row)
            np.testing.assert_array_equal(batch.value[first:last], expected.latent_value)
            shard += 1
        assert batch.is_last == (shard == codes.n_shards)
    assert shard == codes.n_shards
