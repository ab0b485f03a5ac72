"""The page that is shipped is the one that the sources beside it build, and its licenses are in it."""

from hashlib import sha256
from pathlib import Path

ROOM = Path(__file__).parents[3] / "analysis" / "explore"


def test_the_page_was_built_from_these_sources() -> None:
    sources = [f"src/{file.name}" for file in (ROOM / "web" / "src").iterdir()]
    names = sorted(["build.mjs", "package-lock.json", *sources])
    digest = sha256()
    for name in names:
        digest.update(name.encode() + b"\0" + (ROOM / "web" / name).read_bytes())
    built = (ROOM / "page" / "SOURCE").read_text().strip()
    assert digest.hexdigest() == built, "run: npm ci && npm run build, in analysis/explore/web"


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    for name in ("index.html", "app.js", "style.css"):
        text = (ROOM / "page" / name).read_text()
        found = [word for word in ("http://", "https://", "//cdn") if word in text.replace("http://www.w3.org/", "")]
        assert found == [], f"{name} has {found}"
