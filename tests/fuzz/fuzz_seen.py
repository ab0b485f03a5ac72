"""The files that say which images were seen (content.bin, learned.bin, seen.bin), damaged, through what reads them."""

import os
import random
import shutil
from pathlib import Path

from damage import change_bytes, sign_file

GOLDEN = Path(__file__).parents[1] / "golden" / "pipeline"
MODEL = "--model model/tiny.json --pretrained model/tiny.safetensors"
SMALL = "--n-latents 32 --k 4 --n-steps 12 --batch-size 32 --device cpu"
MADE = (
    f"extract images x.acts {MODEL} --layer 1 --shard-images 16 --precision float32 --device cpu",
    f"extract images y.acts {MODEL} --layer 1 --shard-images 16 --precision float32 --seed 3 --device cpu",
    f"train x.acts new-run {SMALL}",
    "encode new-run x.acts x.codes --device cpu",
    "encode new-run y.acts y.codes --device cpu",
)  # fmt: skip
FILES = ("x.acts/content.bin", "y.acts/content.bin", "new-run/learned.bin", "x.codes/content.bin", "x.codes/seen.bin",
         "y.codes/seen.bin")  # fmt: skip
ASKED = (
    "evaluate new-run y.acts --device cpu", "evaluate new-run x.acts --device cpu --on-seen use",
    "rules x.codes --n-patches 1", "rules y.codes --n-patches 1 --on-seen use", "rules x.codes --judge y.codes",
    "localize y.codes", "encode new-run y.acts new --device cpu", "analyze x.codes new --n-gallery 2 --device cpu",
    "inspect new-run --store y.acts --n-tokens 8", "query x.codes --latent 3", "info x.acts", "info new-run",
    "info y.codes", "verify x.acts", "verify new-run", "verify y.codes", f"train x.acts new {SMALL}",
)  # fmt: skip


def prepare(folder: Path) -> dict[str, str]:
    """Make the artifacts, and ask everything once. Returns the answers of the undamaged files."""
    golden = Path(shutil.copytree(GOLDEN, folder / "pipeline"))
    for command in MADE:
        assert (done := _ask(golden, command))[0] == 0, done
    answers = {}
    for command in ASKED:
        answers[command] = _ask(golden, command)[1]
        _tidy(golden)
    return {"": str(golden), **answers}


def attempt(rng: random.Random, folder: Path, state: dict[str, str]) -> None:
    """Damage one file, ask one thing, and put the file back: an error, or the answer of the undamaged files."""
    golden = Path(state[""])
    name, command = rng.choice(FILES), rng.choice(ASKED)
    artifact, file = golden / name.split("/")[0], golden / name
    kept, seal = file.read_bytes(), (artifact / "manifest.json").read_bytes()
    signed = False
    if rng.random() < 0.1:
        file.unlink()
    else:
        data = rng.choice([lambda: change_bytes(kept, rng), lambda: rng.randbytes(rng.randrange(2 * len(kept) + 2)),
                           lambda: kept + b"\0", lambda: bytes(len(kept))])()  # fmt: skip
        file.write_bytes(data)
        if signed := rng.random() < 0.5:
            sign_file(artifact, file.name)
    try:
        code, answer = _ask(golden, command)
        if code == 0 and not signed and not command.startswith("info"):  # which tells sizes, and checks nothing
            assert answer == state[command], (name, command, answer[:300])
    finally:
        file.write_bytes(kept)
        (artifact / "manifest.json").write_bytes(seal)
        _tidy(golden)


def _tidy(golden: Path) -> None:
    shutil.rmtree(golden / "new", ignore_errors=True)


def _ask(folder: Path, command: str) -> tuple[int, str]:
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
    assert done.exit_code == 0 or "verify" in command or len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.exit_code, done.stdout
