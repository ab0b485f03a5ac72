"""Every record has the same fields in records.py, by which Python writes, and in types.ts, by which the page reads."""

import re
from pathlib import Path

import pytest

from analysis.explore import records

TYPES = Path(__file__).parents[3] / "analysis" / "explore" / "web" / "src" / "types.ts"
PAIRS = {
    "Column": "ColumnRecord", "Site": "SiteRecord", "Shot": "Shot", "Kind": "KindRecord", "Latent": "LatentRecord",
    "ImageRecord": "ImageRecord", "Names": "Names", "Images": "Images", "Compared": "Compared",
    "Comparison": "ComparisonRecord", "Upload": "UploadAnswer", "Edit": "EditAnswer",
}  # fmt: skip
OTHERS = {"EditRequest"}
"""What the page sends."""


def read_interfaces() -> dict[str, dict[str, bool]]:
    """interface -> field -> whether it may be absent."""
    found: dict[str, dict[str, bool]] = {}
    for name, body in re.findall(r"^export interface (\w+) \{\n(.*?)^\}", TYPES.read_text(), re.M | re.S):
        fields = re.findall(r"^  (\w+)(\??):", body, re.M)
        found[name] = {field: mark == "?" for field, mark in fields}
    return found


def test_both_sides_name_every_record() -> None:
    assert set(read_interfaces()) == {*PAIRS, *OTHERS}


@pytest.mark.parametrize(("page", "python"), PAIRS.items())
def test_both_sides_name_the_same_fields(page: str, python: str) -> None:
    record = getattr(records, python)
    fields = {name: name in record.__optional_keys__ for name in record.__annotations__}
    assert fields == read_interfaces()[page]
