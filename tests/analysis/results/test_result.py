"""Results are read as they were written, and a file that is malformed is named with its field."""

import json
from pathlib import Path
from typing import Any

import pytest

from actcache import CorruptError, SchemaError, SettingsError
from analysis import AnalyzeConfig, ComparisonConfig, MaskingConfig, RulesConfig
from analysis.config import TAU
from analysis.report.sections import SECTIONS
from analysis.results import Deletion, Inspection, LocalizedConcepts, MaskingCurve, Result, read_result

GOLDEN = Path(__file__).parents[2] / "golden" / "pipeline"
FILES = [
    "evaluate", "evaluate-runs", "intervene", "intervene-set", "attribute", "steer", "rules", "compare",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_record_writes_the_json_it_was_read_from(name: str) -> None:
    path = GOLDEN / f"{name}.json"
    result = read_result(path, *SECTIONS)
    assert json.dumps(result.to_json(), indent=1) + "\n" == path.read_text()
    assert all(row for table in result.tables() for row in table)
    assert result.tables() or result.lines()


def test_every_kind_has_its_own_name() -> None:
    kinds = [record.KIND for record in SECTIONS]
    assert len(set(kinds)) == len(kinds) == len(Result.__subclasses__())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"n_judged": "many"}, "n_judged should be int, got 'many'"),
        ({"n_judged": None}, "n_judged should be int, got 'None'"),
        ({"n_judged": True}, "n_judged should be int, got 'True'"),
        ({"areas": {"lens": []}}, r"areas\.lens should be float"),
        ({"areas": [1]}, "areas should be"),
        ({"curve": [{"method": "lens", "n": 1}]}, r"curve\[0\]\.y is missing"),
        ({"curve": {}}, "curve should be"),
        ({"parents": {"run": {"id": 3, "path": "x"}}}, r"parents\.run\.id should be str"),
        ({"margins": ...}, "margins is missing"),
    ],
)
def test_a_malformed_field_is_named(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    content = json.loads((GOLDEN / "attribute.json").read_text()) | change
    content = {name: value for name, value in content.items() if value is not ...}
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(CorruptError, match=rf"bad\.json has a missing or malformed field: {field}"):
        read_result(tmp_path / "bad.json", Deletion)


def test_another_kind_and_a_newer_schema_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="holds deletion, expected masks"):
        read_result(GOLDEN / "attribute.json", MaskingCurve)
    content = json.loads((GOLDEN / "attribute.json").read_text()) | {"schema": 2}
    (tmp_path / "new.json").write_text(json.dumps(content))
    with pytest.raises(SchemaError, match="schema 2; this program reads schemas up to 1"):
        read_result(tmp_path / "new.json", Deletion)


def test_the_default_thresholds_are_one() -> None:
    configs = (AnalyzeConfig(), ComparisonConfig(), MaskingConfig(), RulesConfig())
    assert {config.tau for config in configs} == {TAU}


def test_inspect_and_localize_write_results(tmp_path: Path) -> None:
    from analysis import inspect_dictionaries, localize
    from saetrain import CodeStore

    out = tmp_path / "inspection.json"
    inspected = inspect_dictionaries(GOLDEN / "runs", GOLDEN / "a.acts", out, n_tokens=20)
    assert read_result(out, Inspection) == inspected
    assert inspect_dictionaries(GOLDEN / "runs", GOLDEN / "a.acts", out, n_tokens=20) == inspected
    with pytest.raises(SettingsError, match="n_tokens: 20 there, 30 asked for"):
        inspect_dictionaries(GOLDEN / "runs", GOLDEN / "a.acts", out, n_tokens=30)
    out, codes = tmp_path / "localization.json", CodeStore.open(GOLDEN / "a.codes")
    localized = localize(codes, out)
    assert read_result(out, LocalizedConcepts) == localized == localize(codes, out)
    with pytest.raises(SettingsError, match="n_top: 1 there, 2 asked for"):
        localize(codes, out, n_top=2)
    assert localize(codes, out, n_top=2, overwrite=True).id != localized.id
