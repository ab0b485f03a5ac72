"""The Markdown pages as a site, without a mark in them: navigation from the front page, and links that leave `docs/`.

The pages are written for a reader of the repository, where a list of contents in Sphinx's notation would be noise. The
links in a page that leads to others, and the headings above them, say the same.
"""

import re
from pathlib import Path

from sphinx.application import Sphinx

LEADING = {"index": "\n## Guide", "decisions/README": "\n## "}
"""Pages whose links are the navigation, and the heading from which on they are."""
CAPTIONS = {"api": "Python API"}
"""Of folders whose names are no captions."""
HEADING_OR_LINK = r"^(##+) (.+)$|\]\(([^).#:][^)#:]*)\.(?:md|rst|txt|ipynb)[)#]"
"""In a page that leads to others: a heading, or a link to one of them."""
BESIDE = {"README": "/index.md"} | {
    name: f"/project/{name.lower()}.txt" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")
}
"""Files beside `docs/` -> their pages. A page in `project/` holds the name of the file alone."""


def read_page(app: Sphinx, name: str, source: list[str]) -> None:
    """Change the text of a page when it is read."""
    path = Path(app.env.doc2path(name))
    if path.suffix == ".rst":
        return
    if path.suffix == ".txt":
        file = Path(app.srcdir).parent / source[0].strip()
        app.env.note_dependency(str(file))
        source[0] = file.read_text().replace("](docs/", "](/")
    source[0] = re.sub(r"\]\((?:\.\./)*([A-Z]+)\.md(?:#[^)]*)?\)", lead_inside, source[0])
    if name in LEADING:
        source[0] += list_contents(source[0], LEADING[name])


def lead_inside(link: re.Match[str]) -> str:
    """A link to a file beside `docs/` as a link to its page; others, such as decisions/README.md, stay."""
    return f"]({BESIDE[link[1]]})" if link[1] in BESIDE else link[0]


def list_contents(text: str, start: str) -> str:
    """The pages to which a page links, as hidden lists of contents, each page once and in the order of the links: a
    list for each heading of the third level, and for each folder where there is no such heading.
    """
    lists: dict[str, list[str]] = {}
    listed, heading = set[str](), ""
    for level, title, link in re.findall(HEADING_OR_LINK, text[text.index(start) :], flags=re.MULTILINE):
        if level:
            heading = title if level == "###" else ""
        elif link not in listed:
            listed.add(link)
            room = link.strip("/").rpartition("/")[0]
            lists.setdefault(heading or CAPTIONS.get(room, room.capitalize()), []).append(link)
    return "".join(
        f"\n```{{toctree}}\n:hidden:\n{f':caption: {caption}' if caption else ''}\n\n" + "\n".join(links) + "\n```\n"
        for caption, links in lists.items()
    )


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", read_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
