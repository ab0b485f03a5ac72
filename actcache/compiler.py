"""Kernels: loops over numbers that numba compiles, where it is installed.

A module of kernels imports this one and marks its functions `@compiled`; those who call them ask `find_kernels` for the
module, and compute the same with torch or numpy where there is no compiler (`pip install 'patchsae[fast]'`), or where
the environment says PATCHSAE_COMPILER=off. Kernels release the interpreter's lock and start no threads: callers divide
rows among threads of their own, so that no result depends on their number. Machine code is cached beside the module, or
in the user's cache folder, in a folder that is named after a digest of its source.
"""

import os
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any, TypeVar, cast

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_setting = Lock()
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

    options = {"nogil": True, "fastmath": FAST_MATH, "error_model": "numpy"}
    if not (folder := _cache_folder(function)):
        return cast(F, numba.njit(**options)(function))
    with _setting:  # which other kernels may be reading
        given = numba.config.CACHE_DIR
        try:
            numba.config.CACHE_DIR = folder
            kernel = numba.njit(cache=True, **options)(function)
        except RuntimeError:  # nothing can be written to the folder after all
            return cast(F, numba.njit(**options)(function))
        finally:
            numba.config.CACHE_DIR = given
    for name in ("load_overload", "save_overload"):
        setattr(kernel._cache, name, _one_at_a_time(getattr(kernel._cache, name), Path(folder, "lock")))
    return cast(F, kernel)


def _one_at_a_time(access: Callable[..., Any], lock: Path) -> Callable[..., Any]:
    """Let one process at a time use the cache, and go on without it where it cannot be read or written.

    numba names files by what it has read before it writes them, so that two that write at once mix their code, and a
    disk that is full would end a training.
    """

    def use(*arguments: Any) -> Any:
        try:
            with lock.open("a") as file:
                if fcntl is None:
                    return access(*arguments)
                fcntl.flock(file, fcntl.LOCK_EX)
                try:
                    return access(*arguments)
                finally:  # closing alone would leave it to a process that was forked meanwhile
                    fcntl.flock(file, fcntl.LOCK_UN)
        except OSError:
            return None

    return use


def _cache_folder(function: Callable[..., Any]) -> str:
    """A folder named after all source that a kernel is made of; empty where it cannot be made.

    numba only looks at the file of the kernel itself. With an older machine code of a kernel that it calls, it would
    compute what it no longer says.
    """
    given, home = os.environ.get("NUMBA_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    beside = Path(function.__code__.co_filename).parent / "__pycache__"
    for place in [given] if given else [beside, Path(home) / "patchsae"]:
        try:
            folder = Path(place, f"kernels-{_digest(tuple(sorted(_find_sources(function))))}")
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return str(folder)
    return ""


def _find_sources(function: Callable[..., Any]) -> set[str]:
    """The files of a function, of the kernels that its module has imported, and of this module with its options."""
    found, left = {__file__}, [function]
    while left:
        each = left.pop()
        if (file := each.__code__.co_filename) not in found:
            found.add(file)
            left += [value.py_func for value in each.__globals__.values() if hasattr(value, "py_func")]
    return found


@cache
def _digest(files: tuple[str, ...]) -> str:
    return sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:12]
