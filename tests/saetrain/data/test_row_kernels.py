"""The kernels of the loader against numpy, and the loader with and without them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.compiler import find_kernels
from saetrain.data.chunks import list_rows

ROOT = Path(__file__).parents[3]

DIGEST = """
import hashlib, sys
from itertools import islice
from saetrain import ActivationLoader
digest = hashlib.sha256()
for pool in (1 << 20, 1000, 1):
    for n_threads in (1, 3):
        loader = ActivationLoader(sys.argv[1], batch_size=1536, pool_tokens=pool, n_threads=n_threads)
        for batch in islice(loader.batches(2), 9):
            for tensor in batch[:3]:
                digest.update(tensor.numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.fixture(scope="module")
def kernels() -> Any:
    found = find_kernels("saetrain.data.row_kernels")
    if found is None:
        pytest.skip("there is no compiler")
    return found


@settings(deadline=None)
@given(st.data())
def test_rows_are_listed_as_by_numpy(kernels: Any, data: st.DataObject) -> None:
    """Also units of which nothing is wanted."""
    n_units = data.draw(st.integers(0, 6))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    wanted, per_image = rng.integers(0, 5, n_units), rng.integers(1, 6, n_units)
    edge = np.cumsum(wanted) - wanted
    images = np.sort(rng.choice(100, int(wanted.sum()), replace=False))
    skip = rng.integers(0, wanted * per_image + 1)
    stop = rng.integers(skip, wanted * per_image + 1)
    arguments = (
        images,
        images % 7,
        edge,
        per_image,
        rng.integers(0, 9, n_units),
        skip,
        stop,
        rng.integers(0, 99, n_units),
    )
    ours, theirs = np.full((2, int((stop - skip).sum()), 3), -1)
    kernels.list_rows(*arguments, ours)
    list_rows(*arguments, theirs)
    np.testing.assert_array_equal(ours, theirs)


@settings(deadline=None)
@given(n=st.integers(0, 9), n_words=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_rows_are_drawn_as_by_numpy(kernels: Any, n: int, n_words: int, seed: int) -> None:
    """Whatever their bits are (NaN among them), equal places among them; nothing else of the batch is touched."""
    rng = np.random.default_rng(seed)
    source = rng.integers(0, 2**64, (12, n_words), dtype=np.uint64)
    drawn = rng.integers(0, 12, (20, 3))
    target, numbers = np.zeros((15, n_words), dtype=np.uint64), np.zeros((2, 15), dtype=np.int64)
    expected, expected_numbers = target.copy(), numbers.copy()
    kernels.draw_rows(source, drawn, 5, n, target, numbers, 3)
    expected[3 : 3 + n] = source[drawn[5 : 5 + n, 0]]
    expected_numbers[:, 3 : 3 + n] = drawn[5 : 5 + n, 1:].T
    np.testing.assert_array_equal(target, expected)
    np.testing.assert_array_equal(numbers, expected_numbers)
    out, order = np.zeros_like(drawn), rng.permutation(20)
    kernels.order_rows(drawn, order, out)
    np.testing.assert_array_equal(out, drawn[order])


@pytest.mark.slow
def test_batches_are_the_same_without_a_compiler(planted_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = set()
    for compiler in ("on", "off"):
        monkeypatch.setenv("PATCHSAE_COMPILER", compiler)
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        command = [sys.executable, "-c", DIGEST, str(planted_store)]
        digests.add(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert len(digests) == 1
