"""Kernels are compiled where numba is installed; where it is not, or is switched off, there are none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

KERNELS = """
from actcache.compiler import compiled

@compiled
def double(x):
    return 2 * x
"""

FIND = "from actcache.compiler import find_kernels; found = find_kernels('kernels_of_a_test'); "


def find(folder: Path, code: str, **environment: str) -> str:
    """What a process prints that imports the kernels of `folder`."""
    (folder / "kernels_of_a_test.py").write_text(KERNELS)
    variables = {**os.environ, "PATCHSAE_COMPILER": "on", "PYTHONPATH": f"{folder}:{ROOT}", **environment}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_without_a_compiler_there_are_no_kernels(tmp_path: Path) -> None:
    assert find(tmp_path, "import sys; sys.modules['numba'] = None; " + FIND + "print(found)") == "None"


def test_kernels_can_be_switched_off(tmp_path: Path) -> None:
    assert find(tmp_path, FIND + "print(found)", PATCHSAE_COMPILER="off") == "None"


def test_machine_code_is_kept_beside_the_module(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    assert find(tmp_path, FIND + "print(found.double(2.5))") == "5.0"
    assert list((tmp_path / "__pycache__").glob("kernels-*/*/*.nbc"))


def test_a_change_of_a_kernel_that_is_called_is_seen(tmp_path: Path) -> None:
    """numba alone goes on with the machine code that it has kept of the caller."""
    pytest.importorskip("numba")
    code = "from actcache.compiler import find_kernels; print(find_kernels('callers').sum_up(3))"
    (tmp_path / "callers.py").write_text(
        "from actcache.compiler import compiled\nfrom parts import part\n\n@compiled\ndef sum_up(n):\n"
        "    total = 0\n    for i in range(n):\n        total += part(i)\n    return total\n"
    )
    for factor, expected in ((2, "6"), (50, "150")):
        (tmp_path / "parts.py").write_text(
            f"from actcache.compiler import compiled\n\n@compiled\ndef part(i):\n    return {factor} * i\n"
        )
        assert find(tmp_path, code) == expected


@pytest.mark.skipif(os.name != "posix", reason="a folder is made read-only")
def test_kernels_compile_where_nothing_can_be_kept(tmp_path: Path) -> None:
    """/proc refuses folders even to root, so that no locator of numba finds a place."""
    pytest.importorskip("numba")
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    (tmp_path / "__pycache__").write_text("a file where the folder would be")
    places = {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere", "NUMBA_CACHE_DIR": ""}
    assert find(tmp_path, FIND + "print(found.double(2.5))", **places) == "5.0"


@pytest.mark.skipif(os.name != "posix", reason="the size of files is limited")
def test_kernels_run_where_their_code_cannot_be_kept_after_all(tmp_path: Path) -> None:
    """As on a full disk: numba writes at the first call, long after the folder was found to take files."""
    pytest.importorskip("numba")
    limit = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, -1)); "
    )
    assert find(tmp_path, FIND + limit + "print(found.double(2.5))") == "5.0"


def test_processes_that_compile_at_once_do_not_mix_their_code(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    (tmp_path / "kernels_of_a_test.py").write_text(KERNELS)
    variables = {**os.environ, "PATCHSAE_COMPILER": "on", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    kinds = ("np.float32(2.5)", "np.arange(3)", "3")
    code = "import numpy as np; " + FIND + "print(np.sum(found.double({kind})))"
    for _ in range(2):  # the second time, all read what was kept
        running = [
            subprocess.Popen(
                [sys.executable, "-c", code.format(kind=kind)], env=variables, stdout=subprocess.PIPE, text=True
            )
            for kind in kinds
        ]
        assert [float(process.communicate()[0]) for process in running] == [5, 6, 6]
