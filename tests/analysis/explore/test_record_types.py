"""Every record has the same fields in records.py, by which Python writes, and in types.ts, by which the page reads."""

import re
from pathlib import Path
from typing import is_typeddict

import pytest

from analysis.explore import records

TYPES = Path(__file__).parents[3] / "analysis" / "explore" / "web" / "src" / "types.ts"
PAIRS = {
    "Column": "ColumnRecord", "Absent": "AbsentRecord", "Site": "SiteRecord", "Name": "NameRecord", "Names": "Names",
    "Shot": "Shot", "Kind": "KindRecord", "Strengths": "Strengths", "ClassShare": "ClassRecord", "Partner": "Partner",
    "Group": "Group", "CounterExamples": "CounterExamples", "Patch": "Patch", "Twin": "Twin", "Latent": "LatentRecord",
    "Images": "Images", "ImageRecord": "ImageRecord", "Compared": "Compared", "Comparison": "ComparisonRecord",
    "Upload": "UploadAnswer", "ClassChange": "ClassChange", "Edit": "EditAnswer", "Found": "Found",
}  # fmt: skip
SENT = {"EditRequest"}
"""What the page sends."""
PARTS = {"LatentImages", "ImageCodes"}
"""Of which a record is made in Python."""


def read_interfaces() -> dict[str, dict[str, bool]]:
    """interface -> field -> whether it may be absent."""
    found: dict[str, dict[str, bool]] = {}
    for name, body in re.findall(r"^(?:export )?interface (\w+)[^{]*\{\n(.*?)^\}", TYPES.read_text(), re.M | re.S):
        fields = re.findall(r"^  (\w+)(\??):", body, re.M)
        found[name] = {field: mark == "?" for field, mark in fields}
    return found


def test_both_sides_name_every_record() -> None:
    assert set(read_interfaces()) == {*PAIRS, *SENT}
    assert {name for name, value in vars(records).items() if is_typeddict(value)} == {*PAIRS.values(), *PARTS}


def test_a_record_inside_another_has_a_name_of_its_own() -> None:
    """Otherwise its fields would not be compared. Python names those of these two where it fills them."""
    assert re.findall(r"^  (\w+)\??: .*\{.*\}.*;$", TYPES.read_text(), re.M) == ["block", "kinds"]


@pytest.mark.parametrize(("page", "python"), PAIRS.items())
def test_both_sides_name_the_same_fields(page: str, python: str) -> None:
    record = getattr(records, python)
    fields = {name: name in record.__optional_keys__ for name in record.__annotations__}
    assert fields == read_interfaces()[page]
