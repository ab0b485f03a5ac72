"""The entries of some tokens are those of the dense codes, whether they are read one by one or by memory map."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from actcache import CorruptError
from saetrain import CodeStore
from saetrain.codes import store as store_module

SIZES, N_TOKENS, N_LATENTS = (5, 1, 7), 6, 40


@pytest.fixture(scope="module")
def dense() -> NDArray[np.float16]:
    """[I, T, F]; some tokens and the whole last image are silent."""
    rng = np.random.default_rng(0)
    fires = (rng.random((sum(SIZES), N_TOKENS, N_LATENTS)) < 0.1) & (rng.random((sum(SIZES), N_TOKENS, 1)) < 0.8)
    fires[-1] = False
    return np.where(fires, rng.random(fires.shape) + 0.1, 0).astype(np.float16)


@pytest.fixture(scope="module")
def codes(dense: NDArray[np.float16], tmp_path_factory: pytest.TempPathFactory) -> CodeStore:
    from small_codes import write_codes

    return write_codes(tmp_path_factory.mktemp("rows") / "x.codes", dense, SIZES)


@pytest.mark.parametrize("sparse", [0, 1, 4, 1 << 40])
@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.integers(0, sum(SIZES) * N_TOKENS - 1), unique=True, max_size=60).map(sorted))
def test_they_are_those_of_the_dense_codes(
    codes: CodeStore, dense: NDArray[np.float16], sparse: int, rows: list[int]
) -> None:
    kept, store_module.SPARSE = store_module.SPARSE, sparse
    try:
        found = codes.read_rows(np.array(rows, dtype=np.int64))
    finally:
        store_module.SPARSE = kept
    flat = dense.reshape(-1, N_LATENTS)[rows]
    place, latent = np.nonzero(flat)
    np.testing.assert_array_equal(found.row, np.array(rows, dtype=np.int64)[place])
    np.testing.assert_array_equal(found.latent, latent)
    np.testing.assert_array_equal(found.value, flat[place, latent])


@pytest.mark.parametrize("sparse", [0, 1 << 40])
@pytest.mark.parametrize("column", ["indptr", "latent", "value"])
def test_an_array_that_was_cut_is_one_line(
    dense: NDArray[np.float16], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sparse: int, column: str
) -> None:
    from small_codes import write_codes

    monkeypatch.setattr(store_module, "SPARSE", sparse)
    opened = write_codes(tmp_path / "x.codes", dense, SIZES)
    opened._checks.small = False  # as for codes that are too large to be checked whole
    file = tmp_path / "x.codes" / "codes.zarr" / "2" / column / "c" / "0"
    file.write_bytes(file.read_bytes()[:-64])
    rows = np.arange(6 * N_TOKENS, 12 * N_TOKENS)
    with pytest.raises(CorruptError) as error:
        opened.read_rows(rows)
    assert "\n" not in str(error.value)
    file.unlink()
    with pytest.raises(CorruptError, match=f"no readable array {column}"):
        opened.read_rows(rows)
