"""The command line's threads sleep when they wait, unless the user says otherwise. OpenMP itself tells them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def openmp_settings(**environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", "import cli, torch; torch.ones(9).sum()"], cwd=ROOT, capture_output=True, text=True,
        check=True, env={**kept, "PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "VERBOSE", **environment},
    )  # fmt: skip
    return done.stderr.upper().replace(" ", "")


def test_waiting_threads_sleep() -> None:
    assert "OMP_WAIT_POLICY='PASSIVE'" in openmp_settings()


@pytest.mark.parametrize("policy", ["ACTIVE", "PASSIVE"])
def test_what_the_user_has_set_holds(policy: str) -> None:
    assert f"OMP_WAIT_POLICY='{policy}'" in openmp_settings(OMP_WAIT_POLICY=policy)
