"""What people call latents survives `analyze --overwrite`, or is not touched; it is stored nowhere else."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import cli
from actcache import SettingsError
from analysis import AnalyzeConfig, analyze, read_names, set_name

GOLDEN = Path(__file__).parents[2] / "golden" / "pipeline"
FIRST = AnalyzeConfig(n_gallery=2)


def ask(*words: object) -> Result:
    return CliRunner().invoke(cli.app, ["--quiet", "--json", *map(str, words)])


@pytest.fixture
def named(tmp_path: Path, tiny_codes: Path) -> Path:
    """A table with names of people, computed names, and a file that somebody put beside them."""
    table = analyze(tiny_codes, tmp_path / "x.concepts", config=FIRST)
    set_name(table, 3, name="stripes", note="see image 12")
    set_name(table, 9, note="unsure")
    shutil.copy(GOLDEN / "a.concepts" / "notes" / "names.parquet", table.path / "notes")
    (table.path / "notes" / "todo.txt").write_text("ask again")
    return table.path


@pytest.mark.parametrize(
    ("config", "computed"),
    [
        (FIRST, True),
        (AnalyzeConfig(n_gallery=2, tau=0.5), True),
        (AnalyzeConfig(n_gallery=5), True),
        (AnalyzeConfig(n_gallery=2, n_top=5), False),
        (AnalyzeConfig(n_gallery=2, score="max"), False),
    ],
    ids=repr,
)
def test_names_stay_when_a_table_of_the_same_codes_is_replaced(
    named: Path, tiny_codes: Path, config: AnalyzeConfig, computed: bool
) -> None:
    before = {file.name: file.read_bytes() for file in (named / "notes").iterdir()}
    analyze(tiny_codes, named, config=config, overwrite=True)
    after = {file.name: file.read_bytes() for file in (named / "notes").iterdir()}
    assert after == {name: data for name, data in before.items() if computed or name != "names.parquet"}
    assert read_names(named)[3] == "stripes"


def test_names_of_other_latents_are_not_deleted(named: Path, tmp_path: Path) -> None:
    before = (named / "notes" / "own.json").read_bytes()
    codes = GOLDEN / "a.codes"
    done = ask("analyze", codes, named, "--overwrite", "--n-gallery", 2)
    assert done.exit_code == 1
    assert len(done.stderr.splitlines()) == 1
    assert "own.json holds names that people gave to other latents" in done.stderr
    assert (named / "notes" / "own.json").read_bytes() == before
    assert json.loads((named / "artifact.json").read_text())["parents"]["codes"]["id"]
    shutil.move(named / "notes" / "own.json", tmp_path / "own.json")  # as the message says
    assert ask("analyze", codes, named, "--overwrite", "--n-gallery", 2).exit_code == 0


def test_names_of_a_table_that_cannot_be_read_are_not_deleted(named: Path, tiny_codes: Path) -> None:
    (named / "artifact.json").write_text("{")
    with pytest.raises(SettingsError, match="stored nowhere else"):
        analyze(tiny_codes, named, config=FIRST, overwrite=True)
    (named / "notes" / "own.json").unlink()
    analyze(tiny_codes, named, config=FIRST, overwrite=True)


def test_a_table_without_names_is_replaced_as_ever(tmp_path: Path, tiny_codes: Path) -> None:
    analyze(GOLDEN / "a.codes", tmp_path / "x.concepts", config=FIRST)
    table = analyze(tiny_codes, tmp_path / "x.concepts", config=FIRST, overwrite=True)
    assert not (table.path / "notes").exists()
