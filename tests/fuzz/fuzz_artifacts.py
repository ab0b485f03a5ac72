"""Artifacts with changed fields and bytes, through every verb that reads them."""

import json
import os
import random
import shutil
import warnings
from pathlib import Path

from damage import (
    ARTIFACTS,
    RESULTS,
    USES,
    VALUES,
    change_bytes,
    json_files,
    replace,
    reseal,
    sign_file,
    spots,
    use_any,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "pipeline"
MODEL = "--model model/tiny.json --pretrained model/tiny.safetensors"
SMALL = "--n-latents 16 --k 2 --n-steps 3 --batch-size 16 --device cpu"
VERBS = {
    "a.acts": [f"train a.acts new {SMALL}", "encode run a.acts new --device cpu", "evaluate run a.acts --device cpu",
               "inspect run --store a.acts --n-tokens 8", "convert run new --to saelens --store a.acts"],
    "b.acts": [f"train b.acts new {SMALL}", "encode run b.acts new --device cpu", "intervene run b.acts --k 2"],
    "adapted.acts": ["encode run adapted.acts new", "evaluate run adapted.acts", f"train a.acts b.acts new {SMALL}"],
    "a.prompts": ["report a.concepts new.html --result a.prompts",
                  f"extract images new {MODEL} --layer 1 --prompts a.prompts"],
    "run": ["encode run a.acts new", "evaluate run a.acts", "analyze a.codes new --n-gallery 2", "convert run new",
            "publish run new",
            "steer run b.acts --latent 19 --vocabulary words.txt", "name a.concepts --vocabulary words.txt"],
    "runs/variantgated": ["encode runs/variantgated a.acts new", "inspect runs --store a.acts --n-tokens 8"],
    "a.codes": ["analyze a.codes new --n-gallery 2", "query a.codes --latent 19 --sheet new.png",
                "query a.codes --image 3", "query a.codes --class class1", "localize a.codes",
                "query a.codes --group label==1 --versus label==2",
                "query a.codes --latent 19 --show co-firing", "rules a.codes --n-patches 1",
                "query a.codes --sample 50"],
    "a.concepts": ["report a.concepts new.html", "name a.concepts --vocabulary words.txt", "name a.concepts --set 3=x",
                   "publish a.concepts new --gallery", "compare a.concepts adapted.concepts new.json --k 1",
                   "query a.codes --latent 19 --names a.concepts"],
}  # fmt: skip


def prepare(folder: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, folder / "pipeline"))


def attempt(rng: random.Random, folder: Path, golden: Path) -> None:
    """Damage one file in place, use it, and put everything back."""
    warnings.simplefilter("ignore")
    name = rng.choice([*ARTIFACTS, "result"])
    file = _damage_result(rng, golden) if name == "result" else _damage_artifact(rng, golden / name)
    try:
        if name == "result":
            _ask(golden, f"report a.concepts new.html --result {file.name}")
        elif rng.random() < 0.5:
            use_any(golden / name)
            USES[name](golden / name)
        else:
            _ask(golden, rng.choice(VERBS[name]))
    finally:
        for kept in GOLDEN.rglob("*"):
            if kept.is_file() and kept.stat().st_size < 1 << 20:
                there = golden / kept.relative_to(GOLDEN)
                if not there.is_file() or there.read_bytes() != kept.read_bytes():
                    there.write_bytes(kept.read_bytes())
        for new in golden.glob("*new*"):
            shutil.rmtree(new) if new.is_dir() else new.unlink()


def _damage_artifact(rng: random.Random, artifact: Path) -> Path:
    if rng.random() < 0.6:
        file = rng.choice(json_files(artifact))
        value = json.loads(file.read_text())
        for _ in range(rng.choice([1, 1, 2, 3])):
            try:
                value = replace(value, rng.choice(list(spots(value))), rng.choice(VALUES))
            except (IndexError, TypeError, KeyError, AttributeError):
                break
        reseal(artifact, file, value)
        return file
    file = rng.choice(sorted(file for file in artifact.rglob("*") if file.is_file()))
    file.write_bytes(change_bytes(file.read_bytes(), rng))
    sealed = json.loads((artifact / "manifest.json").read_text())["files"] if file.name != "manifest.json" else {}
    if rng.random() < 0.5 and str(file.relative_to(artifact)) in sealed:
        sign_file(artifact, str(file.relative_to(artifact)))
    return file


def _damage_result(rng: random.Random, golden: Path) -> Path:
    file = golden / f"{rng.choice(RESULTS)}.json"
    value = json.loads(file.read_text())
    file.write_text(json.dumps(replace(value, rng.choice(list(spots(value))), rng.choice(VALUES))))
    return file


def _ask(folder: Path, command: str) -> None:
    """A verb in this process, whose errors must be ours."""
    from typer.testing import CliRunner

    import cli

    before = os.getcwd()
    os.chdir(folder)
    try:
        done = CliRunner().invoke(cli.app, ["--quiet", "--json", *command.split()])
    finally:
        os.chdir(before)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code in (0, 1), (command, done.output[-300:])
