"""Paths and cheap values are refused before torch is loaded, whichever verb and whichever argument it is.

One real process runs all wrong commands, one after the other, and says after each whether torch was loaded.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import cli

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "pipeline"
MODEL = "--model model/tiny.json --pretrained model/tiny.safetensors"
VERBS = get_command(cli.app).commands  # type: ignore[attr-defined]

RIGHT = {
    "quickstart": "new", "extract": f"images new.acts {MODEL} --layer 1", "train": "a.acts new-run",
    "encode": "run a.acts new.codes", "analyze": "a.codes new.concepts", "query": "a.codes --latent 19",
    "look": "images/class0/00.png --sae run",
    "name": "a.concepts", "report": "a.concepts new.html", "explore": "a.concepts", "evaluate": "run b.acts new.json",
    "intervene": "run b.acts new.json", "attribute": "run b.acts new.json", "steer": "run b.acts new.json",
    "rules": "a.codes new.json", "probe": "a.codes new.json --label label_name",
    "localize": "a.codes", "inspect": "run --store a.acts",
    "benchmark": "run b.acts new.json",
    "adapt": f"images new.prompts {MODEL}", "compare": "a.concepts adapted.concepts new.json",
    "convert": "run new-folder --to saelens", "publish": "a.concepts new-folder", "info": "a.acts", "verify": "a.acts",
    "import": f"a.concepts/nearest_cosine.npy new.acts {MODEL} --layer 1",
}  # fmt: skip
"""A right command for every verb; each wrong one differs from it in one argument."""

WRONG = {
    "device": "gpu", "precision": "half", "on_error": "ignore", "to": "pickle", "log_to": "mlflow", "tau": None,
    "model": "ViT-B-61", "pretrained": "nowhere/weights.pt", "templates": "nothing", "template": "nothing",
    "scheduler": "nowhere", "dtype": "float8", "codec": "gzip", "variant": "magic", "sites": "nowhere",
    "tokens": "none", "method": "none", "explain": "nothing", "score": "median", "show": "nothing", "rank": "none",
    "normalize": "nothing",
    "penalty": "nothing", "init": "nothing", "classes": "some",
    "where": " ", "group": " ", "versus": " ", "chosen_where": " ",
    "n_workers": "0", "n_threads": "0", "log_every": "0", "checkpoint_every": "0", "batch_size": "0",
    "n_images": "0", "n_tokens": "0",
}  # fmt: skip
"""A wrong value for a flag; None where any text is right. Paths are told by their checks."""

HINTS = {verb: command.callback.__annotations__ for verb, command in VERBS.items()}

CODE = """
import contextlib, io, json, sys
sys.path.insert(0, {root!r})
import cli
from typer.main import get_command
program = get_command(cli.app)
for command in json.loads(sys.stdin.read()):
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            program.main(command, prog_name="patchsae")
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, err.getvalue(), "torch" in sys.modules]), flush=True)
    if "torch" in sys.modules:
        break
"""


def wrong_commands() -> dict[str, list[str]]:
    """verb.argument -> a command that is wrong there."""
    commands = {}
    for verb, right in RIGHT.items():
        words = right.split()
        command = VERBS[verb]
        checks = command.callback.checks
        n_arguments = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
        arguments = [each for each in command.params if each.param_type_name == "argument"][:n_arguments]
        for place, each in enumerate(arguments):
            if names := [type(check).__name__ for _, check in checks.get(each.name, [])]:
                bad = {"Makes": "words.txt", "Writes": "new.xyz", "Publishes": "words.txt"}.get(
                    names[0], "nowhere/there"
                )
                commands[f"{verb}.{each.name}"] = [verb, *words[:place], bad, *words[place + 1 :]]
        for each in command.params:
            if each.param_type_name != "option" or each.name in ("help", *(a.name for a in arguments)):
                continue
            names = [type(check).__name__ for _, check in checks.get(each.name, [])]
            is_path = any(name in ("Takes", "Reads") for name in names) or each.name in (
                "images", "results", "test", "masks", "vocabulary",
            )  # fmt: skip
            value = "new.xyz" if "Writes" in names else "nowhere/there" if is_path else WRONG.get(each.name)
            if value is not None and (is_path or names or each.name in WRONG):
                commands[f"{verb}.{each.name}"] = [verb, *words, each.opts[0], value]
    return commands


COMMANDS = wrong_commands()


def run_all(commands: list[list[str]]) -> list[Any]:
    """[exit code, what stderr said, whether torch was loaded] of each command; after torch, in a new process."""
    outcomes: list[Any] = []
    while len(outcomes) < len(commands):
        done = subprocess.run(
            [sys.executable, "-c", CODE.format(root=str(ROOT))], input=json.dumps(commands[len(outcomes) :]),
            cwd=GOLDEN, capture_output=True, text=True, check=True,
        )  # fmt: skip
        outcomes += map(json.loads, done.stdout.splitlines())
    return outcomes


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    return dict(zip(COMMANDS, run_all(list(COMMANDS.values())), strict=True))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_argument_is_refused_before_torch_is_loaded(outcomes: dict[str, Any], name: str) -> None:
    code, errors, loaded = outcomes[name]
    assert not loaded, " ".join(COMMANDS[name])
    assert code in (1, 2), errors
    assert "Traceback" not in errors
    if code == 1:
        assert errors.startswith("error: ")
        assert len(errors.strip().splitlines()) == 1
    wrong = COMMANDS[name][-1] if COMMANDS[name][-1] in ("new.xyz", "nowhere/there") else ""
    assert wrong in errors


def test_every_path_and_every_verb_is_tried() -> None:
    assert set(RIGHT) == set(VERBS)
    assert len(COMMANDS) > 100
    untried = [
        f"{verb}.{each.name}"
        for verb, command in VERBS.items()
        for each in command.params
        if "Path" in str(HINTS[verb].get(each.name)) and f"{verb}.{each.name}" not in COMMANDS
    ]
    assert set(untried) <= {"quickstart.out", "convert.dst", "localize.out"}, untried


def test_a_right_command_is_not_refused(tmp_path: Path) -> None:
    """The commands that the wrong ones differ from are right: info and a question run, and need no torch."""
    commands = [[verb, *RIGHT[verb].split()] for verb in ("info", "query", "localize", "verify")]
    assert [(code, loaded) for code, _, loaded in run_all(commands)] == [(0, False)] * 4
