"""Batches hold what is read shard by shard."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from actcache import CorruptError
from saetrain import CodeStore
from saetrain.codes import batches, checks, read_batches


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


def test_pointers_beyond_what_is_stored_are_refused_before_room_is_made(
    planted_codes: CodeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "SMALL_BYTES", 0)  # the checksums of large codes are not compared at the first touch
    folder = Path(shutil.copytree(planted_codes.path, tmp_path / "x.codes"))
    file = folder / "codes.zarr" / "0" / "latent_indptr" / "c" / "0"
    pointers = np.fromfile(file, np.int64)
    pointers[-1] = 1 << 50
    pointers.tofile(file)
    codes = CodeStore.open(folder)
    with pytest.raises(CorruptError, match=r"Shard 0 of .* contradict each other"):
        list(read_batches(codes, 0, codes.n_latents, 1 << 20))
    assert len(list(read_batches(codes, 0, codes.n_latents - 1, 1 << 20))) == 1
