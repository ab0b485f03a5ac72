"""What artifacts say of themselves in a notebook."""

import html
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actcache import ActivationStore
from analysis import ConceptTable
from saetrain import CodeStore, Run

GOLDEN = Path(__file__).parents[1] / "golden" / "pipeline"
HOSTILE = "<img src=x onerror=alert(1)>\x1b[2J\u202e"


def read_facts(drawn: str) -> dict[str, str]:
    """name -> value, as people see them."""
    rows = re.findall(r"<tr><th[^>]*>(.*?)</th><td[^>]*>(.*?)</td></tr>", drawn)
    return {html.unescape(name): html.unescape(value) for name, value in rows}


@pytest.mark.parametrize(
    ("folder", "read", "facts"),
    [
        ("a.acts", ActivationStore.open,
         {"images": "48", "could not be read": "0", "tokens of an image": "1 cls, 3 x 3 patches", "channels": "32",
          "hook points": "blocks.1.hook_resid_post"}),
        ("run", Run.open,
         {"SAE": "topk, 64 latents over 32 channels", "trained": "60 steps", "active latents a token": "4"}),
        ("a.codes", CodeStore.open,
         {"images": "48", "latents": "64", "tokens of an image": "10 of 10", "entries": "1,920, 4.0 a token"}),
        ("a.concepts", ConceptTable.open, {"latents": "64, of which 42 fire", "images": "48", "tokens": "480"}),
    ],
)  # fmt: skip
def test_an_artifact_shows_its_facts(
    folder: str, read: Callable[[Path], Any], facts: dict[str, str], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(GOLDEN / folder, tmp_path / f"{HOSTILE}{folder}"))
    drawn = read(path)._repr_html_()
    assert facts.items() <= read_facts(drawn).items()
    assert "&lt;img src=x" in drawn
    assert set(re.findall(r"<(\w+)", drawn)) <= {"b", "table", "tr", "th", "td"}
    assert drawn.replace("\u202e", "").isprintable()
    assert "\u202e" not in drawn
    assert str(tmp_path) not in drawn
