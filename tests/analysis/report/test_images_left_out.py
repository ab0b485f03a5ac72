"""The page says, of every result, how many images were left out because they had been learned from, or used anyway."""

import json
import re
import shutil
from html import unescape
from pathlib import Path

import pytest

from actcache.artifacts import digest
from analysis import Comparison, write_adaptation_page, write_report
from analysis.results import read_result

GOLDEN = Path(__file__).parents[2] / "golden" / "pipeline"
RESULTS = ("evaluate", "evaluate-runs", "intervene", "intervene-set", "attribute", "steer", "rules", "compare")
SEEN = {
    "left out": ({"by": "run <l10>", "n": 1234, "of": 5000, "used": False, "known_by": "content"},
                 "1,234 of 5,000 images are left out because they were learned from (run <l10>)."),
    "used": ({"by": "run l10", "n": 3, "of": 9, "used": True, "known_by": "content"},
             "3 of 9 images are judged although they were learned from (run l10)."),
    "by name": ({"by": "run l10", "n": 0, "of": 9, "used": False, "known_by": "uri"},
                "Images were compared by name, because a store has no content hashes (run l10)."),
    "unknown": ({"by": "prompts p", "n": 0, "of": 9, "used": False, "known_by": "unknown"},
                "Which images were learned from is not recorded (prompts p)."),
    "nothing to say": ({"by": "run l10", "n": 0, "of": 9, "used": False, "known_by": "content"}, ""),
}  # fmt: skip


def put_seen(file: Path, out: Path, *seen: object) -> Path:
    """A result that recorded this."""
    fields = json.loads(file.read_text())
    fields["seen"] = list(seen)
    if "digest" in fields:
        del fields["digest"]
        fields["digest"] = digest(fields)
    out.write_text(json.dumps(fields))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", RESULTS)
def test_the_section_of_every_result_says_it(tmp_path: Path, name: str) -> None:
    for folder in ("a.concepts", "adapted.concepts", "a.codes"):
        shutil.copytree(GOLDEN / folder, tmp_path / folder)
    files = [put_seen(GOLDEN / f"{name}.json", tmp_path / f"{case}.json", seen) for case, (seen, _) in SEEN.items()]
    page = write_report(tmp_path / "a.concepts", tmp_path / "r.html", results=files).read_text()
    sections = re.split("<h2[^>]*>", page)[-1 - len(files) : -1]  # the gallery comes last
    notes = '<p class="soft">([^<]* learned from [^<]*|Images were compared by name[^<]*)</p>'
    said = [[unescape(text) for text in re.findall(notes, section)] for section in sections]
    assert said == [[text] if text else [] for _, text in SEEN.values()]


def test_several_choices_are_all_said(tmp_path: Path) -> None:
    file = put_seen(GOLDEN / "intervene.json", tmp_path / "x.json", SEEN["left out"][0], SEEN["used"][0])
    page = unescape(write_report(GOLDEN / "a.concepts", tmp_path / "r.html", results=[file]).read_text())
    assert SEEN["left out"][1] in page
    assert SEEN["used"][1] in page


def test_the_page_of_a_comparison_alone_says_it_too(tmp_path: Path) -> None:
    file = put_seen(GOLDEN / "compare.json", tmp_path / "x.json", SEEN["left out"][0])
    result = read_result(file, Comparison)
    assert isinstance(result, Comparison)
    page = write_adaptation_page(result, GOLDEN / "a.concepts", GOLDEN / "adapted.concepts", tmp_path / "c.html")
    assert SEEN["left out"][1] in unescape(page.read_text())
