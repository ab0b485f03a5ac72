"""Docstrings as the reference shows them: plain English with the sections of Google's style, as Sphinx reads it.

In: a docstring with `Args:`, `Attributes:`, `Returns:`, `Yields:` and `Raises:`, examples that are indented or are
Python by themselves, and names between backticks. Out: lines of reStructuredText, in which a documented name is a
link. Nothing else in a docstring is markup, so an asterisk or a bar is shown as it was written.

The fields of a configuration are listed with the help texts of their flags, which is where they are described.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

import actcache
import analysis
import saetrain

DOCS = Path(__file__).parents[1]
SECTIONS = {"Args": "Arguments"} | {name: name for name in ("Attributes", "Returns", "Yields", "Raises")}
HEADER = re.compile(rf"({'|'.join(SECTIONS)}):$")
ITEM = re.compile(r"([*\w]+(?:, [*\w]+)*): (.*)", re.DOTALL)
INDENT = "   "
DOORS = {"actcache": actcache, "saetrain": saetrain, "analysis": analysis}
DETAILS = re.findall(r"^\.\. auto\w+:: (.+)$", (DOCS / "api" / "details.rst").read_text(), flags=re.MULTILINE)
"""Full names of what the front doors do not export, and their docstrings refer to."""
PUBLIC = {full.rpartition(".")[2]: full for full in DETAILS} | {
    name: f"{package}.{name}" for package, door in DOORS.items() for name in door.__all__
}
"""name -> where it is documented."""
Link = Callable[[str], str | None]
"""A name between backticks -> the full name of what it means, or None for a name that is documented nowhere."""


def convert_docstring(text: str, link: Link, described: dict[str, str] | None = None) -> list[str]:
    """A docstring as lines of reStructuredText.

    Args:
        link: says which names become links.
        described: attribute -> what it is, to which the section `Attributes:` adds.
    """
    lines, out, attributes = inspect.cleandoc(text).splitlines(), list[str](), dict(described or {})
    while lines:
        header = HEADER.match(lines[0])
        if header is None:
            end = next((i for i, line in enumerate(lines) if HEADER.match(line)), len(lines))
            out += convert_prose(lines[:end], link)
        else:
            end = next((i for i, line in enumerate(lines) if i and line and not line.startswith(" ")), len(lines))
            body = inspect.cleandoc("\n" + "\n".join(lines[1:end])).splitlines()
            items = list(split_items(body))
            if header[1] == "Attributes":
                items, attributes = join_attributes(items, attributes), {}
            out += convert_section(header[1], body, items, link)
        lines = lines[end:]
    return out + (convert_section("Attributes", [], list(attributes.items()), link) if attributes else [])


def convert_section(header: str, body: list[str], items: list[tuple[str, str]], link: Link) -> list[str]:
    """A section as a field of the description: a list of its items, or for `Returns:` its text."""
    if header in ("Returns", "Yields"):
        content = convert_prose(body, link)
    else:
        content = []
        for names, text in items:
            shown = ", ".join(show_name(name, header, link) for name in names.split(", ")) if names else ""
            first, *rest = convert_prose(text.splitlines(), link, bare_code=False) or [""]
            content.append(f"* {shown}: {first}" if shown else f"* {first}")
            content += [f"  {line}" if line else "" for line in rest[:-1]]  # without the last line, which is empty
    return [f":{SECTIONS[header]}:", *(f"{INDENT}{line}" if line else "" for line in content), ""]


def join_attributes(items: list[tuple[str, str]], described: dict[str, str]) -> list[tuple[str, str]]:
    """The attributes of a section with what is said of the fields elsewhere, which comes first."""
    alone = {names: text for names, text in items if names in described}
    together = {name for names, _ in items if ", " in names for name in names.split(", ")}
    fields_ = [
        (name, f"{text.removesuffix('.')}. {alone[name]}" if name in alone else text)
        for name, text in described.items()
        if name not in together
    ]
    return [(names, text) for names, text in items if names not in described] + fields_


def split_items(body: list[str]) -> Iterator[tuple[str, str]]:
    """(names, text) of each item of a section. What has no names, such as `The others are as in ...`, comes with ""."""
    starts = [i for i, line in enumerate(body) if line and not line.startswith(" ")]
    for start, end in zip(starts, [*starts[1:], len(body)], strict=True):
        text = inspect.cleandoc("\n".join(body[start:end]))
        item = ITEM.fullmatch(text)
        yield (item[1], inspect.cleandoc(item[2])) if item else ("", text)


def show_name(name: str, header: str, link: Link) -> str:
    full = link(name) if header == "Raises" else None
    return refer(name, full) if full else f"**{escape(name)}**"


def convert_prose(lines: list[str], link: Link, *, bare_code: bool = True) -> list[str]:
    """Paragraphs, lists and examples, which are indented or, with `bare_code`, Python without being so."""
    out: list[str] = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
        if not paragraph.strip():
            continue
        language = find_language(paragraph, bare_code)
        if language:
            code = inspect.cleandoc("\n" + paragraph).splitlines()
            out += [f".. code-block:: {language}", "", *(INDENT + line for line in code), ""]
        elif paragraph.startswith("- "):
            points = [" ".join(point.split()) for point in re.split(r"^- ", paragraph, flags=re.MULTILINE)[1:]]
            out += [*(f"* {convert_text(point, link)}" for point in points), ""]
        else:
            out += [convert_text(" ".join(paragraph.split()), link), ""]
    return out


def find_language(paragraph: str, bare_code: bool) -> str | None:
    """`python` or `text` for an example, None for prose.

    The indentation of an example is lost where nothing but the example follows the first line of a docstring.
    """
    indented = all(line.startswith("    ") for line in paragraph.splitlines() if line.strip())
    try:
        ast.parse(inspect.cleandoc("\n" + paragraph))
    except SyntaxError:
        return "text" if indented else None
    return "python" if indented or (bare_code and re.search(r"[(=]", paragraph)) else None


def convert_text(text: str, link: Link) -> str:
    """Text in one line: names between backticks become links or code, errors links, all else is as it was written."""
    out = ""
    for part in re.split(r"(``.+?``|`[^`]+`)", text):
        if part.startswith("``"):
            out += rf"\ {part}\ "
        elif part.startswith("`"):
            name = part.strip("`")
            full = link(name)
            out += refer(name, full) if full else rf"\ ``{name}``\ "
        else:
            words = re.split(r"\b([A-Z]\w+Error)\b", part)
            out += "".join(
                refer(word, full) if i % 2 and (full := link(word)) else escape(word) for i, word in enumerate(words)
            )
    return out.replace(r"\ " * 2, r"\ ").strip().removeprefix("\\ ").removesuffix("\\")


def refer(name: str, full: str) -> str:
    return rf"\ :py:obj:`{name} <{full}>`\ "


def escape(text: str) -> str:
    return re.sub(r"([\\*_|`])", r"\\\1", text)


def describe_fields(record: type) -> dict[str, str]:
    """field of a dataclass or a named tuple -> its flag's help text, or the comment beside it, such as its shape."""
    if not (is_dataclass(record) or hasattr(record, "_fields")):
        return {}
    source = inspect.getsource(record).splitlines()
    described = {}
    for node in ast.parse(inspect.cleandoc("\n" + "\n".join(source))).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not node.target.id.startswith("_"):
            _, mark, comment = source[node.end_lineno - 1].partition("  # ")  # type: ignore[operator]
            if mark and not comment.startswith(("noqa", "type: ", "fmt: ")):
                described[node.target.id] = comment
    if is_dataclass(record):
        described |= {each.name: each.metadata["help"] for each in fields(record) if each.metadata.get("help")}
    return described


# ---------------------------------------------------------------------------------------------------------------------
# What Sphinx calls


def find_link(here: str) -> Link:
    """Links of the docstring of `here`: the methods of its class, and whatever the reference documents."""
    owner = next((full for full in PUBLIC.values() if here == full or here.startswith(f"{full}.")), here)
    package, _, name = owner.rpartition(".")
    class_ = getattr(importlib.import_module(package), name)
    members = {each for each, value in vars(class_).items() if getattr(value, "__doc__", None) and each[0] != "_"}

    def link(name: str) -> str | None:
        first, _, rest = name.removesuffix("()").partition(".")
        full = f"{owner}.{first}" if isinstance(class_, type) and first in members else PUBLIC.get(first)
        if full is None or full == here:
            return None
        return f"{full}.{rest}" if rest else full

    return link


def process_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Replace what autodoc read by its conversion."""
    text, described = "\n".join(lines), describe_fields(obj) if what == "class" else {}
    if is_dataclass(obj) and text.startswith(f"{getattr(obj, '__name__', '')}("):  # dataclass wrote it
        text = ""
    lines[:] = convert_docstring(text, find_link(name), described)


def skip_member(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples, which have no text of their own."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


def resolve_alias(app: Sphinx, env: Any, node: Any, contnode: nodes.Element) -> nodes.reference | None:
    """A link to what a type hint names, `actcache.store.reader.ActivationStore`, under its public name."""
    target = str(node.get("reftarget", ""))
    public = PUBLIC.get(target.rpartition(".")[2])
    if public is None or public == target or target.partition(".")[0] not in DOORS:
        return None
    found: nodes.reference | None = env.domains["py"].resolve_xref(
        env, node.get("refdoc", ""), app.builder, "obj", public, node, contnode
    )
    return found


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("missing-reference", resolve_alias)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
