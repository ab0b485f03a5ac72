"""Kernels: loops over numbers that numba compiles, where it is installed.

A module of kernels imports this one and marks its functions `@compiled`; those who call them ask `find_kernels` for the
module, and compute the same with torch or numpy where there is no compiler (`pip install 'patchsae[fast]'`), or where
the environment says PATCHSAE_COMPILER=off. Kernels release the interpreter's lock and start no threads: callers divide
rows among threads of their own, so that no result depends on their number. Machine code is cached beside the module, or
in the user's cache folder.
"""

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

FAST_MATH = {"reassoc", "contract", "nsz"}
"""Sums in any order and fused multiply-adds; infinities and NaN keep their meaning."""


@cache
def find_kernels(module: str) -> ModuleType | None:
    """Import a module of kernels; None where there is no compiler, or where it is switched off."""
    if os.environ.get("PATCHSAE_COMPILER", "on") == "off":
        return None
    try:
        import numba  # noqa: F401
    except ImportError:
        return None
    return import_module(module)


def compiled(function: F) -> F:
    """Compile a function when it is first called, for the types of that call."""
    import numba

    try:
        kernel: F = numba.njit(nogil=True, cache=True, fastmath=FAST_MATH, error_model="numpy")(function)
    except RuntimeError:  # no folder for the cache can be written
        kernel = numba.njit(nogil=True, fastmath=FAST_MATH, error_model="numpy")(function)
    return kernel
