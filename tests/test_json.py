"""`--json`: strict JSON from every verb, with the fields that docs/reference/json.md lists, and the screen's facts."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import analysis.tour
import cli
from actcache.artifacts import open_artifact
from actcache.text import to_json

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "pipeline"
MODEL = "--model model/tiny.json --pretrained model/tiny.safetensors"
SMALL = "--n-latents 64 --k 4 --n-steps 60 --batch-size 128 --lr 0.003 --precision float32 --device cpu"
COMMANDS = [
    f"extract images a.acts {MODEL} --layer 1 --shard-images 16 --masks masks --precision float32 --device cpu",
    f"extract images new.acts {MODEL} --layer 1 --dry-run",
    f"train a.acts run {SMALL}",
    f"train a.acts runs --variant batchtopk --variant relu --variant jumprelu --variant gated {SMALL}",
    "encode run a.acts a.codes",
    "analyze a.codes a.concepts --n-gallery 4 --embeddings clip --device cpu",
    "name a.concepts --vocabulary words.txt --device cpu",
    "name a.concepts --set 19=stripes",
    "report a.concepts new.html",
    "look images/class0/00.png images/class1/01.png --sae run --device cpu --n-top 3 --out new-look.png",
    "evaluate run a.acts",
    "evaluate run a.acts evaluate.json --device cpu",
    "benchmark run a.acts new-benchmark.json --on-seen use --device cpu",
    "intervene run b.acts intervene.json --k 1 --k 3 --n-random 1 --device cpu",
    "intervene run b.acts intervene-set.json --set 19=5 --add 18=-1 --device cpu",
    "attribute run b.acts attribute.json --n 1 --n 3 --limit 12 --device cpu",
    "steer run b.acts steer.json --latent 19 --strength 20 --vocabulary words.txt --device cpu",
    "rules a.codes rules.json --n-patches 1 --concepts a.concepts",
    "probe a.codes probe.json --label label_name --k 1 --k 4 --n-random 1 --concepts a.concepts",
    "compare a.concepts adapted.concepts compare.json --k 1 --k 5 --n-seeds 2 --device cpu",
    "inspect runs --store a.acts --n-tokens 40",
    "localize a.codes",
    "adapt images a.prompts " + MODEL + " --method maple --shots 4 --n-epochs 2 --n-prompts 2 --depth 2 "
    "--precision float32 --device cpu",
    "convert run new-saelens --to saelens --store a.acts",
    "import a.concepts/nearest_cosine.npy new-imported.acts --layer 1 --model-name any",
    "publish a.concepts new-repository --gallery",
    *(f"info {name}" for name in ("a.acts", "run", "a.codes", "a.concepts", "a.prompts", "interrupted-a.acts")),
    "verify a.codes",
    "quickstart new-tour --n-images 40",
]  # fmt: skip
QUESTIONS = {
    "--latent": "--latent 19 --sheet new.jpg --out new.json", "--latent --show patches": "--latent 19 --show patches",
    "--latent --show counter-examples": "--latent 19 --show counter-examples",
    "--latent --show co-firing": "--latent 19 --show co-firing", "--sample": "--sample 200", "--image": "--image 3",
    "--image --image": "--image 3 --image 5", "--class": "--class class1",
    "--class --rank frequent": "--class class1 --rank frequent", "--where": "--where label==1",
    "--group": "--group label==1", "--fires`, `--silent": "--fires 19 --silent 18",
}  # fmt: skip
PAGE = (ROOT / "docs" / "reference" / "json.md").read_text()


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path_factory.mktemp("golden") / "pipeline"))


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def ask(folder: Path, command: str, code: int = 0) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(analysis.tour, "STEPS", 5)
        done = CliRunner().invoke(cli.app, ["--json", *command.split()])
    assert done.exit_code == code, done.output
    assert done.stdout.count("\n") == 1
    answer: dict[str, Any] = json.loads(done.stdout, parse_constant=refuse)
    return answer


def fields_of(verb: str) -> tuple[set[str], set[str]]:
    """The fields that the page lists for a verb: those that are always there, and all of them."""
    section = next(part for part in re.split(r"^## ", PAGE, flags=re.MULTILINE) if f"`{verb}`" in part.split("\n")[0])
    cells = [line.split("|") for line in section.splitlines() if line.startswith("| `") and line.count("|") == 4]
    listed = [(set(re.findall(r"`(\w+)`", names)), when.strip()) for _, names, when, *_ in cells]
    return set().union(*(n for n, when in listed if not when)), set().union(*(n for n, _ in listed))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.split()[:3]))
def test_a_verb_prints_strict_json_with_the_listed_fields(golden: Path, command: str) -> None:
    answer = ask(golden, command)
    verb = command.split()[0]
    always, listed = fields_of(verb)
    if "--dry-run" in command or (verb == "extract" and not answer.get("complete", True)):
        always = set()
    if verb == "info":
        artifact = open_artifact(golden / command.split()[1])
        listed |= {*artifact.settings, *artifact.provenance}
    assert answer.keys() >= always
    assert answer.keys() <= listed


def test_every_verb_and_every_listed_field_is_tried(golden: Path) -> None:
    verbs = set(get_command(cli.app).commands)  # type: ignore[attr-defined]
    elsewhere = {"query", "explore"}  # explore ends with Ctrl-C: tests/analysis/explore
    assert {command.split()[0] for command in COMMANDS} | elsewhere == verbs
    for verb in ("train", "name"):
        seen = {field for command in COMMANDS if command.startswith(verb) for field in ask(golden, command)}
        assert seen == fields_of(verb)[1]


@pytest.mark.parametrize("kind", QUESTIONS)
def test_the_rows_of_an_answer_have_the_listed_fields(golden: Path, kind: str) -> None:
    answer = ask(golden, f"query a.codes {QUESTIONS[kind]}")
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| `{kind}` |"))
    listed = [field for field in re.findall(r"`(\w+)`", line.split("|")[2]) if field != "peak_LATENT"]
    for row in answer["rows"]:
        assert [name for name in row if name not in ("name", "partner_name") and not name.startswith("peak_")] == listed
        assert ("name" in row) == ("latent" in row)
    always, every = fields_of("query")
    assert always <= answer.keys() <= every
    if "19" in QUESTIONS[kind]:
        assert answer["names"]["19"] == "stripes"
    else:
        assert "names" not in answer


def test_files_hold_what_their_names_say(golden: Path) -> None:
    answer = ask(golden, "query a.codes --latent 19 --sheet sheet.jpg --out rows.json")
    assert (golden / "sheet.jpg").read_bytes().startswith(b"\xff\xd8\xff")
    assert json.loads((golden / "rows.json").read_text(), parse_constant=refuse) == answer["rows"]
    ask(golden, "query a.codes --latent 19 --sheet sheet.webp --out rows.csv")
    assert (golden / "sheet.webp").read_bytes()[8:12] == b"WEBP"
    assert len((golden / "rows.csv").read_text().splitlines()) == len(answer["rows"]) + 1


@pytest.mark.parametrize("flag", ["--sheet new.gif", "--sheet new", "--out new.xlsx", "--out new.csv.gz"])
def test_a_suffix_that_nobody_writes_is_refused_with_the_list(golden: Path, flag: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(golden)
        done = CliRunner().invoke(cli.app, ["query", "a.codes", "--latent", "19", *flag.split()])
    assert done.exit_code == 2
    wanted = ".png, .jpg, .jpeg or .webp" if "--sheet" in flag else ".csv, .parquet or .json"
    assert wanted in " ".join(done.stderr.replace("│", " ").split())
    assert not (golden / flag.split()[1]).exists()


def test_numbers_are_numbers(golden: Path) -> None:
    for name, n_shards in (("a.acts", 3), ("a.codes", 3), ("interrupted-a.acts", 3)):
        answer = ask(golden, f"info {name}")
        assert answer["shards"]["total"] == n_shards
        assert answer["shards"]["done"] == (n_shards if answer["complete"] else answer["shards"]["done"])
        assert isinstance(answer["shards"]["done"], int)
        assert answer["parents"]["images"]["state"] == "there"


def test_what_was_skipped_is_in_the_answer(tmp_path: Path, make_images: Any, tiny_model: dict[str, str]) -> None:
    images = make_images(tmp_path / "images", 12)
    (images / "class0" / "broken.png").write_bytes(b"no picture")
    command = (
        f"extract images x.acts --model {tiny_model['model']} --pretrained {tiny_model['pretrained']} --layer 2 "
        "--on-error skip"
    )
    answer = ask(tmp_path, command)
    assert [image["uri"] for image in answer["skipped"]] == ["class0/broken.png"]
    assert "broken.png" in answer["skipped"][0]["reason"]
    assert answer["n_images"] == 13


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({"a": float("nan"), "b": [float("inf"), -float("inf"), 1.5]}, '{"a": null, "b": [null, null, 1.5]}'),
        ({"a": {1: Path("x")}, "b": (True, None)}, '{"a": {"1": "x"}, "b": [true, null]}'),
    ],
)
def test_numbers_that_do_not_exist_are_null(facts: object, text: str) -> None:
    assert to_json(facts) == text


def test_numpy_is_plain() -> None:
    import numpy as np

    facts = {"a": np.float32("nan"), "b": np.arange(3), "c": np.int64(5), "d": np.array([np.nan, 0.5])}
    assert to_json(facts) == '{"a": null, "b": [0, 1, 2], "c": 5, "d": [null, 0.5]}'


@pytest.mark.parametrize("command", ["--version", "info a.acts --version", "info --version"])
def test_the_version(golden: Path, command: str) -> None:
    assert list(ask(golden, command)) == ["version"]
