"""analyze(): the table knows its parents, keeps the pictures it shows, and refuses parents that do not match."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from actcache import ParentMismatchError, SettingsError, verify
from analysis import AnalyzeConfig, ConceptTable, analyze, query_class, query_image, query_latent
from analysis.concepts.files import choose_gallery
from analysis.heat_maps import heat_maps
from saetrain import CodeStore


@pytest.fixture(scope="module")
def concepts(tmp_path_factory: pytest.TempPathFactory, tiny_codes: Path) -> ConceptTable:
    return analyze(tiny_codes, tmp_path_factory.mktemp("concepts") / "x.concepts", config=AnalyzeConfig(n_gallery=12))


def test_it_is_sealed_and_whole(concepts: ConceptTable) -> None:
    assert verify(concepts.path).ok


def test_it_works_after_images_and_codes_are_gone(tmp_path: Path, concepts: ConceptTable) -> None:
    copy = ConceptTable.open(shutil.copytree(concepts.path, tmp_path / "elsewhere.concepts"))
    first = copy.gallery.to_pylist()[0]
    thumbnail = copy.thumbnail(first["image"])
    assert thumbnail is not None
    assert len(first["heat"]) == 9
    assert copy.table.num_rows == 64


def test_thumbnails_show_what_the_model_saw(concepts: ConceptTable, tiny_images: Path) -> None:
    import io

    image = concepts.gallery.to_pylist()[0]["image"]
    shown = np.asarray(Image.open(io.BytesIO(concepts.thumbnail(image) or b"")), dtype=float)
    original = np.asarray(Image.open(tiny_images / concepts.images["uri"][image].as_py()), dtype=float)
    assert shown.shape == original.shape  # 24 pixels: no crop, no resize
    assert abs(shown.mean((0, 1)) - original.mean((0, 1))).max() < 6  # JPEG


def test_heat_maps_hold_the_values_of_the_latent(tiny_codes: Path, concepts: ConceptTable) -> None:
    codes = CodeStore.open(tiny_codes)
    line = concepts.gallery.to_pylist()[0]
    heat = heat_maps(codes, line["latent"], np.array([line["image"]]))[0]
    np.testing.assert_array_equal(np.array(line["heat"]).reshape(3, 3), heat)
    top = query_latent(codes, line["latent"], n_top=1).to_pylist()[0]
    assert top["image"] == line["image"]
    assert heat[top["row"], top["column"]] == heat.max() > 0


def test_the_same_call_returns_the_table_and_others_are_refused(concepts: ConceptTable, tiny_codes: Path) -> None:
    before = (concepts.path / "concepts.parquet").stat().st_mtime_ns
    assert analyze(tiny_codes, concepts.path, config=AnalyzeConfig(n_gallery=12)).artifact.id == concepts.artifact.id
    assert (concepts.path / "concepts.parquet").stat().st_mtime_ns == before
    with pytest.raises(SettingsError, match=r"tau: 0\.2 there, 0\.5 asked for"):
        analyze(tiny_codes, concepts.path, config=AnalyzeConfig(n_gallery=12, tau=0.5))


def test_without_images_the_pictures_are_left_out(tmp_path: Path, tiny_codes: Path) -> None:
    moved = shutil.copytree(tiny_codes, tmp_path / "far" / "away" / "x.codes")
    (moved / "places.json").unlink()  # as on another machine
    table = analyze(moved, tmp_path / "x.concepts", config=AnalyzeConfig(n_gallery=4))
    assert table.artifact.settings["pictures"] is False
    assert table.thumbnail(table.gallery.to_pylist()[0]["image"]) is None


def test_other_images_are_refused(tmp_path: Path, tiny_codes: Path, tiny_images: Path) -> None:
    folder = shutil.copytree(tiny_images, tmp_path / "images")
    for file in folder.rglob("*.png"):
        Image.new("RGB", (24, 24)).save(file)
    with pytest.raises(ParentMismatchError, match=r"were made from a file of .* --images"):
        analyze(tiny_codes, tmp_path / "x.concepts", images=folder)


def test_settings_out_of_range_are_refused(tmp_path: Path, tiny_codes: Path) -> None:
    with pytest.raises(SettingsError, match="--n-top"):
        analyze(tiny_codes, tmp_path / "x", config=AnalyzeConfig(n_top=0))
    with pytest.raises(SettingsError, match="--score"):
        analyze(tiny_codes, tmp_path / "x", config=AnalyzeConfig(score="median"))
    assert not (tmp_path / "x").exists()


def test_the_gallery_prefers_specific_latents_that_fire_often_enough(concepts: ConceptTable) -> None:
    table = concepts.table
    shown = choose_gallery(table, 10, min_images=8)
    entropy = np.asarray(table["label_entropy"])[shown]
    assert (np.asarray(table["n_images"])[shown] >= 8).all()
    assert (np.asarray(table["image_frequency"])[shown] < 0.5).all()
    assert (np.diff(np.round(entropy, 2)) >= 0).all()


def test_queries_equal_a_dense_computation(tiny_codes: Path) -> None:
    codes = CodeStore.open(tiny_codes)
    rows = np.zeros((codes.n_images, codes.n_tokens, codes.n_latents))
    for latent in range(codes.n_latents):
        row, value = codes.read_latent(latent)
        rows.reshape(-1, codes.n_latents)[row, latent] = value
    image = 37
    answer = query_image(codes, image, n_top=5).to_pylist()
    mean = rows[image].mean(0)
    np.testing.assert_allclose([row["score"] for row in answer], np.sort(mean)[::-1][:5], rtol=1e-12)
    assert answer[0]["n_tokens"] == (rows[image, :, answer[0]["latent"]] > 0).sum()
    assert query_image(codes, codes.images["uri"][image].as_py(), n_top=5).to_pylist() == answer
    mine = np.asarray(codes.images["label"]) == 1
    counts = (rows[mine] > 0.2).sum((0, 1))
    best = query_class(codes, "class1", rank="frequent", n_top=4).to_pylist()
    assert [row["n_tokens"] for row in best] == np.sort(counts)[::-1][:4].tolist()
    assert best[0]["image_share"] == (rows[mine, :, best[0]["latent"]] > 0.2).any(1).mean()
