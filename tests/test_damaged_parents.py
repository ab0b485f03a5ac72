"""A parent with a changed byte never makes another artifact: the verb that reads it says which file or shard it is."""

import random
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import cli

GOLDEN = Path(__file__).parent / "golden" / "pipeline"
SMALL = "--n-latents 16 --k 2 --n-steps 12 --batch-size 32 --device cpu"
MODEL = "--model model/tiny.json --pretrained model/tiny.safetensors"
SHARDS = "activations.zarr/blocks.1.hook_resid_post"


def ask(folder: Path, command: str) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return CliRunner().invoke(cli.app, ["--quiet", "--json", *command.split()])


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "pipeline"))


@pytest.mark.parametrize(
    ("file", "command", "said"),
    [
        ("run/sae.safetensors", "encode run a.acts new.codes --device cpu", "run/sae.safetensors"),
        ("run/sae.safetensors", "analyze a.codes new.concepts --n-gallery 2", "run/sae.safetensors"),
        ("run/sae.safetensors", "convert run new --to saelens", "run/sae.safetensors"),
        ("run/sae.safetensors", "publish run new", "run/sae.safetensors"),
        ("a.concepts/concepts.parquet", "publish a.concepts new", "concepts.parquet"),
        ("a.concepts/gallery/14.jpg", "publish a.concepts new --gallery", "14.jpg"),
        ("run/sae.safetensors", "inspect run --store a.acts --n-tokens 8", "run/sae.safetensors"),
        (f"a.acts/{SHARDS}/patches/c/0/0/0", f"train a.acts new {SMALL}", "Shard 0 of a.acts"),
        (f"a.acts/{SHARDS}/patches/c/1/0/0", "encode run a.acts new.codes --device cpu", "Shard 1 of a.acts"),
        (f"b.acts/{SHARDS}/patches/c/1/0/0", "encode run b.acts new.codes --device cpu", "Shard 1 of b.acts"),
        (f"b.acts/{SHARDS}/cls/c/0/0", f"train b.acts new {SMALL}", "Shard 0 of b.acts"),
        (f"b.acts/{SHARDS}/cls/c/2/0", "evaluate run b.acts new.json --device cpu", "Shard 2 of b.acts"),
        (
            f"adapted.acts/{SHARDS}/extra/c/2/0/0", "analyze adapted.codes new.concepts --embeddings clip --device cpu",
            "Shard 2 of",
        ),
        (
            "a.prompts/prompts.safetensors", f"extract images new.acts {MODEL} --layer 1 --prompts a.prompts",
            "prompts.safetensors",
        ),
        ("a.codes/images.parquet", "analyze a.codes new.concepts --n-gallery 2", "images.parquet"),
        ("a.codes/codes.zarr/1/latent_value/c/0", "analyze a.codes new.concepts --n-gallery 2", "Shard 1 of"),
        ("a.codes/codes.zarr/2/row/c/0", "query a.codes --latent 19", "Shard 2 of"),
        ("a.codes/codes.zarr/0/value/c/0", "query a.codes --image 3", "Shard 0 of"),
        ("a.codes/codes.zarr/0/latent_value/c/0", "rules a.codes new.json --n-patches 1", "Shard 0 of"),
        ("a.concepts/concepts.parquet", "report a.concepts new.html", "concepts.parquet"),
        ("a.concepts/position_map.npy", "report a.concepts new.html", "position_map.npy"),
        ("a.concepts/image_embeddings.npy", "report a.concepts new.html", "image_embeddings.npy"),
        ("run/metrics.jsonl", "encode run a.acts new.codes --device cpu", "metrics.jsonl"),
    ],
)  # fmt: skip
def test_the_verb_that_reads_a_changed_byte_refuses(golden: Path, file: str, command: str, said: str) -> None:
    data = bytearray((golden / file).read_bytes())
    place = len(data) // 3
    data[place] ^= 1 << random.Random(file).randrange(7)
    (golden / file).write_bytes(bytes(data))
    done = ask(golden, command)
    assert done.exit_code == 1, done.output
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (golden / "new.html").exists()


@pytest.mark.parametrize(
    ("name", "file", "remedy"),
    [
        ("a.acts", "images.parquet", "verify a.acts --repair"),
        ("run", "sae.safetensors", "run `patchsae train` again with --overwrite"),
        ("a.prompts", "prompts.safetensors", "run `patchsae adapt` again with --overwrite"),
        ("a.codes", "codes.zarr/0/value/c/0", "run `patchsae encode` again with --overwrite"),
        ("a.concepts", "gallery.parquet", "run `patchsae analyze` again with --overwrite"),
        ("a.concepts", "notes/names.parquet", "run `patchsae name` again"),
    ],
)
def test_verify_says_which_verb_writes_a_damaged_file_anew(golden: Path, name: str, file: str, remedy: str) -> None:
    (golden / name / file).write_bytes((golden / name / file).read_bytes()[:-7])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(golden)
        done = CliRunner().invoke(cli.app, ["--quiet", "verify", name])
    assert done.exit_code == 1
    assert file in done.output
    assert remedy in " ".join(done.output.split())
