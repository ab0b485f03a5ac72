"""The documentation as a site: built once without a warning, and read from the disk, as files and in a browser."""

import html
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
SITE = ROOT / "docs" / "_site"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION: str = PROJECT["version"]
DOORS = ("actcache", "saetrain", "analysis")
OLDER, NEWER = "0.0.9", "0.0.10"

NEEDED = ("sphinx", "myst_parser", "furo", "sphinx_copybutton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("CI") and any(importlib.util.find_spec(name) is None for name in NEEDED),
        reason="the extra `docs` is not installed",
    ),
]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"site_{name}", SITE / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as the command of CONTRIBUTING.md builds it, beside two folders that stand for other versions."""
    site = tmp_path_factory.mktemp("site")
    for version in (OLDER, NEWER):
        (site / version).mkdir()
        (site / version / "objects.inv").touch()
    done = subprocess.run(
        [sys.executable, SITE / "build.py", site], capture_output=True, text=True, check=False, cwd=site,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{site / VERSION}/index.html\n"
    assert done.stderr == ""
    return site


class Page(HTMLParser):
    """What a page links to, what it loads, and the anchors in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links, self.loaded, self.anchors = list[str](), list[str](), set[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and "href" in given:
            self.loaded.append(given["href"])
        elif "src" in given:
            self.loaded.append(given["src"])


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text()) for path in (site / VERSION).rglob("*.html")}


def test_every_page_of_the_folder_is_there_and_says_its_version(site: Path, pages: dict[Path, Page]) -> None:
    docs = ROOT / "docs"
    sources = [page for suffix in ("md", "rst", "ipynb") for page in docs.rglob(f"*.{suffix}")]
    assert len(sources) > 80
    assert {site / VERSION / page.relative_to(docs).with_suffix(".html") for page in sources} - set(pages) == set()
    assert [path for path in pages if f"patchsae {VERSION}" not in path.read_text()] == []


def test_the_navigation_has_the_groups_of_the_front_page(site: Path) -> None:
    """Under the headings that stand above the links, each page once."""
    groups = re.findall(r"^### (.+)$", (ROOT / "docs" / "index.md").read_text(), flags=re.MULTILINE)
    assert len(groups) > 5
    home = (site / VERSION / "index.html").read_text()
    tree = home[home.index('class="sidebar-tree"') :]
    tree = tree[: tree.index("</aside>")]
    captions = re.findall(r'<span class="caption-text">([^<]+)</span>', tree)
    assert captions[: len(groups)] == groups
    shown = re.findall(r'href="(guide/[^"#]+)"', tree)
    guides = {f"guide/{page.stem}.html" for page in (ROOT / "docs" / "guide").glob("*.md")}
    assert sorted(shown) == sorted(guides)


def test_every_link_leads_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    """To a file of the site and, after a #, to an anchor in it."""
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or link == "#":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in pages[target].anchors):
                broken.append((str(path.relative_to(site)), link))
    assert broken == []


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    """Of the pages and of the styles; what they load is in the folder."""
    for path, page in pages.items():
        for name in page.loaded:
            parts = urlsplit(name)
            if name == "#":  # the page itself, as its own search
                continue
            assert parts.scheme in ("", "data"), (path, name)
            assert parts.scheme or (path.parent / unquote(parts.path)).is_file(), (path, name)
    for style in (site / VERSION).rglob("*.css"):
        assert re.findall(r"url\(\s*['\"]?(?:https?:)?//[^)]*\)", style.read_text()) == [], style


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    inventory = (site / VERSION / "objects.inv").read_bytes().split(b"\n", 4)[4]
    kinds = dict(re.findall(r"^(\S+) py:(\w+) ", zlib.decompress(inventory).decode(), flags=re.MULTILINE))
    public = [f"{door}.{name}" for door in DOORS for name in importlib.import_module(door).__all__]
    assert [name for name in public if name not in kinds] == []
    assert kinds["actcache.ActivationStore.read"] == "method"
    assert kinds["actcache.SettingsError"] == "exception"


def text_of(path: Path) -> str:
    """The words of a page, without what is between angle brackets."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", path.read_text())))


def test_the_reference_shows_shapes_flags_errors_and_examples(site: Path) -> None:
    api = site / VERSION / "api"
    assert "[I, T, D] in the store's dtype" in text_of(api / "stores.html")
    training = text_of(api / "training.html")
    assert "n_latents: Number of latents" in training  # the help text of a flag
    assert re.search(r"penalty: [A-Z][^`]+\. quadratic is \(l0", training)  # the same, and what the docstring adds
    assert "[B] int64, the stored position" in training  # the comment beside a field
    extracting = (api / "extracting.html").read_text()
    assert 'href="errors.html#actcache.SettingsError"' in extracting
    assert 'href="stores.html#actcache.ActivationStore"' in extracting  # of the signature
    assert re.search(r"highlight-python.*?extract.*?val\.acts", extracting, flags=re.DOTALL)


def test_other_versions_are_listed(site: Path) -> None:
    listed = (site / "versions.js").read_text()
    assert json.loads(listed.removeprefix("window.patchsaeVersions = ").rstrip(";\n")) == [OLDER, NEWER, VERSION]
    assert f"url={VERSION}/index.html" in (site / "index.html").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


class Opened(NamedTuple):
    page: Any
    requested: list[str]
    errors: list[str]


@pytest.fixture
def opened(browser: Any) -> Iterator[Opened]:
    """A page of Chromium, and what it asked for."""
    page = browser.new_page()
    seen = Opened(page, [], [])
    page.on("request", lambda request: seen.requested.append(request.url))
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    yield seen
    page.close()


def test_it_works_from_the_disk(site: Path, opened: Opened) -> None:
    """The way to the newest version, the other versions, search, light and dark."""
    page, requested, errors = opened
    page.goto(f"file://{site}/index.html")
    page.wait_for_url(f"**/{VERSION}/index.html")
    assert page.locator(".site-versions").inner_text().split() == ["Versions:", VERSION, NEWER, OLDER]
    assert page.locator(".site-versions a").first.get_attribute("href") == f"./../{NEWER}/index.html"
    page.locator("input.sidebar-search").fill("amortization")
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results ul.search li a")
    found = page.locator("#search-results ul.search li a").evaluate_all("links => links.map(link => link.href)")
    assert any("guide/dictionary.html" in link for link in found), found
    page.goto(f"file://{site}/{VERSION}/guide/dictionary.html")
    grounds = set()
    for _ in range(3):
        page.locator(".theme-toggle").locator("visible=true").first.click()
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2
    assert [address for address in requested if not address.startswith(("file:", "data:"))] == []
    assert errors == []


# ---------------------------------------------------------------------------------------------------------------------
# Docstrings


DOCSTRING = """Read *all* of `x`, see `ActivationStore` and `no_such`.

Example after the first line:

    store = read("x.acts")

store = read("y.acts"); store.a_

    a + b = c      in words

- one point
  that goes on
- another_

Args:
    x, y: rows [B, D],
        or `None`.
    The others are as in `extract`.

Returns:
    [N] a value_: text.

Raises:
    SettingsError, CorruptError: it is wrong.
    ValueError if not.
"""


def test_a_docstring_is_converted() -> None:
    docstrings = load("docstrings")
    known = {"ActivationStore": "actcache.ActivationStore", "extract": "actcache.extract",
             "SettingsError": "actcache.SettingsError"}  # fmt: skip
    out = "\n".join(docstrings.convert_docstring(DOCSTRING, known.get, {"n": "a number"}))
    lines = out.splitlines()
    assert lines[0].startswith(r"Read \*all\* of ")
    assert r":py:obj:`ActivationStore <actcache.ActivationStore>`" in lines[0]
    assert "``no_such``" in lines[0]
    assert out.count(".. code-block:: python") == 2
    assert out.count(".. code-block:: text") == 1
    assert r"* one point that goes on" in lines
    assert r"* another\_" in lines
    assert r"   * **x**, **y**: rows [B, D], or \ ``None``\ ." in lines
    assert any(line.startswith("   * The others are as in") for line in lines)
    assert r"   [N] a value\_: text." in lines
    assert any(
        "`SettingsError <actcache.SettingsError>`" in line and "**CorruptError**: it is" in line for line in lines
    )
    assert lines[lines.index(":Attributes:") + 1] == "   * **n**: a number"


# ---------------------------------------------------------------------------------------------------------------------
# Files for people who cite, report and ask


def test_the_citation_names_this_version() -> None:
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert (cited["version"], cited["license"]) == (VERSION, PROJECT["license"])
    assert cited["title"].startswith(PROJECT["name"])
    assert {"message", "title", "authors", "type", "abstract"} <= set(cited)


@pytest.mark.parametrize("form", ["bug", "question", "tower-or-format"])
def test_a_form_asks_for_what_info_says(form: str) -> None:
    yaml = pytest.importorskip("yaml")
    asked = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml").read_text())
    assert {"name", "description", "body"} <= set(asked)
    fields = {each["id"]: each["attributes"]["label"] for each in asked["body"] if each["type"] != "markdown"}
    assert len(fields) == sum(each["type"] != "markdown" for each in asked["body"])
    assert "patchsae info --json" in fields["info"]
