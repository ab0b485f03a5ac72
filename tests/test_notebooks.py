"""The notebooks of docs/notebooks run from beginning to end, and what is committed with them is what they show.

To run notebooks anew and keep their outputs: python tests/test_notebooks.py docs/notebooks/*.ipynb
"""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

for needed in ("ipykernel", "nbclient", "pandas"):
    if not os.environ.get("CI"):  # where none of them may be missing
        pytest.importorskip(needed, reason=f"the package {needed} is not installed")

import nbformat
from jupyter_client import KernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
MOST_BYTES = 400_000


@contextmanager
def start_kernel() -> Iterator[KernelManager]:
    """A process that runs notebooks, one after the other, so that torch is loaded once. No port is opened."""
    manager = KernelManager(transport="ipc", kernel_name="python3")
    manager.start_kernel(env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        yield manager
    finally:
        manager.shutdown_kernel(now=True)


def run_notebook(manager: KernelManager, file: Path, folder: str) -> Any:
    """The notebook with new outputs. It starts without names, in `folder`; a warning is an error."""
    notebook = nbformat.read(file, as_version=4)
    before = f"import os, tempfile, warnings\nos.chdir({folder!r}); tempfile.tempdir = {folder!r}\n"
    first = nbformat.v4.new_code_cell(f"%reset -f\n{before}warnings.simplefilter('error')")
    notebook.cells.insert(0, first)
    client = NotebookClient(notebook, timeout=300, km=manager, record_timing=False)
    try:
        client.execute()
    finally:
        if client.kc is not None:
            client.kc.stop_channels()
    del notebook.cells[0]
    for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1):
        cell.execution_count = number
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def kinds(notebook: Any) -> list[list[tuple[str, ...]]]:
    """What each cell shows: kinds of outputs. A bar is left out, since what ends quickly shows none."""
    return [
        [(output.output_type, *sorted(output.get("data", {}))) for output in cell.outputs if not is_bar(output)]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def is_bar(output: Any) -> bool:
    return str(output.get("data", {}).get("text/html", "")).startswith("<small>")


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelManager]:
    with start_kernel() as manager:
        yield manager


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_and_shows_what_is_committed(file: Path, kernel: KernelManager, tmp_path: Path) -> None:
    done = run_notebook(kernel, file, str(tmp_path))
    assert kinds(done) == kinds(nbformat.read(file, as_version=4))
    outputs = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_what_is_committed_is_small_and_tells_nothing_of_a_machine(file: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    assert file.stat().st_size < MOST_BYTES
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    shown = "".join(str(output) for cell in code for output in cell.outputs)
    assert shown.count("image/jpeg") > 5
    shown = re.sub(r"base64,[\w+/=]+", "", shown)
    assert re.findall(r"(?:/tmp|/home|/root|/Users|/work|file://)\S*|<script", shown) == []
    assert sum(len(cell.source.splitlines()) > 25 for cell in code) <= 1


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_links_lead_somewhere(file: Path) -> None:
    assert f"(notebooks/{file.name})" in (ROOT / "docs" / "index.md").read_text()
    text = "\n".join(cell.source for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(\s*(?!https?:)([^)#\s]+)", text)
    assert len(links) >= 2
    assert [link for link in links if not (file.parent / link).exists()] == []


def test_a_bar_is_one_place_below_its_cell(kernel: KernelManager, tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook()
    for pause in (0.05, 0):
        loop = f"for i in range(1, 21):\n    time.sleep({pause})\n    bar(i, 20)"
        notebook.cells.append(
            nbformat.v4.new_code_cell(
                f"import time\nfrom actcache import progress_bar\nbar = progress_bar('<b>')\n{loop}"
            )
        )
    nbformat.write(notebook, tmp_path / "bar.ipynb")
    slow, quick = run_notebook(kernel, tmp_path / "bar.ipynb", str(tmp_path)).cells
    assert [output.output_type for output in slow.outputs] == ["display_data"]
    data = slow.outputs[0].data
    assert re.fullmatch(r"<small>&lt;b&gt;  20 of 20  .*  took 0:(?!00)\d\d</small>", data["text/html"])
    assert re.fullmatch(r"<b>  ━+  20 of 20  .*  took 0:(?!00)\d\d", data["text/plain"])
    assert quick.outputs == []


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) == 3


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as written, start_kernel() as process:
        for name in sys.argv[1:]:
            nbformat.write(run_notebook(process, Path(name), written), name)
