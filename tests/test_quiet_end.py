"""A short command ends quietly: no thread of pyarrow holds a buffer of Python's when the process ends."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "pipeline"

CODE = """
import os, sys
sys.path.insert(0, {root!r})
from actcache.store import {module}
{statement}
names = [open(f"/proc/self/task/{{task}}/comm").read().strip() for task in os.listdir("/proc/self/task")]
print(sum(not name.startswith("jemalloc") for name in names), "pyarrow.dataset" in sys.modules)
"""


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("read_images", "from pathlib import Path; read_images(Path('a.acts'))"),
        ("read_images", "from saetrain import CodeStore; CodeStore.open('a.codes').images"),
        (
            "read_images",
            "from analysis import ConceptTable; t = ConceptTable.open('a.concepts'); t.table, t.top_images",
        ),
    ],
)
def test_reading_a_table_starts_no_threads(module: str, statement: str) -> None:
    code = CODE.format(root=str(ROOT), module=module, statement=statement)
    done = subprocess.run([sys.executable, "-c", code], cwd=GOLDEN, capture_output=True, text=True, check=True)
    assert done.stdout == "1 False\n"
