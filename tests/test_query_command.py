"""`query` from the command line: every question, tables and pictures, and flags that do not go together."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from warm_process import WarmProcess

import cli


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ([], "No question was asked. Give one of --latent"),
        (["--latent", "1", "--at", "1,2"], "--at does not go with --latent"),
        (
            ["--latent", "1", "--show", "co-firing", "--where", "label > 0"],
            "--where does not go with --latent --show co-firing",
        ),
        (["--latent", "1", "--show", "neighbors"], "--show must be one of"),
        (["--image", "1", "--image", "2", "--at", "1,2"], "once with --at"),
        (["--latent", "1", "--n-top", "0"], "must be at least 1"),
    ],
)
def test_flags_that_do_not_go_together_are_usage_errors(tiny_codes: Path, question: list[str], words: str) -> None:
    done = CliRunner().invoke(cli.app, ["query", str(tiny_codes), *question])
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.replace("│", " ").split())


def test_every_question_can_be_asked_by_flags(tiny_codes: Path) -> None:
    """This runs in one process, because it tests the way from flags to functions."""

    def ask(*question: str) -> list[dict[str, Any]]:
        done = CliRunner().invoke(cli.app, ["--json", "query", str(tiny_codes), *question, "--n-top", "5"])
        assert done.exit_code == 0, done.output
        facts = json.loads(done.stdout)
        assert facts["bytes_read"] > 0
        rows: list[dict[str, Any]] = facts["rows"]
        return rows

    latent = str(ask("--class", "class1")[0]["latent"])
    other = str(ask("--latent", latent, "--show", "co-firing")[0]["latent"])
    photo = ask("--latent", latent, "--where", "label == 1", "--score", "max")[0]["uri"]
    assert photo.startswith("class1/")
    assert "value" in ask("--latent", latent, "--show", "patches")[0]
    assert "kind" in ask("--latent", latent, "--show", "counter-examples")[0]
    assert ask("--image", photo)[0]["score"] >= ask("--image", photo)[1]["score"]
    assert ask("--image", photo, "--at", "0:2,1")[0]["n_tokens"] <= 2
    assert {row["kind"] for row in ask("--image", photo, "--image", "0")} <= {"shared", "only 1", "only 2"}
    assert ask("--group", "label == 1", "--versus", "label == 2")[0]["q"] < 0.05
    assert f"peak_{latent}" in ask("--fires", f"{latent},{other}")[0]
    assert ask("--silent", latent)
    assert ask("--where", "label == 1") == ask("--class", "class1", "--rank", "frequent")
    assert ask("--class", "class1")[0]["lift"] > 1


def test_an_answer_is_written_as_a_table_and_a_picture(
    tmp_path: Path, tiny_codes: Path, tiny_store: Path, warm: WarmProcess
) -> None:
    done = warm.run("cli.py", "--json", "query", tiny_codes, "--class", "class1", "--n-top", "3", "--out", "a/a.csv",
                    "--sheet", "a/a.png", "--store", tiny_store, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["out"], facts["sheet"]) == ("a/a.csv", "a/a.png")
    assert (tmp_path / "a" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "a" / "a.csv").read_text().splitlines()) == 4
    moved = shutil.copytree(tiny_codes, tmp_path / "far" / "away" / "x.codes")
    (moved / "places.json").unlink()  # as on another machine
    done = warm.run("cli.py", "query", moved, "--class", "class1", "--sheet", "b.png", cwd=tmp_path)
    assert done.returncode == 1
    assert "--images" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_codes_of_another_store_are_refused(
    tmp_path: Path, tiny_codes: Path, tiny_images: Path, tiny_model: dict[str, str], warm: WarmProcess
) -> None:
    from actcache import extract

    extract(tiny_images, tmp_path / "other.acts", **tiny_model, layers=[2], limit=16)  # type: ignore[arg-type]
    done = warm.run("cli.py", "query", tiny_codes, "--latent", "1", "--store", "other.acts", cwd=tmp_path)
    assert done.returncode == 1
    assert "Give the store that it was made from" in done.stderr
