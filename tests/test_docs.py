"""The documentation stays true: python blocks run, recipes parse and name real flags, the file map equals the tree."""

import html
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.main import get_command
from warm_process import WarmProcess

import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(code, id=f"{page.relative_to(ROOT)}-{i}")
    for page in PAGES
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL))
]


@pytest.fixture(scope="module")
def strangers_store(
    tmp_path_factory: pytest.TempPathFactory, make_images: Callable[..., Path], tiny_model: dict[str, str]
) -> Path:
    """A store as the README makes one: one layer, and classes with names that no page knows."""
    from actcache import extract

    folder = tmp_path_factory.mktemp("stranger")
    images = make_images(folder / "photos", 75)
    for number, name in enumerate(("heron", "otter", "zebra")):
        (images / f"class{number}").rename(images / name)
    extract(images, folder / "val.acts", **tiny_model, layers=[1], shard_images=16)  # type: ignore[arg-type]
    return folder / "val.acts"


@pytest.mark.parametrize("code", BLOCKS)
def test_python_blocks_run(code: str, tmp_path: Path, strangers_store: Path, warm: WarmProcess) -> None:
    shutil.copytree(strangers_store, tmp_path / "val.acts")
    done = warm.run("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def command_line_page() -> str:
    """docs/reference/cli.md as typer writes it. To renew it: python tests/test_docs.py > docs/reference/cli.md"""
    done = subprocess.run(
        [sys.executable, "-m", "typer", "cli", "utils", "docs", "--name", "patchsae", "--title", "Command line"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "TERMINAL_WIDTH": "100"},
    )
    return done.stdout


def test_the_command_line_page_is_what_the_program_says() -> None:
    """Compares flags and their help texts. The layout is typer's own and changes with its version."""
    page = html.unescape((ROOT / "docs" / "reference" / "cli.md").read_text())
    verbs = get_command(cli.app).commands  # type: ignore[attr-defined]
    assert re.findall(r"^## `patchsae (\w+)`", page, flags=re.MULTILINE) == list(verbs)
    for name, verb in verbs.items():
        section = page.split(f"## `patchsae {name}`")[1].split("\n## ")[0]
        for parameter in verb.params:
            if parameter.param_type_name == "option":
                assert f"`{parameter.opts[0]}" in section, (name, parameter.name)
            assert (parameter.help or "") in section, (name, parameter.name)


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    """To a file that exists and, after a #, to a heading in it."""
    for link, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        target = page.parent / link if link else page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.+)", target.read_text(), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}, link


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "docs" / "recipes").glob("*.sh"))], ids=lambda p: p.name)
def test_commands_name_real_verbs_and_flags(page: Path) -> None:
    verbs = get_command(cli.app).commands  # type: ignore[attr-defined]
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(r"^\s*(?:\$?patchsae|python cli\.py) (.+)$", text, flags=re.MULTILINE):
        words = line.split()
        verb = words[0]
        assert verb in verbs, line
        known = {flag for parameter in verbs[verb].params for flag in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_recipes_are_valid_shell() -> None:
    for recipe in (ROOT / "docs" / "recipes").glob("*.sh"):
        subprocess.run(["bash", "-n", str(recipe)], check=True)


def test_the_file_map_names_every_sub_package() -> None:
    named = set(re.findall(r"^\| `([^`]+)` \|", (ROOT / "README.md").read_text(), flags=re.MULTILINE))
    doors = [*ROOT.glob("*/__init__.py"), *ROOT.glob("*/*/__init__.py")]
    assert {path for path in named if not (ROOT / path).exists()} == set()
    assert {f"{door.parent.relative_to(ROOT)}/" for door in doors} - named == set()


def test_contributing_points_to_what_exists() -> None:
    paths = re.findall(r"`((?:actcache|saetrain|analysis|tests|docs|benchmarks)/[^`]+)`", PAGES[1].read_text())
    assert len(paths) > 30
    assert [path for path in paths if not list(ROOT.glob(f"{path.rstrip('/')}*"))] == []


def test_the_index_leads_to_every_page() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / link).resolve() for link in re.findall(r"\]\(([^)#:]+)", index.read_text())}
    pages = {page for page in PAGES if page.is_relative_to(ROOT / "docs") and page.parent.name != "decisions"}
    recipes = {file for file in (ROOT / "docs" / "recipes").iterdir() if file.is_file()}
    assert (pages | recipes) - linked - {index} == set()


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "guide").glob("*.md")), ids=lambda page: page.name)
def test_a_guide_page_is_short(page: Path) -> None:
    assert len(page.read_text().splitlines()) < 60


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_of_prose_wrap(page: Path) -> None:
    """At 100 columns. Tables, blocks of code, images and the generated page of the command line do not wrap."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    long = [line for line in prose.splitlines() if len(line) > 100 and not line.startswith(("|", "![", "    "))]
    assert long == [] or page.name == "cli.md"


def test_the_two_commands_are_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for mark in ("quickstart", "tests"):
        block = re.search(rf"<!-- {mark} -->\n```bash\n(.+)\n```", readme)
        assert block, mark
        assert "\n" not in block[1]


if __name__ == "__main__":
    print(command_line_page(), end="")
