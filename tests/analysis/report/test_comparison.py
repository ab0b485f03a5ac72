"""The section of a comparison shows the numbers of its file and the pictures of its tables, on two pages alike."""

import base64
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from markupsafe import escape
from PIL import Image
from plain_clip import checkpoint_tensors

from actcache import extract
from analysis import (
    AnalyzeConfig,
    Comparison,
    ComparisonConfig,
    ConceptTable,
    analyze,
    compare,
    heat_maps,
    read_result,
    write_adaptation_page,
    write_report,
)
from saetrain import CodeStore, SAEConfig, TrainConfig, encode, train

N_TOP = 5


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_images: Path, tiny_model: dict[str, str], middle_run: Path
) -> Path:
    """base.concepts, maple.concepts, comparison.json with a second dictionary."""
    folder = tmp_path_factory.mktemp("adaptation")
    state = checkpoint_tensors("maple", width=32, text=16, embed=16, n=4, depth=2)
    torch.save({"state_dict": {name: 5 * value for name, value in state.items()}}, folder / "maple.tar")
    for name, prompts in (("base", None), ("maple", folder / "maple.tar")):
        options: dict[str, Any] = {"layers": [1], "precision": "float32", "dtype": "float32", "prompts": prompts}
        extract(tiny_images, folder / f"{name}.acts", **tiny_model, **options)
        encode(middle_run, folder / f"{name}.acts", folder / f"{name}.codes")
        analyze(folder / f"{name}.codes", folder / f"{name}.concepts", config=AnalyzeConfig(n_gallery=4))
    config = TrainConfig(n_steps=20, batch_size=128, lr=3e-3)
    second = train(folder / "maple.acts", folder / "second", layer=1, sae=SAEConfig(n_latents=64, k=4), config=config)
    compare(
        folder / "base.concepts", folder / "maple.concepts", folder / "comparison.json",
        ComparisonConfig(k=(1, 3), n_top=N_TOP, n_seeds=2, on_seen="use"), second_run=second, device="cpu",
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> Comparison:
    return read_result(folder / "comparison.json", Comparison)


@pytest.fixture(scope="module")
def page(folder: Path, found: Comparison) -> str:
    out = write_adaptation_page(found, folder / "base.concepts", folder / "maple.concepts", folder / "comparison.html")
    return out.read_text()


def body(page: str) -> str:
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def strips(page: str) -> list[tuple[int, str]]:
    return [
        (int(latent), text)
        for text in re.split(r'<div class="latent pair(?: both)?">', page)[1:]
        for latent in re.findall(r"^<b>(?:<a.*?>)?latent (\d+)", text)
    ]


def decode(data: str) -> np.ndarray:  # type: ignore[type-arg]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_the_page_stands_alone(page: str) -> None:
    assert "http" not in body(page)
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", body(page))


def test_conclusion_and_accuracies_are_the_files(page: str, found: Comparison) -> None:
    assert f'<p class="conclusion">{escape(found.conclusion.sentence)}</p>' in page
    for name, numbers in found.accuracy.items():
        assert f"<tr><td>{name}</td><td>{100 * numbers.accuracy:.1f} %</td>" in page


def test_every_setting_has_its_curves(page: str, found: Comparison) -> None:
    for error in ("error term kept", "error term left out"):
        for model in ("base", "adapted"):
            assert f'"text":"judged with the {model} model, {error}"' in page
    assert page.count('<div class="plot half">') == 5
    compact = re.sub(r"\s", "", page)
    for row in found.masks:
        if row.selection == "all" or row.k != 1:
            continue
        line = [r for r in found.masks if all(getattr(r, name) == getattr(row, name) for name in (
            "classified_by", "chosen_by", "selection", "keep_error"))]  # fmt: skip
        line.sort(key=lambda r: int(r.k))
        assert json.dumps([r.accuracy for r in line], separators=(",", ":")) in compact
        assert json.dumps([r.accuracy_low for r in line], separators=(",", ":")) in compact


def test_predictions_under_masks_are_drawn(page: str, found: Comparison) -> None:
    drawn = re.findall(r'class="cells" alt="(\w+) latents, (\w+) model, k = (\d+)" src=.*?base64,(.*?)"', page)
    assert len(drawn) == 2 * 4
    for chosen_by, model, k, data in drawn:
        counts = next(
            np.array(row.counts)
            for row in found.prediction
            if (row.chosen_by, row.classified_by, row.k) == (chosen_by, model, int(k))
            and row.keep_error
            and row.selection == "class"
        )
        share = counts / counts.sum(axis=1, keepdims=True)
        assert np.allclose(255 - decode(data)[..., 0], 244 * share, atol=0.51)


def test_the_second_dictionary_has_its_four_cells(page: str, found: Comparison) -> None:
    cells = found.dictionaries.cells
    assert len(cells) == 4
    for cell in cells:
        assert (
            f"<tr><td>{cell.sae}</td><td>{cell.run}</td><td>{cell.model}</td><td>{cell.fvu:.4f}</td>"
            f"<td>{cell.l0:.1f}</td><td>{100 * cell.accuracy:.1f} %</td>"
        ) in page
    assert str(escape(found.dictionaries.sentence)) in page
    assert "mean of 2 seeds" in page


def test_confusion_and_its_change_add_up(page: str, found: Comparison) -> None:
    tables = re.findall(r'<h4>([^<]*)</h4><table class="cells">(.*?)</table>', page, flags=re.DOTALL)
    assert [title for title, _ in tables] == ["base model", "adapted model", "adapted less base"]
    numbers = [
        np.array([[int(cell or 0) for cell in re.findall(r"<td[^>]*>([-+\d]*)</td>", row)] for row in
                  re.findall(r'<tr><th scope="row">(.*?)</tr>', table)])
        for _, table in tables
    ]  # fmt: skip
    base, adapted = (np.array(found.confusion[name]) for name in ("base", "adapted"))
    for drawn, wanted in zip(numbers, (base, adapted, adapted - base), strict=True):
        assert drawn.tolist() == wanted.tolist()


def test_shared_and_exclusive_concepts_have_the_codes_heat_maps(page: str, found: Comparison, folder: Path) -> None:
    whole = found.overlap.dataset
    assert [latent for latent, _ in strips(page)] == [*whole.shared, *whole.base_only, *whole.adapted_only]
    seen = 0
    for latent, text in strips(page):
        for model, part in re.findall(
            r'<span class="soft">(\w+) model</span><div class="strip">(.*?)</div>\s*</div>\s*(?=<div>|</div>)',
            text,
            re.DOTALL,
        ):
            name = "base" if model == "base" else "maple"
            concepts = ConceptTable.open(folder / f"{name}.concepts")
            top = concepts.top_images.filter(pc.equal(concepts.top_images["latent"], latent)).sort_by("rank")
            images = np.asarray(top["image"], dtype=np.int64)[:5]
            maps = heat_maps(CodeStore.open(folder / f"{name}.codes"), latent, images)
            maximum = concepts.table["max_activation"][latent].as_py()
            heats = re.findall(r'<img class="heat".*?base64,(.*?)"', part)
            assert len(heats) == len(images)
            for data, heat in zip(heats, maps, strict=True):
                darkness = 215 * (1 - np.sqrt(np.clip(heat / maximum, 0, 1)))
                assert np.allclose(decode(data)[..., 3], darkness, atol=0.51)
                seen += 1
            assert part.count("data-picture=") == len(images)
    assert seen >= 2 * N_TOP


def test_a_report_shows_the_same_section(page: str, found: Comparison, folder: Path, tmp_path: Path) -> None:
    base = ConceptTable.open(folder / "base.concepts")
    report = write_report(base, tmp_path / "r.html", results=[folder / "comparison.json"]).read_text()
    assert ">What maple changed</h2>" in report
    assert str(escape(found.conclusion.sentence)) in report
    tables = [
        re.findall(r"<table.*?</table>", body(text).split("What maple changed")[-1], re.DOTALL)
        for text in (page, report)
    ]
    assert [text for text in tables[0] if text in tables[1]] == tables[0]
    shown = set(base.gallery["latent"].to_pylist())
    both = {latent for latent, _ in strips(report)} & shown
    for latent in both:
        assert f'<b><a href="#latent-{latent}" target="_top">latent {latent}</a><span' in report
        assert f'id="latent-{latent}"' in report
    ids = set(re.findall(r'id="(.*?)"', body(report)))
    assert set(re.findall(r'href="#(.*?)"', body(report))) <= ids


def test_without_the_other_table_its_pictures_are_left_out(found: Comparison, folder: Path, tmp_path: Path) -> None:
    for name in ("base.concepts", "base.codes"):
        shutil.copytree(folder / name, tmp_path / name)
    shutil.copy(folder / "comparison.json", tmp_path / "c.json")
    report = write_report(tmp_path / "base.concepts", tmp_path / "r.html", results=[tmp_path / "c.json"])
    text = report.read_text()
    whole = found.overlap.dataset
    assert text.count("its concept table was not found") == len(whole.shared) + len(whole.adapted_only)
    other = shutil.copytree(folder / "base.concepts", tmp_path / "maple.concepts")  # another table by that name
    assert Path(other).exists()
    report = write_report(tmp_path / "base.concepts", tmp_path / "r.html", results=[tmp_path / "c.json"])
    assert report.read_text().count("its concept table was not found") == len(whole.shared) + len(whole.adapted_only)
