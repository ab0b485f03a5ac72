"""Memory for reads begins at a cache line, whatever its size."""

import numpy as np
import pytest

from actcache.cache_lines import empty_at_line


@pytest.mark.parametrize("shape", [(), (0,), (3,), (5, 7), (2, 3, 768), (4096, 768)])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", "u1"])
def test_memory_begins_at_a_line(shape: tuple[int, ...], dtype: str) -> None:
    array = empty_at_line(shape, dtype)
    assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
    assert array.flags.c_contiguous
    assert array.size == 0 or array.ctypes.data % 64 == 0  # numpy has no address for an empty array
