"""Every verb takes and writes paths with spaces, other scripts, signs that mean something elsewhere, and bytes that are
not text."""

import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from verbs import VERBS, Forked, copy_inputs, leftovers, put_copies

from actcache import verify

pytestmark = pytest.mark.slow

NAMES = {
    "spaces and scripts": "Größe und Maß, 画像 на диске 🖼",
    "signs": "it's 100% [a-z]* #1 & {o} $HOME ~ \\n <b>",
    "not UTF-8": os.fsdecode(b"B\xe4ume \xff\xfe"),
}

NEED_WEIGHTS = {
    "extract", "extract-zstd", "adapt", "name", "evaluate", "intervene", "attribute", "steer", "compare", "look-sheet",
    "look-page",
}  # fmt: skip
"""The weights of these verbs' model lie there too, and safetensors opens no path that is not UTF-8."""


@pytest.fixture(scope="module")
def forked(memory_folder: Path) -> Iterator[Forked]:
    process = Forked(copy_inputs(memory_folder))
    yield process
    process.close()


@pytest.mark.parametrize("kind", NAMES)
def test_every_verb_takes_and_writes_such_paths(forked: Forked, memory_folder: Path, kind: str) -> None:
    folder = memory_folder / NAMES[kind]
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system does not take such names")
    inputs = Path(shutil.copytree(forked.inputs, folder / "inputs"))
    images = Path(shutil.copytree(inputs / "images", inputs / NAMES[kind]))
    wrong = []
    for name, verb in VERBS.items():
        out = folder / name / NAMES[kind]
        put_copies(verb, inputs, out)
        words = [
            str(images if word == "images" else inputs / word) if (inputs / word).exists()
            else word.replace("{o}", str(out))
            for word in verb.command.split()
        ]  # fmt: skip
        done = forked.run(shlex.join(words), out)
        missing = [made for made in verb.out if not (out / made).exists()]
        problems = [str(p) for made in verb.out if (out / made / "artifact.json").exists()
                    for p in verify(out / made).problems]  # fmt: skip
        right = done.code == 0 and not done.stderr and not missing
        if kind == "not UTF-8" and name in NEED_WEIGHTS and done.code == 1:
            right = done.stderr.count("\n") == 1 and "is not valid UTF-8" in done.stderr
        if not right or problems or leftovers(out):
            wrong.append((name, done.code, done.stderr[-300:], missing, problems, leftovers(out)))
    assert wrong == []
