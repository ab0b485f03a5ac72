"""Every command block of the README and of docs/ runs as it stands, or says why not.

A page's blocks run in order, in one folder that holds what the page assumes (page_world.py) and not what it makes
itself. Published models, layers and sizes become small ones by the table SMALLER; flags never change.

A block that cannot run is preceded by a comment with the reason: <!-- not run: needs a SLURM cluster -->
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import pytest
from typer import Context
from typer.main import get_command
from warm_process import WarmProcess

import cli
from analysis.terminal.checks import Makes, Writes

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = re.compile(r"<!-- not run: *(.*?) *-->")

SMALLER = {
    "--model ViT-B-16-quickgelu": "--model model/tiny.json",
    "--model ViT-B-32": "--model model/tiny.json",
    "--pretrained openai": "--pretrained model/tiny.safetensors",
    "--model timm:vit_base_patch14_reg4_dinov2.lvd142m": "--model timm:local-dir:model/dinov2",
    "--image-size 224": "--image-size 20",
    "--model ViT-B-16-SigLIP": "--model timm:local-dir:model/siglip",
    "--pretrained webli": "--pretrained local-dir:model/siglip",
    "--layer 4": "--layer 1",
    "--layer 5": "--layer 0",
    "--layer 10": "--layer 1",
    "--layer 11": "--layer 2",
    "--n-latents 12288": "--n-latents 64",
    "--n-latents 1536": "--n-latents 64",
    "--k 16": "--k 2",
    "--k 32": "--k 4",
    "--k 64": "--k 8",
    "--n-steps 800": "--n-steps 20",
    "--n-steps 1500": "--n-steps 20",
    "--batch-size 2048": "--batch-size 64",
    "--n-workers 8": "--n-workers 1",
}
"""What a page says -> what the test runs: names of models, layers and sizes."""
LATENT = "907"
"""The latent of the pages, of 12,288; it becomes one of 64 that fires on about half of the images."""
LARGE = re.compile("|".join(rf"(?<![\w.-]){re.escape(text)}(?![\w.-])" for text in (*SMALLER, LATENT)))


class Block(NamedTuple):
    code: str
    reason: str | None  # why it is not run


def read_blocks(page: Path) -> list[Block]:
    found = re.findall(r"((?:^<!--[^\n]*-->\n)*)^```bash\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [Block(code, reason[1] if (reason := NOT_RUN.search(comments)) else None) for comments, code in found]


BLOCKS = {str(page.relative_to(ROOT)): read_blocks(page) for page in PAGES}
RUN = [name for name, blocks in BLOCKS.items() if any(block.reason is None for block in blocks)]


def make_smaller(code: str, latent: int) -> str:
    return LARGE.sub(lambda match: {**SMALLER, LATENT: str(latent)}[match[0]], code)


def list_outputs(code: str) -> set[str]:
    """The files and folders that the commands of a block make."""
    made: set[str] = set()
    verbs = get_command(cli.app).commands  # type: ignore[attr-defined]
    for line in re.findall(r"^ *patchsae (.+)$", code.replace("\\\n", " "), flags=re.MULTILINE):
        verb, *words = shlex.split(re.split(r" \|\| | && ", line)[0], comments=True)
        given, _, _ = verbs[verb].make_parser(Context(verbs[verb])).parse_args(args=words)
        for name, checks in verbs[verb].callback.checks.items():
            if any(isinstance(check, Makes | Writes) for _, check in checks) and (value := given.get(name)):
                made |= {value} if isinstance(value, str) else set(value)
    return made


# ---------------------------------------------------------------------------------------------------------------------
# Where the commands run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: dict[str, str], warm: WarmProcess) -> Path:
    """What pages assume. Read-only."""
    path = tmp_path_factory.mktemp("pages") / "world"
    done = warm.run("tests/actcache/page_world.py", *tiny_model.values(), path, cwd=path.parent)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def latent(world: Path) -> int:
    table = pq.read_table(world / "val.concepts" / "concepts.parquet", columns=["latent", "image_frequency"])
    return int(min(table.to_pylist(), key=lambda row: abs(row["image_frequency"] - 0.5))["latent"])


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """s3://lab, on a server of this machine."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    start = [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "DEFAULT_REGION": "us-east-1"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        for _ in range(300):
            try:
                urllib.request.urlopen(urllib.request.Request(f"{address}/lab", method="PUT"), timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        yield
    finally:
        server.kill()
        server.wait()


def damage_store(folder: Path) -> None:
    """What a failing disk may do."""
    shard = next(file for file in sorted((folder / "val.acts").rglob("0")) if file.is_file())
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.unlink()  # which the other pages keep
    shard.write_bytes(content)


ALWAYS = {"model", "photos", "train-photos", "test-photos", "runs", "train", "val"}
"""What other entries of the world were made from, without their suffixes."""
PREPARED = {"docs/guide/repair.md": damage_store}
"""Pages about something that has happened to the folder."""


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_the_commands_of_a_page_run(
    name: str, tmp_path: Path, world: Path, latent: int, warm: WarmProcess, request: pytest.FixtureRequest
) -> None:
    code = "\n".join(block.code for block in BLOCKS[name] if block.reason is None)
    if "s3://" in code:
        request.getfixturevalue("bucket")
    code = make_smaller(code, latent)
    folder = link_world(world, tmp_path / "folder", code)
    for made in list_outputs(code):
        if (path := folder / made).is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if name in PREPARED:
        PREPARED[name](folder)
    code, said = run_shell(code, folder, warm)
    assert code == 0, said


def link_world(world: Path, folder: Path, code: str) -> Path:
    """Put into a folder what a page names, and what that was made from. Files are links: no verb writes into one."""
    folder.mkdir()
    for entry in world.iterdir():
        if (stem := entry.name.partition(".")[0]) in ALWAYS or stem in code:
            if entry.is_dir():
                shutil.copytree(entry, folder / entry.name, copy_function=os.link)
            else:
                os.link(entry, folder / entry.name)
    return folder


def run_shell(script: str, folder: Path, warm: WarmProcess) -> tuple[int, str]:
    """The exit code of a shell script in which `patchsae` is a warm process, and what was said on stderr.

    The shell writes a line with the words of each command into one pipe, and reads the exit code from another.
    """
    (requests, request), (answer, answers) = os.pipe(), os.pipe()
    head = f"""
        patchsae() {{
            local IFS=$'\x1f'; echo "$*" >&{request}; read -r -u {answer} code
            [ "$code" = 0 ] || {{ IFS=' '; echo "this failed: patchsae $*" >&2; return "$code"; }}
        }}
    """
    said: list[str] = []
    with subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", head + script], cwd=folder, pass_fds=(request, answer),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as shell:  # fmt: skip
        os.close(request)
        os.close(answer)
        with open(requests) as lines, open(answers, "w") as codes:
            for line in lines:
                words = line.rstrip("\n").split("\x1f")
                done = warm.run("tests/actcache/small_cli.py", "--quiet", *words, cwd=folder)
                said.append(done.stderr)
                print(done.returncode, file=codes, flush=True)
        assert shell.stderr
        said.append(shell.stderr.read())
    return shell.returncode, "".join(said)[-3000:]


# ---------------------------------------------------------------------------------------------------------------------
# What is written about blocks


def test_there_are_blocks_that_run_and_blocks_that_say_why_not() -> None:
    blocks = [block for each in BLOCKS.values() for block in each]
    assert len(RUN) > 25
    assert sum(block.reason is None for block in blocks) > 30
    assert all(block.reason is None or len(block.reason.split()) >= 2 for block in blocks)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_reason_belongs_to_a_block(page: Path) -> None:
    assert len(NOT_RUN.findall(page.read_text())) == sum(block.reason is not None for block in read_blocks(page))


def test_blocks_that_are_not_run_are_valid_shell() -> None:
    for name, blocks in BLOCKS.items():
        for block in blocks:
            done = subprocess.run(["bash", "-n", "-c", block.code], capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, ""), name


def test_the_table_changes_sizes_and_no_flags() -> None:
    code = "\n".join(block.code for blocks in BLOCKS.values() for block in blocks if block.reason is None)
    assert set(LARGE.findall(code)) == {*SMALLER, LATENT}  # each line is needed
    flags = re.compile(r"(?<!\S)--?[a-z][\w-]*")
    assert flags.findall(make_smaller(code, 7)) == flags.findall(code)
    assert make_smaller("--layer 100 1907 --k 320 --set 907=2", 7) == "--layer 100 1907 --k 320 --set 7=2"


def test_what_a_page_makes_is_found() -> None:
    code = "patchsae extract a b.acts --model m \\\n  --layer 1\npatchsae train x.acts y.acts run --k 3  # more\n"
    code += (
        "patchsae query c.codes --latent 3 --out t.csv --sheet s.png\npatchsae verify v.acts || patchsae info v.acts"
    )
    assert list_outputs(code) == {"b.acts", "run", "t.csv", "s.png"}
