"""From images to answers by command: every verb once, small. Each prints one JSON object, the same command again
changes nothing, and what cannot be done is one line, exit 1, and writes nothing.

Most commands run in one process: what is tested is the way from flags to files. Those that load a model run in
processes of their own too, with warnings as errors.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import cli
from actcache.artifacts import digest

ROOT = Path(__file__).parents[1]
SMALL = ["--n-latents", "64", "--k", "4", "--n-steps", "60", "--batch-size", "128", "--lr", "0.003"]
WORDS = "red\nsky\nwood\nclass0\nclass1\nclass2\n"


class Pipeline:
    """A folder in which commands are given; MODEL, IMAGES and names of the folder's own files are made whole."""

    def __init__(self, folder: Path, images: Path, model: dict[str, str]) -> None:
        self.folder, self.images = folder, images
        self.model = ["--model", model["model"], "--pretrained", model["pretrained"]]

    def words(self, command: str) -> list[str]:
        words: list[str] = []
        for word in command.split():
            words += self.model if word == "MODEL" else [str(self.images)] if word == "IMAGES" else [word]
        return words

    def ask(self, command: str, *more: str) -> Any:
        """In this process, from the folder."""
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            return CliRunner().invoke(cli.app, ["--quiet", "--json", *self.words(command), *more])

    def files(self) -> dict[str, tuple[int, int]]:
        """Every file, with its size and when it was written."""
        found = [(file, file.stat()) for file in self.folder.rglob("*") if file.is_file()]
        return {str(file.relative_to(self.folder)): (stat.st_size, stat.st_mtime_ns) for file, stat in found}


COMMANDS = [
    "extract IMAGES a.acts MODEL --layer 1 --shard-images 16 --masks masks",
    f"train a.acts run {' '.join(SMALL)}",
    "encode run a.acts a.codes",
    "analyze a.codes a.concepts --n-gallery 4 --embeddings clip --device cpu",
    "name a.concepts --vocabulary words.txt --device cpu",
    "evaluate run a.acts fidelity.json --device cpu",
    "intervene run b.acts masks.json --k 1 --k 3 --n-random 1 --device cpu",
    "intervene run b.acts steered.json --set 7=5 --add 9=-1 --device cpu",
    "attribute run b.acts deletion.json --n 1 --n 3 --limit 12 --device cpu",
    "steer run b.acts steerability.json --latent 7 --strength 20 --vocabulary words.txt --device cpu",
    "rules a.codes rules.json --n-patches 1 --concepts a.concepts",
    "probe a.codes probe.json --label label_name --k 1 --n-random 1",
    "inspect run --store a.acts --n-tokens 40",
    "benchmark run a.acts benchmark.json --on-seen use --device cpu",
    "localize a.codes --out where.csv",
    "query a.codes --class class1 --n-top 3 --names a.concepts --out class1.parquet --sheet class1.png",
    "query a.codes --group label==1 --versus label==2 --n-top 3",
    "report a.concepts report.html --result masks.json --result deletion.json --result fidelity.json",
    "info a.concepts",
    "verify a.codes",
]
ALWAYS_WRITTEN = {"name", "localize", "query", "report"}
"""These write their files again each time: names may use another vocabulary; answers and pages are for people."""

SOME = [COMMANDS[i] for i in (4, 6, 8)]


@pytest.fixture(scope="module")
def pipeline(
    tmp_path_factory: pytest.TempPathFactory, tiny_images: Path, tiny_model: dict[str, str]
) -> Pipeline:  # fmt: skip
    made = Pipeline(tmp_path_factory.mktemp("pipeline"), tiny_images, tiny_model)
    for file in tiny_images.rglob("*.png"):
        mask = made.folder / "masks" / file.relative_to(tiny_images)
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.kron([[0, 1]], np.ones((24, 12))).astype(np.uint8)).save(mask)
    (made.folder / "words.txt").write_text(WORDS)
    (made.folder / "twice.txt").write_text("red\nsky\nred\n")
    done = made.ask("extract IMAGES b.acts MODEL --layer 1 --seed 3")  # a store the run was not trained on
    assert done.exit_code == 0, done.output
    for command in COMMANDS:
        done = made.ask(command)
        assert done.exit_code == 0, f"{command}: {done.output}"
    return made


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.split()[:3]))
def test_the_same_command_again_says_what_is_there_and_changes_nothing(pipeline: Pipeline, command: str) -> None:
    before = pipeline.files()
    done = pipeline.ask(command)
    assert done.exit_code == 0, done.output
    (line,) = done.stdout.splitlines()
    facts = json.loads(line)
    assert isinstance(facts, dict)
    after = pipeline.files()
    if command.split()[0] in ALWAYS_WRITTEN:
        assert after.keys() == before.keys()
    else:
        assert after == before
    if command.split()[0] in ("evaluate", "benchmark", "intervene", "attribute", "steer", "rules", "probe"):
        out = next(word for word in command.split() if word.endswith(".json"))
        kept = json.loads((pipeline.folder / out).read_text())
        assert kept.pop("digest") == digest(kept)
        assert facts == kept | {"out": out}


@pytest.mark.slow
def test_verbs_that_load_a_model_run_without_a_warning(pipeline: Pipeline, tmp_path: Path) -> None:
    """Real processes, beside each other; what they find is what was found in one."""
    processes = []
    for number, command in enumerate(SOME):
        own = [str(tmp_path / f"{number}.json") if word.endswith(".json") else word for word in pipeline.words(command)]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-W", "error", str(ROOT / "cli.py"), "--json", *own], cwd=pipeline.folder,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    for command, process in zip(SOME, processes, strict=True):
        out, progress = process.communicate(timeout=120)
        assert process.returncode == 0, progress
        facts, again = json.loads(out), json.loads(pipeline.ask(command).stdout)
        assert facts.keys() == again.keys(), command
        assert {key: facts.get(key) for key in ("id", "settings")} == {
            key: again.get(key) for key in ("id", "settings")
        }


def test_what_was_made_leads_back_to_its_parents(pipeline: Pipeline) -> None:
    ids = {name: json.loads(pipeline.ask(f"info {name}").stdout)["id"] for name in ("a.acts", "b.acts", "run")}
    masks = json.loads((pipeline.folder / "masks.json").read_text())
    assert {name: parent["id"] for name, parent in masks["parents"].items()} == {
        "run": ids["run"], "store": ids["b.acts"],
    }  # fmt: skip
    fidelity = json.loads((pipeline.folder / "fidelity.json").read_text())
    assert fidelity["parents"]["store"]["id"] == ids["a.acts"]
    page = (pipeline.folder / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert fidelity["runs"][0]["variants"]["sae+error"]["same_prediction"] == 1


BAD = [
    ("train a.acts x --n-steps 2 --where color==1", "names the unknown column 'color'"),
    ("train a.acts x --n-steps 2 --where label==9", "label==9"),
    ("encode run other.acts x.codes", "was trained on model"),
    ("analyze a.codes x.concepts --store b.acts", "Give the store that it was made from"),
    ("analyze a.codes x.concepts --n-top 0", "n-top"),
    ("evaluate run a.acts x.json --where color==1", "names the unknown column 'color'"),
    ("evaluate run a.acts x.json --where label==9", "--where"),
    ("evaluate run a.acts x.json --limit 0", "--limit must be at least 1"),
    ("evaluate run other.acts x.json", "was trained on model"),
    ("benchmark run other.acts x.json", "was trained on model"),
    ("benchmark run run a.acts x.json", "A run is given twice"),
    ("benchmark run a.acts x.json --codes a.concepts", "a.concepts"),
    ("benchmark run a.acts x.json --where label==9", "holds for no image"),
    ("benchmark run a.acts x.json --on-seen never", "--on-seen"),
    ("evaluate run nowhere.acts x.json", "does not exist"),
    ("intervene run b.acts x.json --latent 64", "0..63, got 64"),
    ("intervene run b.acts x.json --set 64=1", "0..63, got 64"),
    ("intervene run b.acts x.json --set 7=high", "--set takes LATENT=NUMBER"),
    ("intervene run b.acts x.json --set 7=1 --add 7=1", "names a latent twice"),
    ("intervene run b.acts x.json --k 0", "--k must be at least 1"),
    ("intervene run b.acts x.json --k 64 --k 1000", "--k must be below the dictionary's 64 latents, got 64, 1000"),
    ("intervene run b.acts x.json --tau nan", "--tau must be a finite number of at least 0, got nan"),
    ("evaluate run b.acts x.json --batch-size 0", "--batch-size must be at least 1, got 0"),
    ("attribute run b.acts x.json --seed -1", "--seed must be at least 0, got -1"),
    ("steer run b.acts x.json --batch-size -5", "--batch-size must be at least 1, got -5"),
    ("train a.acts x --n-latents 8 --k 9", "--k must lie in 1..8"),
    ("train a.acts x --log-every 0", "--log-every must be at least 1, got 0"),
    ("train a.acts x --checkpoint-every -1", "--checkpoint-every must be at least 1, got -1"),
    ("train a.acts x --seed 9223372036854775808", "at most 9223372036854775807, got 9223372036854775808"),
    ("analyze a.codes x.concepts --n-workers 0", "--n-workers must be at least 1, got 0"),
    ("rules a.codes x.json --n-literals 0", "--n-literals must be at least 1, got 0"),
    ("inspect run --store a.acts --seed -1", "--seed must be at least 0, got -1"),
    ("intervene run b.acts x.json --chosen-where label==0", "There is no image of class1, class2"),
    ("intervene run b.acts x.json --chosen-where color==0", "--chosen-where names the unknown column 'color'"),
    ("intervene run b.acts x.json --chosen-on other.codes", "was encoded by run"),
    ("intervene run b.acts x.json --n-random -1", "--n-random"),
    ("attribute run b.acts x.json --n 0", "--n must be at least 1"),
    ("attribute run b.acts x.json --where label==0", "have one class, class0"),
    ("steer run b.acts x.json --latent 64", "0..63, got 64"),
    ("steer run b.acts x.json --vocabulary twice.txt", "'red' twice"),
    ("steer run b.acts x.json --n-latents 0", "--n-latents must be at least 1"),
    ("steer run b.acts x.json --strength nan", "--strength"),
    ("steer run b.acts x.json --limit 0", "--limit must be at least 1"),
    ("name a.concepts --vocabulary twice.txt", "'red' twice"),
    ("name a.concepts --set 64=red", "0..63, got 64"),
    ("name a.concepts --store b.acts", "Give the store that it was made from"),
    ("rules a.codes x.json --judge other.codes", "codes of different runs"),
    ("rules a.codes x.json --n-patches 10", "--n-patches must lie in 1..9"),
    ("inspect run --store other.acts", "was trained on model"),
    ("inspect run --store a.acts --n-tokens 0", "--n-tokens"),
    ("localize a.codes --out x.csv --latent 64", "0..63, got 64"),
    ("localize a.codes --out x.csv --where label==9", "none of the"),
    ("localize other.codes --out x.csv", "--masks"),
    ("query a.codes --latent 64 --out x.csv", "0..63, got 64"),
    ("query a.codes --class cow --out x.csv", "cow"),
    ("query a.codes --class class0 --where color==1 --out x.csv", "names the unknown column 'color'"),
    ("query a.codes --group label==1 --versus color==1 --out x.csv", "--versus names the unknown column 'color'"),
    ("query a.codes --where label==9 --out x.csv --sheet x.png", "none of the"),
    ("query a.codes --latent 7 --names other.concepts --out x.csv", "does not exist"),
    ("report a.concepts x.html --result words.txt", "words.txt"),
    ("report a.codes x.html", "is a code store (x.codes). Expected a concept table"),
    ("report a.concepts words.txt/x.html", "Choose another path"),
    ("info .", "it contains a.acts, a.codes, a.concepts, ...: name one of them"),
]


MISTYPED = [
    ("query a.codes --latent 7 --out x.txt", "--out must end in .csv, .parquet or .json"),
    ("report a.concepts words.txt", "OUT must end in .html or .htm"),
    ("evaluate run a.acts a.concepts", "OUT must end in .json"),
    ("benchmark run a.acts x.txt", "OUT must end in .json"),
    ("benchmark run a.acts x.json --table x.txt", "--table must end in .md, .tex or .csv"),
]


@pytest.mark.parametrize(("command", "words"), MISTYPED, ids=[command for command, _ in MISTYPED])
def test_an_output_of_another_kind_is_wrong_usage_and_is_not_touched(other: Pipeline, command: str, words: str) -> None:
    before = other.files()
    done = other.ask(command)
    assert (done.exit_code, done.stdout) == (2, "")
    assert words in done.stderr
    assert other.files() == before


@pytest.fixture(scope="module")
def other(pipeline: Pipeline) -> Pipeline:
    """A store, a run and codes of another model beside it."""
    model = ["--model", pipeline.model[1], "--pretrained", "random:7"]
    for command, more in (
        ("extract IMAGES other.acts --layer 1 --limit 32", model),
        (f"train other.acts other {' '.join(SMALL)} --n-steps 2", []),
        ("encode other other.acts other.codes", []),
    ):
        done = pipeline.ask(command, *more)
        assert done.exit_code == 0, done.output
    return pipeline


@pytest.mark.parametrize(("command", "words"), BAD, ids=[command for command, _ in BAD])
def test_what_cannot_be_done_is_one_line_and_writes_nothing(other: Pipeline, command: str, words: str) -> None:
    before = other.files()
    done = other.ask(command)
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert other.files() == before
