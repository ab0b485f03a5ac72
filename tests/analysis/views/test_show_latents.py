"""show_latents: the images on which a latent fires most, dark where it does not, in HTML without styles."""

import base64
import html
import io
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from actcache import SettingsError
from analysis import ConceptTable, ShownLatent, heat_maps, query_latent, set_name, show_latents
from analysis.pictures import draw_heat_map, encode_jpeg
from analysis.report import Shot
from saetrain import CodeStore

GOLDEN = Path(__file__).parents[2] / "golden" / "pipeline"
LATENT = 31


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "pipeline"))


def read_pictures(drawn: str) -> list[NDArray[Any]]:
    """[height, width] brightness of each picture."""
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', drawn)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"), dtype=float) for data in found]


def test_the_images_are_those_of_the_codes_and_dark_where_the_latent_is_silent(golden: Path) -> None:
    codes, (shown,) = CodeStore.open(golden / "a.codes"), show_latents(golden / "a.concepts", LATENT, n_images=4)
    top = query_latent(codes, LATENT, n_top=4)
    assert [shot.uri for shot in shown.shots] == top["uri"].to_pylist()
    rows, values = codes.read_latent(LATENT)
    assert shown.density == pytest.approx(len(rows) / (codes.n_images * codes.n_tokens))
    assert shown.max_activation == pytest.approx(float(values.max()))
    drawn = shown._repr_html_()
    pictures = read_pictures(drawn)
    assert len(pictures) == 4
    maps = heat_maps(codes, LATENT, top["image"].to_numpy())
    for picture, shot, heat in zip(pictures, shown.shots, maps, strict=True):
        seen = Image.open(io.BytesIO(shot.picture)).convert("L").resize((3, 3), Image.Resampling.BOX)
        patches = Image.fromarray(picture.astype(np.uint8)).resize((3, 3), Image.Resampling.BOX)
        share = np.asarray(patches, dtype=float) / np.asarray(seen, dtype=float)
        expected = 1 - 0.8 * 215 / 255 * (1 - np.sqrt(heat / shown.max_activation))
        np.testing.assert_allclose(share, expected, atol=0.08)
    for line in top.to_pylist():
        assert f"{line['label_name']} · {line['score']:.3g}" in drawn


def test_what_latents_may_be(golden: Path) -> None:
    concepts = ConceptTable.open(golden / "a.concepts")
    answer = query_latent(CodeStore.open(golden / "a.codes"), LATENT, n_top=2)
    assert [each.latent for each in show_latents(concepts)] == list(
        dict.fromkeys(concepts.gallery["latent"].to_pylist())
    )[:4]
    for given in ([31, 3], (31, 3), np.array([31, 3]), concepts.table["latent"].take([31, 3])):
        assert [each.latent for each in show_latents(concepts, given)] == [31, 3]
    assert len(show_latents(concepts, np.int64(3))) == 1
    assert len(show_latents(concepts, [])) == 0
    for wrong in (64, -1, 1.5, "31", [3, None]):
        with pytest.raises(SettingsError):
            show_latents(concepts, wrong)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="at most 24"):
        show_latents(concepts, 3, n_images=25)
    assert answer.num_rows == 2


def test_names_of_strangers_are_text(golden: Path) -> None:
    concepts = ConceptTable.open(golden / "a.concepts")
    set_name(concepts, LATENT, name="<script>alert(1)</script>", note="a\u202eb <b>")
    drawn = show_latents(concepts, LATENT)._repr_html_()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in drawn
    assert r"a\u202eb &lt;b&gt;" in html.unescape(drawn).replace("<b>", "&lt;b&gt;") or r"a\u202eb" in drawn
    assert "\u202e" not in drawn
    assert set(re.findall(r"<(\w+)", drawn)) == {"p", "b", "br", "table", "tr", "td", "img"}


def test_a_table_alone_shows_what_it_holds(golden: Path, tmp_path: Path) -> None:
    """Without codes, the heat maps of the gallery; without pictures too, heat maps on gray; else words."""
    alone = Path(shutil.move(golden / "a.concepts", tmp_path / "alone.concepts"))
    shutil.rmtree(golden)
    concepts = ConceptTable.open(alone)
    kept = set(concepts.gallery["latent"].to_pylist())
    other = next(
        latent for latent in range(64) if latent not in kept and concepts.rows_of("top_images", latent).num_rows
    )
    first, second = show_latents(concepts, [LATENT, other])
    assert len(read_pictures(first._repr_html_())) == len(first.shots) > 0
    assert all(not shot.heat for shot in second.shots)
    assert f"Latent {other}" in second._repr_html_()
    shutil.rmtree(alone / "gallery")
    gray = read_pictures(show_latents(ConceptTable.open(alone), LATENT)[0]._repr_html_())
    assert len(gray) > 0
    assert 170 < max(picture.max() for picture in gray) < 186  # #b0b0b0 is 176


def test_the_most_that_is_shown_is_small() -> None:
    noise = np.random.default_rng(0)
    heat = draw_heat_map(noise.random((14, 14)), 1.0)
    shots = tuple(
        Shot(
            "x.png", "x", 1.0, 1.0, encode_jpeg(Image.fromarray(noise.integers(0, 255, (160, 160, 3), np.uint8))), heat
        )
        for _ in range(24)
    )
    assert len(ShownLatent(0, "", "", 1.0, 1.0, 1.0, 1.0, (), shots)._repr_html_()) < 300_000
