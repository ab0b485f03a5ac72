"""The notebooks as pages, with the outputs that are committed in them. Nothing is run.

A notebook is turned into Markdown when it is read: its text as it stands, its code as blocks, and its outputs as HTML,
which the objects of this project write without scripts or styles of their own.
"""

import html
import json
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx


def read_notebook(app: Sphinx, name: str, source: list[str]) -> None:
    """Replace the JSON of a notebook by Markdown when it is read."""
    path = Path(app.env.doc2path(name))
    if path.suffix == ".ipynb":
        source[0] = convert_notebook(json.loads(source[0]), path.name)


def convert_notebook(notebook: dict[str, Any], file: str) -> str:
    """The page of a notebook; a line below its title leads to the file."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
        else:
            parts += [f"```python\n{text}\n```", *map(show_output, cell["outputs"])]
    title, rest = parts[0].split("\n", 1)
    download = f"{{download}}`Download this notebook <{file}>` to run it yourself."
    return "\n\n".join([title, download, rest.strip(), *parts[1:]])


def show_output(output: dict[str, Any]) -> str:
    """An output as a block of HTML. Raises KeyError for one that has neither HTML nor text, such as an error."""
    data = output["data"] if "data" in output else {"text/plain": output["text"]}
    shown = "".join(data.get("text/html", []))
    if not shown:
        text = re.sub(r"\x1b\[[\d;]*m", "", "".join(data["text/plain"]))
        shown = f"<pre>{html.escape(text.rstrip())}</pre>"
    return f'```````{{raw}} html\n<div class="notebook-output">{shown}</div>\n```````'


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", read_notebook)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
