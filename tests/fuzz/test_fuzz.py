"""A short fuzzing finds no traceback, crash, hang or runaway memory. run.py says how to run it for longer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent


@pytest.mark.slow
def test_half_a_minute_of_random_and_damaged_input_finds_nothing() -> None:
    first = ["--first-seed", "1"] if os.environ.get("CI") else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FUZZ / "run.py"), "--seconds", "24", *first]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=290)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
