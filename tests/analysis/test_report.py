"""The page stands alone, escapes what it shows, and holds what the table holds."""

import base64
import json
import re
import shutil
from pathlib import Path

import pytest

from analysis import ConceptTable, analyze, write_report


@pytest.fixture(scope="module")
def concepts(tmp_path_factory: pytest.TempPathFactory, tiny_codes: Path) -> ConceptTable:
    return analyze(tiny_codes, tmp_path_factory.mktemp("report") / "x.concepts", n_gallery=6)


def test_the_page_needs_nothing_else(tmp_path: Path, concepts: ConceptTable) -> None:
    page = write_report(concepts, tmp_path / "new" / "report.html").read_text()
    body = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)  # bokeh's own script names its home page
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", body)
    assert "http" not in body


def test_every_gallery_latent_is_there_with_its_pictures(tmp_path: Path, concepts: ConceptTable) -> None:
    page = write_report(concepts, tmp_path / "report.html").read_text()
    shown = dict.fromkeys(concepts.gallery["latent"].to_pylist())
    assert re.findall(r'<section class="latent" id="latent-(\d+)"', page) == [str(latent) for latent in shown]
    assert page.count('<img class="heat"') == concepts.gallery.num_rows
    first = concepts.gallery["image"][0].as_py()
    assert base64.b64encode(concepts.thumbnail(first) or b"").decode() in page
    assert f"{concepts.artifact.provenance['quality']['all']['fvu']:.4f}" in page


def test_the_curves_of_training_are_shown_where_there_are_any(tmp_path: Path, concepts: ConceptTable) -> None:
    curves = concepts.artifact.provenance["curves"]
    assert set(curves) == {"step", "loss", "fvu", "l0", "dead"}
    assert len(curves["step"]) == len(curves["loss"]) >= 1
    page = write_report(concepts, tmp_path / "report.html").read_text()
    assert "<h2>Training</h2>" in page
    assert f'"text":"{"FVU of the batch"}"' in page
    fields = json.loads((concepts.path / "artifact.json").read_bytes())
    del fields["provenance"]["curves"]  # as older ones are
    older = Path(shutil.copytree(concepts.path, tmp_path / "older.concepts"))
    (older / "artifact.json").write_text(json.dumps(fields))
    assert "<h2>Training</h2>" not in write_report(older, tmp_path / "older.html").read_text()


def test_names_from_outside_are_escaped(
    tmp_path: Path, tiny_store: Path, tiny_run: Path, tiny_images: Path, tiny_model: dict[str, str]
) -> None:
    from actcache import extract
    from saetrain import encode

    images = shutil.copytree(tiny_images, tmp_path / "images")
    (images / "class0").rename(images / "<b onload=x>")
    extract(images, tmp_path / "x.acts", **tiny_model, layers=[2], precision="float32")
    encode(tiny_run, tmp_path / "x.acts", tmp_path / "x.codes")
    table = analyze(tmp_path / "x.codes", tmp_path / "x.concepts")
    page = write_report(table, tmp_path / "report.html").read_text()
    assert "<b onload" not in page
    assert "&lt;b onload" in page
