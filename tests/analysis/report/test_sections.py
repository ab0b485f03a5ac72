"""The report shows results as they are, and names a person's first."""

import re
from pathlib import Path

import pytest
from markupsafe import escape

from actcache import ParentMismatchError, SchemaError, SettingsError
from analysis import (
    AnalyzeConfig,
    ConceptTable,
    DeletionConfig,
    MaskingConfig,
    ModelOptions,
    RulesConfig,
    SteerabilityConfig,
    add_names,
    analyze,
    delete_latents,
    evaluate_fidelity,
    inspect_dictionaries,
    learn_rules,
    localize,
    mask_latents,
    measure_steerability,
    query_image,
    query_latent,
    set_latents,
    set_name,
    write_report,
)
from saetrain import CodeStore, encode


@pytest.fixture(scope="module")
def concepts(tmp_path_factory: pytest.TempPathFactory, tiny_codes: Path) -> ConceptTable:
    return analyze(tiny_codes, tmp_path_factory.mktemp("curves") / "x.concepts", config=AnalyzeConfig(n_gallery=6))


def test_every_result_has_a_section(
    tmp_path: Path, concepts: ConceptTable, middle_run: Path, middle_store: Path
) -> None:
    (tmp_path / "words.txt").write_text("red\nblue\n")
    cpu = ModelOptions(device="cpu")
    masks = mask_latents(middle_run, middle_store, tmp_path / "m.json", MaskingConfig(k=(1, 5)), model=cpu)
    deletion = delete_latents(middle_run, middle_store, tmp_path / "d.json", DeletionConfig(n=(1, 5)), model=cpu)
    fidelity = evaluate_fidelity(middle_run, middle_store, tmp_path / "f.json", model=cpu)
    measure_steerability(
        middle_run,
        middle_store,
        tmp_path / "s.json",
        SteerabilityConfig(n_latents=2),
        vocabulary=tmp_path / "words.txt",
        model=cpu,
    )
    files = [tmp_path / f"{name}.json" for name in "mdfs"]
    page = write_report(concepts, tmp_path / "r.html", results=files).read_text()
    titles = re.findall("<h2.*?>(.*?)</h2>", page)
    assert titles[-5:-1] == ["Masking latents", "Which latents decide", "Fidelity", "Steering"]
    margin = next(m for m in masks.margins if m.selection == "class")
    assert f"<td>{margin.margin:+.3f}</td>" in page
    assert f"<td>{deletion.areas['lens']:.4f}</td>" in page
    assert f"<td>{fidelity.runs[0].variants['zero'].loss:.3f}</td>" in page
    body = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert "http" not in body
    steering = set_latents(middle_run, middle_store, tmp_path / "set.json", set={1: 2.0}, model=cpu)
    page = write_report(concepts, tmp_path / "r2.html", results=[tmp_path / "set.json"]).read_text()
    section = page.split(">Setting latents</h2>")[1].split("<h2")[0]
    assert "latent 1 set to 2" in section
    for name, shift in steering.shift.items():
        assert f"<td>{shift:+.4f}</td><td>{steering.predicted[name][0]}</td>" in section.split(name)[1]
    (tmp_path / "other.json").write_text('{"kind": "weather", "schema": 1}')
    with pytest.raises(SchemaError, match="holds weather, expected fidelity or masks"):
        write_report(concepts, tmp_path / "r2.html", results=[tmp_path / "other.json"])
    with pytest.raises(SettingsError, match="does not exist"):
        write_report(concepts, tmp_path / "r2.html", results=[tmp_path / "none.json"])
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(SchemaError, match="not a result file"):
        write_report(concepts, tmp_path / "r2.html", results=[tmp_path / "other.json"])


def test_rules_are_shown(tmp_path: Path, concepts: ConceptTable, tiny_codes: Path) -> None:
    found = learn_rules(tiny_codes, tmp_path / "rules.json", RulesConfig(n_patches=1, n_rules=2))
    page = write_report(concepts, tmp_path / "r.html", results=[tmp_path / "rules.json"]).read_text()
    section = page.split(">Rules</h2>")[1].split("<h2")[0]
    assert f"fidelity {found.fidelity:.1%}, accuracy {found.accuracy:.1%}" in section
    rules = [rule for learned in found.classes.values() for rule in learned.rules]
    assert rules
    assert section.count("<tr>") == 1 + len(rules)
    for rule in rules:
        right = "" if rule.precision is None else f"{rule.precision:.0%}"
        said = escape(rule.text)
        assert f'<td class="text">{said}</td><td>{right}</td><td>{rule.n_fires:,}</td>' in section


def test_names_are_shown(tmp_path: Path, concepts: ConceptTable) -> None:
    first = concepts.gallery["latent"][0].as_py()
    assert f">Latent {first}</a>" in write_report(concepts, tmp_path / "r.html").read_text()
    set_name(concepts, first, name="red & round")
    assert f">Latent {first}: red &amp; round</a>" in write_report(concepts, tmp_path / "r.html").read_text()


def test_queries_show_names(
    concepts: ConceptTable, tiny_codes: Path, middle_run: Path, middle_store: Path, tmp_path: Path
) -> None:
    codes = CodeStore.open(tiny_codes)
    answer = query_image(codes, 3, n_top=5)
    latent = answer["latent"][1].as_py()
    set_name(concepts, latent, name="my own")
    named = add_names(answer, codes, concepts)
    assert named.column_names[:2] == ["latent", "name"]
    assert named["name"].to_pylist()[1] == "my own"
    assert named.drop_columns("name").equals(answer)
    images = query_latent(codes, latent)
    assert add_names(images, codes, concepts).equals(images)
    other = encode(middle_run, middle_store, tmp_path / "other.codes")
    with pytest.raises(ParentMismatchError, match="made from codes"):
        add_names(answer, other, concepts)


def test_dictionaries_places_and_prompts_are_shown(tmp_path: Path) -> None:
    golden = Path(__file__).parents[2] / "golden" / "pipeline"
    inspected = inspect_dictionaries(golden / "runs", golden / "a.acts", tmp_path / "i.json", n_tokens=20)
    localized = localize(CodeStore.open(golden / "a.codes"), tmp_path / "l.json")
    results = [tmp_path / "i.json", tmp_path / "l.json", golden / "a.prompts"]
    page = write_report(golden / "a.concepts", tmp_path / "r.html", results=results).read_text()
    titles = re.findall("<h2.*?>(.*?)</h2>", page)
    assert titles[-4:-1] == ["Dictionaries", "Localization", "Adaptation by maple"]
    dictionaries, places = (page.split(f">{title}</h2>")[1].split("<h2")[0] for title in titles[-4:-2])
    for run in inspected.runs:
        assert f"<td>{run.gap.gap:.4f}</td>" in dictionaries
    assert f"mean cosine {inspected.matchings[0].mean_cosine:.3f}" in dictionaries
    for concept in localized.concepts:
        assert f"<td>{concept.latent}</td><td>{concept.ap:.3f}</td>" in places
    adaptation = page.split(">Adaptation by maple</h2>")[1].split("<h2")[0]
    assert "zero-shot accuracy" in adaptation
    assert adaptation.count("<tr>") > 1
