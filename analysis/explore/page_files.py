"""The files of the page, as they were built: index.html, app.js and style.css."""

from collections.abc import Mapping
from importlib.resources import files

from actcache import SettingsError

KINDS = {
    ".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml", ".txt": "text/plain; charset=utf-8", ".png": "image/png",
}  # fmt: skip
"""The files that belong to the page, by suffix, and their media types."""
INDEX = "index.html"


def read_page() -> Mapping[str, bytes]:
    """name -> content. Raises SettingsError where the page was not built."""
    folder = files("analysis.explore") / "page"
    found = {}
    if folder.is_dir():
        found = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file() and kind_of(file.name)}
    if INDEX not in found:
        raise SettingsError("The page of the explorer has not been built. CONTRIBUTING.md says how to build it.")
    return found


def kind_of(name: str) -> str | None:
    """The media type of a file of the page; None for a file that does not belong to it."""
    return KINDS.get("." + name.rpartition(".")[2])
