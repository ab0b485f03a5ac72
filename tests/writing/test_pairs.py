"""Two processes that write one output at once: one of them does, the other one is told who, and nothing is broken.

A few pairs of the verbs that write artifacts. `python tests/writing/pairs.py` tries fifty pairs of every verb.
"""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pairs import try_pair
from verbs import VERBS, Forked, copy_inputs
from walk import Walk

NAMES = ("extract", "train", "encode", "analyze", "convert", "import", "name-set", "evaluate")


@pytest.fixture(scope="module")
def walk(memory_folder: Path) -> Iterator[Walk]:
    forked = Forked(copy_inputs(memory_folder), warm=",".join(NAMES))
    (memory_folder / "out").mkdir()
    yield Walk(forked, memory_folder / "out")
    forked.close()


@pytest.mark.parametrize("name", NAMES)
def test_of_two_processes_one_writes_and_the_other_says_so(walk: Walk, name: str) -> None:
    walk.undisturbed(name)
    started = time.monotonic()
    walk.forked.run(VERBS[name].command.format(o=walk.fresh(name)), walk.folder)
    duration_s = time.monotonic() - started
    wrong = [text for number in range(3) for text in try_pair(walk, name, random.Random(number), duration_s)]
    assert wrong == []
