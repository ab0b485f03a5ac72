"""An error never advises a flag that its verb lacks: every verb, with each of the things it is made from gone."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner
from verbs import MODEL, VERBS, copy_inputs, put_copies

import cli
from actcache.artifacts import digest, file_digest
from actcache.artifacts.files import encode_json

pytestmark = pytest.mark.slow

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
ELSEWHERE_SAID = re.compile(r"[^.]*, in a verb that has this flag")
GONE = ("images", "model", "a.acts", "adapted.acts", "run", "a.codes", "a.prompts")
DIRECT = ("extract", "adapt", "train", "demo", "import")
"""What these verbs need is given on the command line."""
MORE = {
    "analyze-clip": "analyze a.codes {o}/x.concepts --embeddings clip --n-gallery 4 --device cpu",
    "rules-zero-shot": "rules a.codes {o}/x.json --explain zero-shot --n-patches 1 --on-seen use",
    "verify-repair": "verify a.acts --repair",
    "extract-prompts": f"extract images {{o}}/x.acts {MODEL} --layer 1 --prompts a.prompts --device cpu",
}  # fmt: skip
COMMANDS = {name: verb.command for name, verb in VERBS.items() if not verb.command.startswith(DIRECT)} | MORE


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_inputs(tmp_path_factory.mktemp("advised"))


@pytest.fixture(params=GONE)
def gone(request: pytest.FixtureRequest, inputs: Path) -> Iterator[str]:
    """Hide one of the inputs."""
    (inputs / request.param).rename(inputs / "hidden")
    yield request.param
    (inputs / "hidden").rename(inputs / request.param)


def check_every_verb(inputs: Path, tmp_path: Path) -> int:
    """Run every verb. Returns how many were refused."""
    wrong, n_refused = [], 0
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(inputs)
        for name, command in COMMANDS.items():
            out = tmp_path / name
            out.mkdir()
            if name in VERBS and VERBS[name].copied:
                if not (inputs / VERBS[name].copied).exists():
                    continue
                put_copies(VERBS[name], inputs, out / "copy")
                shutil.rmtree(out / "copy" / VERBS[name].copied / "notes", ignore_errors=True)
                shutil.move(out / "copy" / VERBS[name].copied, out)
            words = command.format(o=out).split()
            flags = {flag for option in get_command(cli.app).commands[words[0]].params for flag in option.opts}  # type: ignore[attr-defined]
            done = CliRunner().invoke(cli.app, ["--quiet", *words])
            if done.exit_code == 0:
                continue
            n_refused += 1
            lines = done.stderr.strip().splitlines()
            if done.exit_code != 1 or len(lines) != 1 or not lines[0].startswith("error: "):
                wrong.append((name, done.exit_code, done.stderr))
            elif unknown := set(FLAG.findall(ELSEWHERE_SAID.sub("", lines[0]))) - flags - {"--overwrite", "--repair"}:
                wrong.append((name, sorted(unknown), lines[0]))
    assert wrong == []
    return n_refused


def test_something_it_is_made_from_is_gone(gone: str, inputs: Path, tmp_path: Path) -> None:
    n_refused = check_every_verb(inputs, tmp_path)
    assert n_refused


ELSEWHERE = {
    "images": ("a.acts", "a.codes"), "store": ("run", "a.codes", "adapted.codes"), "run": ("a.codes",),
    "codes": ("a.concepts", "adapted.concepts"),
}  # fmt: skip


@pytest.mark.parametrize("parent", ELSEWHERE)
def test_something_it_is_made_from_lies_on_other_storage(parent: str, inputs: Path, tmp_path: Path) -> None:
    kept = {}
    for child in ELSEWHERE[parent]:
        file, seal = inputs / child / "artifact.json", inputs / child / "manifest.json"
        kept |= {path: path.read_bytes() for path in (file, seal)}
        body = json.loads(file.read_bytes())
        body["parents"][parent]["path"] = "s3://nobody.invalid/x"
        file.write_bytes(encode_json(body))
        fields = json.loads(seal.read_bytes())
        fields.pop("digest", None)
        fields["files"]["artifact.json"] = file_digest(file)
        seal.write_bytes(encode_json({**fields, "digest": digest(fields)}))
    try:
        check_every_verb(inputs, tmp_path)
    finally:
        for path, data in kept.items():
            path.write_bytes(data)
