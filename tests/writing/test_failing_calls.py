"""Every verb with a failing call of the operating system: one line that names the output, nothing left lying, and the
same command then ends with the bytes of an undisturbed one. So does a command whose process was killed, and one on a
system that lacks a call altogether.

A few positions of each verb are tried, each with another error. PATCHSAE_WALK=all tries all errors at all positions,
which takes hours; `python tests/writing/walk.py` does the same for chosen verbs and says what went wrong.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command
from verbs import LACKING, VERBS, Forked, Trouble, build_shim, contents, copy_inputs, leftovers
from walk import ERRORS, KILL, Walk

import cli

pytestmark = pytest.mark.slow

TROUBLES = (*ERRORS, KILL)
EVERYTHING = os.environ.get("PATCHSAE_WALK") == "all"


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory, memory_folder: Path) -> Iterator[Walk]:
    forked = Forked(copy_inputs(memory_folder), build_shim(tmp_path_factory.mktemp("shim")))
    (memory_folder / "out").mkdir()
    yield Walk(forked, memory_folder / "out")
    forked.close()


WRITE_NOTHING = {"info", "verify", "explore"}  # explore writes what `name --set` writes, when it is asked to
MADE_OF_OTHERS = {"quickstart"}


def test_every_verb_is_tried() -> None:
    tried = {verb.command.split()[0] for verb in VERBS.values()}
    assert set(get_command(cli.app).commands) - tried == WRITE_NOTHING | MADE_OF_OTHERS  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", VERBS)
def test_a_failing_call_is_one_line_and_the_same_command_completes(walk: Walk, name: str) -> None:
    if EVERYTHING:
        cases = [(error, at) for error in TROUBLES for at in walk.positions(name, None)]
    else:
        cases = list(zip(TROUBLES, walk.positions(name, len(TROUBLES)), strict=False))
        turn = list(VERBS).index(name) % len(cases)  # another error at each position of another verb
        cases = [(error, at) for (error, _), (_, at) in zip(cases[turn:] + cases[:turn], cases, strict=True)]
    wrong = [f"{error} at {at}: {text}" for error, at in cases for text in walk.attempt(name, error, at)[1]]
    assert wrong == []


@pytest.mark.parametrize("lacks", LACKING)
def test_every_verb_writes_the_same_where_the_system_lacks(walk: Walk, lacks: str) -> None:
    if lacks == "/proc" and os.geteuid() != 0:
        pytest.skip("only root can hide /proc")
    wrong = []
    for name, verb in VERBS.items():
        expected, _ = walk.undisturbed(name)
        out = walk.fresh(name)
        done = walk.forked.run(verb.command.format(o=out), out, Trouble(lacks=lacks))
        if done.code or done.stderr or contents(verb, out) != expected or leftovers(out):
            wrong.append((name, done.code, done.stderr[-500:], leftovers(out)))
        shutil.rmtree(out)
    assert wrong == []
