"""A result says which judge it is about, in its file, in the terminal and in the report; older files mean zero-shot."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from actcache import CorruptError
from actcache.artifacts import digest
from analysis import ConceptTable, ModelOptions, StudyConfig, analyze, delete_latents, evaluate_fidelity, read_result
from analysis.report.sections import draw_sections
from analysis.results import Deletion, Fidelity
from saetrain import encode

CPU = ModelOptions(device="cpu")


@pytest.fixture(scope="module")
def concepts(tmp_path_factory: pytest.TempPathFactory, middle_run: Path, middle_store: Path) -> ConceptTable:
    folder = tmp_path_factory.mktemp("judges")
    return analyze(encode(middle_run, middle_store, folder / "x.codes"), folder / "x.concepts")


@pytest.mark.parametrize("measure", [evaluate_fidelity, delete_latents])
def test_the_judge_is_in_the_file_and_on_the_page(
    tmp_path: Path, middle_run: Path, middle_store: Path, concepts: ConceptTable, measure: Callable[..., Fidelity]
) -> None:
    out = tmp_path / "x.json"
    result = measure(middle_run, middle_store, out, study=StudyConfig(judge="probe"), model=CPU)
    content = json.loads(out.read_text())
    assert content["judge"]["kind"] == "probe"
    assert set(content["judge"]["probe"]) == {
        "features", "normalization", "c", "seed", "n_images", "n_validation", "accuracy", "images"
    }  # fmt: skip
    assert read_result(out, Fidelity, Deletion) == result
    (section,) = draw_sections([out], concepts)
    shown = [line for line in (section.text, *section.notes) if "linear probe on cls and patch" in line]
    assert len(shown) == 1
    shown = [line for line in (section.text, *section.notes) if "linear probe on cls and patch" in line]
    assert len(shown) == 1
    assert "ero-shot" not in section.text
    assert any("linear probe" in line for line in result.notes())


def test_a_file_without_a_judge_is_about_zero_shot(
    tmp_path: Path, middle_run: Path, middle_store: Path, concepts: ConceptTable
) -> None:
    out = tmp_path / "f.json"
    found = evaluate_fidelity(middle_run, middle_store, out, model=CPU)
    content = json.loads(out.read_text())
    del content["judge"], content["digest"]
    out.write_text(json.dumps({**content, "digest": digest(content)}))
    old = read_result(out, Fidelity)
    assert old.judge is None
    assert old.judged_by == found.judge
    assert old.notes() == found.notes()
    assert evaluate_fidelity(middle_run, middle_store, out, model=CPU) == old  # the same id
    (section,) = draw_sections([out], concepts)
    assert section.text.startswith("Zero-shot accuracy")
    content["judge"] = {"kind": "oracle", "loss": "softmax"}
    out.write_text(json.dumps({**content, "digest": digest(content)}))
    with pytest.raises(CorruptError, match=r"judge\.kind"):
        read_result(out, Fidelity)
