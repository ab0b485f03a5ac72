"""The store's own tests pass where the system lacks a call: they are removed from a child process that runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
LOADER = "tests/saetrain/data/test_loader.py"
STORE = ["tests/actcache/store/test_reader.py", "tests/actcache/store/test_writer.py"]
MISSING = {
    "what macOS lacks": (
        "import mmap\nfor name in ('preadv', 'posix_fadvise', 'O_DIRECT', 'sched_getaffinity'): delattr(os, name)\n"
        "del mmap.MADV_HUGEPAGE",
        [*STORE, LOADER],
    ),
    "hard links": (
        "import errno\ndef link(*paths, **options): raise OSError(errno.ENOTSUP, 'no links')\nos.link = link",
        STORE,
    ),
}


@pytest.mark.parametrize(("missing", "tests"), MISSING.values(), ids=MISSING)
def test_the_store_works_without(missing: str, tests: list[str], tmp_path: Path) -> None:
    (tmp_path / "lacking.py").write_text(f"import os\n{missing}\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "lacking", "-p", "no:cacheprovider", "-p", "no:xdist",
         "-o", "addopts=--import-mode=importlib", *tests],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
