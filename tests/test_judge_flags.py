"""The flags of judges on the command line; the older meaning of `rules --judge` is what it was."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cli


def ask(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, ["--quiet", "--json", *map(str, words)])
    return done.exit_code, done.output


def test_evaluate_takes_a_judge(tmp_path: Path, tiny_run: Path, tiny_store: Path) -> None:
    code, said = ask(
        "evaluate", tiny_run, tiny_store, tmp_path / "f.json", "--judge", "probe", "--probe-features", "cls"
    )
    assert code == 0, said
    assert json.loads(said)["judge"]["probe"]["features"] == "cls"
    assert json.loads((tmp_path / "f.json").read_text())["settings"]["judge"] == "probe"


def test_rules_explain_a_judge_and_are_judged_on_codes(tmp_path: Path, tiny_codes: Path) -> None:
    common = ("rules", tiny_codes, "--judge", tiny_codes, "--on-seen", "use", "--n-patches", 1)
    code, said = ask(*common)
    assert code == 0, said
    assert "judge" in json.loads(said)["parents"]
    assert "judge" not in json.loads(said)
    code, said = ask(*common, "--explain", "probe")
    assert code == 0, said
    assert json.loads(said)["judge"]["kind"] == "probe"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--judge", "oracle"), "--judge must be one of auto, zero-shot, probe, head"),
        (("--probe-where", ""), "--probe-where is empty"),
        (("--judge", "probe", "--probe-store", "nowhere.acts"), "nowhere.acts"),
        (("--judge", "head"), "has no classifier of its own"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tiny_run: Path, tiny_store: Path, flags: tuple[str, ...], words: str
) -> None:
    code, said = ask("evaluate", tiny_run, tiny_store, *flags)
    assert code in (1, 2)
    assert words in said
    assert "Traceback" not in said
