"""What the screen shows: data escaped, any encoding, 80 columns, and words that help."""

import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text
from typer.main import get_command
from typer.testing import CliRunner

import cli
from actcache.text import visible
from analysis.terminal.checks import explain_missing, find_unquoted
from analysis.terminal.tables import draw_facts, draw_table

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "pipeline"
FOLDER = "layer-1-resid-post-topk-k4-64-57ef079e"
"""The name that `publish` gives to the folder of the golden run."""
HOSTILE = "cl\x1b[2J\x1b]0;title\x07\u202ecat\u200b[red]:smile:\x9b31m\nrow\r\tend"
SAFE = r"cl\x1b[2J\x1b]0;title\x07\u202ecat\u200b[red]:smile:\x9b31m\nrow\r\tend"


def ask(folder: Path, *command: str | Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return CliRunner().invoke(cli.app, list(map(str, command)))


def process(*arguments: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "cli.py"), *map(str, arguments)], cwd=cwd, capture_output=True,
        text=True, errors="replace", check=False, env={**os.environ, **variables},
    )  # fmt: skip


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path_factory.mktemp("golden") / "pipeline"))


# ---------------------------------------------------------------------------------------------------------------------
# Data of others


def test_characters_that_are_not_seen_are_escaped() -> None:
    assert visible(HOSTILE) == SAFE
    assert visible("\udcff\ud83d\x00\ufeff\u3164") == r"\udcff\ud83d\x00\ufeff\u3164"
    assert visible("Ångström 猫 😀  café") == "Ångström 猫 😀  café"


@given(st.text())
def test_what_is_visible_is_one_line_without_control(text: str) -> None:
    shown = visible(text)
    assert len(shown.splitlines()) <= 1
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]", shown)
    assert visible(shown) == shown


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, make_images: Any, tiny_model: dict[str, str]) -> dict[str, Any]:
    """A pipeline whose classes, uris, paths and names hold what must not reach a terminal, and what its verbs said."""
    folder = tmp_path_factory.mktemp("hostile")
    images = make_images(folder / "images", 60)
    (images / "class0").rename(images / HOSTILE)
    first = min((images / "class1").iterdir())
    first.rename(first.with_name(f"{HOSTILE}.png"))
    (images / "class2" / f"broken{HOSTILE}.png").write_bytes(b"no picture")
    x = f"x{HOSTILE}"
    model = ["--model", tiny_model["model"], "--pretrained", tiny_model["pretrained"], "--layer", "2"]
    commands: list[list[str]] = [
        ["extract", "images", f"{x}.acts", *model],  # stops at the broken image
        ["extract", "images", f"{x}.acts", *model, "--on-error", "skip", "--overwrite"],
        ["extract", "images", "y.acts", *model, "--dry-run"],
        ["train", f"{x}.acts", f"{x}.run", "--n-latents", "32", "--k", "4", "--n-steps", "20", "--batch-size", "64"],
        ["train", f"{x}.acts", f"{x}.run", "--variant", HOSTILE],
        ["encode", f"{x}.run", f"{x}.acts", f"{x}.codes"],
        ["encode", f"{x}.run", f"{x}.acts"],
        ["analyze", f"{x}.codes", f"{x}.concepts"],
        ["name", f"{x}.concepts", "--set", f"1={HOSTILE.replace(chr(10), '').replace(chr(0xDCFF), '')}"],
        ["query", f"{x}.codes", "--latent", "1", "--n-top", "60", "--sheet", "sheet.png"],
        ["query", f"{x}.codes", "--latent", "1", "--show", "counter-examples"],
        ["query", f"{x}.codes", "--class", HOSTILE],
        ["query", f"{x}.codes", "--class", "nothing"],
        ["query", f"{x}.codes", "--image", HOSTILE],
        ["query", f"{x}.codes", "--where", f"{HOSTILE} == 1"],
        ["query", f"{x}.codes", "--sample", "100"],
        ["evaluate", f"{x}.run", f"{x}.acts", "result.json"],
        ["benchmark", f"{x}.run", f"{x}.acts", f"{x}.json", "--on-seen", "use"],
        ["rules", f"{x}.codes", "--n-patches", "1"],
        ["probe", f"{x}.codes", "--label", "label_name", "--k", "1", "--n-random", "1"],
        ["inspect", f"{x}.run", "--store", f"{x}.acts", "--n-tokens", "20"],
        ["localize", f"{x}.codes"],
        ["report", f"{x}.concepts", f"{x}.html"],
        ["report", f"{x}.concepts", "x.html", "--result", f"{HOSTILE}.json"],
        ["explore", f"{x}.concepts", "--result", f"{HOSTILE}.json"],
        ["explore", f"{x}.concepts", "--host", HOSTILE.replace("\n", "")],
        ["publish", f"{x}.concepts", "--site", f"{x}.site"],
        ["info", f"{x}.codes"],
        ["verify", f"{x}.acts"],
        ["info", f"nowhere{HOSTILE}\udcff"],
        [f"verb{HOSTILE}"],
        ["info", f"--flag{HOSTILE}"],
        ["query", f"{x}.codes", "--n-top", HOSTILE],
    ]
    return {" ".join(command): ask(folder, *command) for command in commands}


def test_no_verb_prints_what_a_terminal_would_obey(hostile: dict[str, Any]) -> None:
    for command, done in hostile.items():
        assert done.exception is None or isinstance(done.exception, SystemExit), (command, done.exception)
        for line in (done.stdout + done.stderr).split("\n"):
            assert visible(line) == line, command
    assert sum(done.exit_code == 0 for done in hostile.values()) >= 16
    said = "".join(done.output for done in hostile.values())
    assert said.count(SAFE) > 20
    assert SAFE in next(done.stdout for command, done in hostile.items() if command.startswith("rules"))


def test_errors_stay_one_line(hostile: dict[str, Any]) -> None:
    failed = [done for done in hostile.values() if done.exit_code == 1]
    assert len(failed) >= 6
    for done in failed:
        *said, last = done.stderr.strip().split("\n")
        assert last.startswith("error: ")
        assert all(re.match(r"\d+ classes: |left out: ", line) for line in said)  # what `extract` says before it begins


def test_warnings_of_libraries_are_not_shown_and_ours_are_one_line(tmp_path: Path) -> None:
    code = (
        "import logging, warnings, sys; sys.path.insert(0, sys.argv[1]); from analysis.terminal.screen import *; "
        "prepare_screen(); options.traceback = sys.argv[2] == 'all'; warnings.warn('of a library'); "
        "logging.getLogger('PIL').warning('of a library'); "
        "logging.getLogger('saetrain.run').warning('%s is damaged\\x1b[2J\\n', 'x')"
    )
    said = [
        subprocess.run([sys.executable, "-c", code, str(ROOT), how], capture_output=True, text=True, check=True).stderr
        for how in ("ours", "all")
    ]
    assert said[0] == "warning: x is damaged\\x1b[2J\\n\n"
    assert said[1].count("of a library") == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:strict", "utf-8"])
def test_a_terminal_of_another_encoding_replaces_what_it_lacks(tmp_path: Path, golden: Path, encoding: str) -> None:
    copy = Path(shutil.copytree(golden / "a.concepts", tmp_path / "猫😀.concepts"))
    shutil.copytree(golden / "a.codes", tmp_path / "a.codes")
    ask(tmp_path, "name", copy, "--set", "19=猫 😀 é", "--codes", tmp_path / "a.codes")
    for command in (["query", "a.codes", "--latent", "19"], ["query", "a.codes", "--image", "3"], ["info", copy.name]):
        done = process(*command, cwd=tmp_path, PYTHONIOENCODING=encoding, LC_ALL="C")
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    shown = done.stdout + process("query", "a.codes", "--latent", "19", cwd=tmp_path, PYTHONIOENCODING=encoding).stdout
    assert ("猫" in shown) == (encoding == "utf-8")
    assert ("\\u732b" in shown) == (encoding != "utf-8")
    assert process("info", "nowhere😀", cwd=tmp_path, PYTHONIOENCODING=encoding).stderr.startswith("error: nowhere")


# ---------------------------------------------------------------------------------------------------------------------
# Widths


def in_terminal(columns: int, *arguments: str | Path, cwd: Path) -> list[str]:
    """The lines that a verb writes to a terminal of some width."""
    leader, follower = pty.openpty()
    ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)], cwd=cwd, stdin=follower, stdout=follower,
        stderr=subprocess.DEVNULL, env={**environment, "NO_COLOR": "1", "TERM": "xterm"},
    )  # fmt: skip
    os.close(follower)
    written = b""
    while True:
        try:
            written += os.read(leader, 65536)
        except OSError:
            break
    os.close(leader)
    assert child.wait(30) == 0, written
    return [re.sub(r"\x1b\[[\d;]*m", "", line) for line in written.decode().split("\r\n") if line]


@pytest.mark.parametrize(
    "command",
    ["query a.codes --group label==1", "query a.codes --sample 100", "info a.acts", "query a.codes --class class1"],
)
def test_nothing_is_cut_within_a_number_at_80_columns(golden: Path, command: str) -> None:
    narrow, wide = (in_terminal(columns, *command.split(), cwd=golden) for columns in (80, 400))
    assert max(map(len, narrow)) <= 80
    words = {word for line in wide for word in re.split(r"[\s,()]+", line)}
    for line in narrow:
        for word in re.split(r"[\s,()]+", line):
            assert word in words or word.endswith("…"), word
    numbers = {word for word in words if re.fullmatch(r"-?[\d.,e+-]*\d", word)}
    assert numbers <= {word for line in narrow for word in re.split(r"[\s,()]+", line)}


VALUES = st.floats() | st.integers(-(10**15), 10**15) | st.none() | st.booleans()


@given(
    rows=st.integers(1, 12).flatmap(
        lambda n: st.lists(
            st.tuples(*[VALUES] * n, st.text(max_size=200)),
            min_size=1, max_size=4,
        )
    ),
    width=st.integers(60, 200),
)  # fmt: skip
def test_a_table_fits_and_keeps_its_numbers(rows: list[tuple[Any, ...]], width: int) -> None:
    table = [{f"column{i}": value for i, value in enumerate(row)} for row in rows]
    lines = [line.plain if isinstance(line, Text) else line for line in draw_table(table, width)]
    whole = draw_table(table, 100_000)
    assert max(Text(line).cell_len for line in lines) <= width
    assert all(visible(line) == line for line in lines)
    numbers = [str(word) for line in whole[1:] for word in str(line).split() if re.fullmatch(r"-?[\d.]+", word)]
    shown = " ".join(lines)
    assert all(number in shown for number in numbers if "\\" not in number) or any("…" in line for line in lines)


def test_facts_fold_between_words() -> None:
    lines = [line.plain if isinstance(line, Text) else line for line in draw_facts({"sizes": list(range(100))}, 60)]
    assert max(map(len, lines)) <= 60
    assert [int(word.strip(",")) for line in lines for word in line.split() if word != "sizes"] == list(range(100))


def test_a_pipe_gets_whole_texts(golden: Path) -> None:
    done = process("query", "a.codes", "--latent", "19", cwd=golden)
    assert "…" not in done.stdout
    assert "class1/" in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Words that help


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("encode a.acts new.codes", "Missing argument RUN (a run). a.acts is an activation store, new.codes does not"),
        ("encode run new.codes", "Missing argument STORE... (an activation store). run is a run"),
        ("encode run a.acts", "Missing argument CODES (a code store). run is a run, a.acts is an activation store"),
        ("encode runs new.codes", "runs is a folder of runs"),
        ("train a.acts", "Missing argument RUN (a run). a.acts is an activation store"),
        ("train run", "Missing argument STORE... (an activation store). run is a run"),
        ("train", "Missing argument STORE... (an activation store) and RUN (a run)"),
        ("evaluate a.acts", "Missing argument RUN (a run). a.acts is an activation store"),
        ("evaluate run", "Missing argument STORE (an activation store). run is a run"),
        ("analyze a.codes", "Missing argument CONCEPTS (a concept table). a.codes is a code store"),
        ("report new.html", "Missing argument CONCEPTS (a concept table)"),
        ("report a.concepts", "Missing argument OUT"),
        ("extract images --model m --pretrained p --layer 1", "Missing argument STORE (an activation store)"),
        ("compare a.concepts new.json", "a.concepts is a concept table"),
        ("query", "Missing argument CODES (a code store)"),
    ],
)
def test_a_missing_argument_is_named_by_what_is_there(golden: Path, command: str, words: str) -> None:
    done = ask(golden, *command.split())
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    "command",
    [
        "train a.acts new-run --where label == 1", "train --where label == 1 a.acts new-run",
        "query a.codes --where label in (1,2)", "query a.codes --group label != 1 --versus label==2",
        "intervene run b.acts --chosen-where label >= 1", "query a.codes --where not label",
        "query a.codes --where=label == 1", "encode run a.acts new.codes --where label is not None",
    ],
)  # fmt: skip
def test_a_condition_that_the_shell_cut_must_be_quoted(golden: Path, command: str) -> None:
    done = ask(golden, *command.split())
    assert done.exit_code == 2
    said = " ".join(done.stderr.replace("│", " ").split())
    assert "must be quoted" in said
    assert '"label' in said or '"not label"' in said


@pytest.mark.parametrize(
    "command",
    ["query a.codes --where 'label == 1'", "train a.acts in --where label==1", "query a.codes --where 'not label'"],
)
def test_a_quoted_condition_is_not_refused(command: str) -> None:
    assert find_unquoted(shlex.split(command)) is None


def test_a_condition_that_holds_for_nothing_says_so(golden: Path) -> None:
    for verb in ("train a.acts new-run", "evaluate run b.acts", "query a.codes"):
        done = ask(golden, *verb.split(), "--where", "label == 99")
        assert done.exit_code == 1
        assert "--where 'label == 99' holds for none of the 48" in done.stderr
        assert "xtract more" not in done.stderr


def test_missing_arguments_without_kinds() -> None:
    roles: list[tuple[str, str | None]] = [("SRC", None), ("DST", None)]
    assert explain_missing(roles, ["nowhere"]).startswith("Missing argument SRC")


@pytest.mark.parametrize(
    ("command", "written", "following"),
    [
        ("encode run a.acts new.codes --device cpu", ["new.codes"], "analyze new.codes new.concepts"),
        ("analyze a.codes new.concepts --device cpu", ["new.concepts"], "report new.concepts new.html"),
        ("report a.concepts new.html", ["new.html"], "name a.concepts"),
        ("query a.codes --latent 19 --out new.csv --sheet new.png", ["new.csv", "new.png"], "query a.codes"),
        ("look images/class0/00.png --sae run --device cpu", [], "look images/class0/00.png --sae run --latent"),
        ("look images/class0/00.png --sae run --device cpu --out new-look.html", ["new-look.html"], ""),
        ("localize a.codes --out new.json", ["new.json"], "report CONCEPTS report.html --result new.json"),
        ("name a.concepts --set 3=sky", ["a.concepts/notes/own.json"], "report a.concepts a.html"),
        ("convert run new-saelens --to saelens", ["new-saelens"], ""),
        (
            "import a.concepts/nearest_cosine.npy new.acts --layer 1 --model-name any",
            ["new.acts"],
            "train new.acts runs/",
        ),
        ("publish run new-repository", [f"new-repository/{FOLDER}"], f"look IMAGE --sae new-repository/{FOLDER}"),
        ("info a.acts", [], "train a.acts runs/a"),
        ("info run", [], "encode run a.acts a.codes"),
    ],
)
def test_a_verb_ends_with_what_it_wrote_and_what_comes_next(
    golden: Path, command: str, written: list[str], following: str
) -> None:
    done = ask(golden, *command.split())
    assert done.exit_code == 0, done.output
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("Wrote ")] == [f"Wrote {path}" for path in written]
    assert all((golden / path).exists() for path in written)
    if following:
        assert lines[-1].startswith(f"Next: patchsae {following}")
        verb = lines[-1].split()[2]
        assert verb in get_command(cli.app).commands  # type: ignore[attr-defined]
    for flag in ("--json", "--quiet"):
        assert ask(golden, *command.split(), flag).stderr == ""


def test_the_same_command_again_says_that_it_was_done(golden: Path) -> None:
    done = ask(golden, *["encode", "run", "a.acts", "a.codes"])
    assert "Was there already: a.codes" in done.stderr


def test_the_next_command_is_not_refused(tmp_path: Path, tiny_store: Path) -> None:
    """A store with two hook points: the hint names one of them."""
    done = ask(tmp_path, "info", tiny_store)
    following = shlex.split(done.stderr.splitlines()[-1].removeprefix("Next: patchsae "))
    assert following[:2] == ["train", str(tiny_store)]
    assert following[-2:] == ["--layer", "2"]
    following[2] = "new-run"
    small = ["--n-latents", "32", "--k", "2", "--n-steps", "4", "--batch-size", "64"]
    assert ask(tmp_path, *following, *small).exit_code == 0


def test_a_path_names_an_image(golden: Path) -> None:
    uri = "class0/00.png"
    want = ask(golden, "query", "a.codes", "--image", uri).stdout
    for name in (f"images/{uri}", golden / "images" / uri, f"./images/../images/{uri}", "00.png"):
        done = ask(golden, "query", "a.codes", "--image", name)
        assert done.stdout == want, done.stderr
    assert "neither a position" in ask(golden, "query", "a.codes", "--image", "class1/00.png").stderr


def test_cls_is_called_cls(tmp_path: Path, tiny_store: Path) -> None:
    """Codes of CLS alone: no answer, table or sheet shows a place that does not exist."""
    small = ["--layer", "2", "--n-latents", "32", "--k", "2", "--n-steps", "4", "--batch-size", "32"]
    for command in (["train", tiny_store, "run", "--tokens", "cls", "--dead-tokens", "1000", *small],
                    ["encode", "run", tiny_store, "x.codes"]):  # fmt: skip
        assert ask(tmp_path, *command).exit_code == 0
    latent = ask(tmp_path, "query", "x.codes", "--where", "label >= 0").stdout.splitlines()[1].split()[0]
    done = ask(tmp_path, "query", "x.codes", "--latent", latent, "--out", "x.csv", "--sheet", "x.png")
    assert done.exit_code == 0, done.output
    head, *rows = done.stdout.splitlines()
    assert "-1" not in done.stdout
    assert head.split()[-1] == "at"
    assert {row.split()[-1] for row in rows} == {"CLS"}
    assert "-1" not in (tmp_path / "x.csv").read_text()
    assert (tmp_path / "x.csv").read_text().count('"CLS"') == len(rows)
