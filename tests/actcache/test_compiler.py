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
    assert list((tmp_path / "__pycache__").glob("*.nbc"))


@pytest.mark.skipif(os.name != "posix", reason="a folder is made read-only")
def test_kernels_compile_where_nothing_can_be_kept(tmp_path: Path) -> None:
    """/proc refuses folders even to root, so that no locator of numba finds a place."""
    pytest.importorskip("numba")
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    (tmp_path / "__pycache__").write_text("a file where the folder would be")
    places = {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere", "NUMBA_CACHE_DIR": ""}
    assert find(tmp_path, FIND + "print(found.double(2.5))", **places) == "5.0"
