"""Pixels that no patch covers: pictures of 23 pixels in patches of 6, of which 3 x 3 cover 18.

A fifth of the picture lies beyond the patches, so a heat map that is stretched over all of it is four pixels off at the
last patch.
"""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from place_run import write_place_run
from timm_folders import model_of, write_tower

from actcache import extract
from analysis import analyze, draw_sheet, heat_maps, query_latent, threshold_heat_maps, write_report
from analysis.heat_maps import upsample
from analysis.localization.pixel_masks import read_masks
from analysis.pictures import CELL, MARGIN
from saetrain import CodeStore, encode

SIDE, PATCH, SEEN = 23, 6, 18


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory, make_images: Callable[..., Path]) -> CodeStore:
    folder = tmp_path_factory.mktemp("uncovered")
    make_images(folder / "images", 40, size=SIDE)
    write_tower(folder / "model", "vit_small_patch16_224", {"img_size": SIDE, "patch_size": PATCH})
    extract(folder / "images", folder / "x.acts", model=model_of(folder), layers=[0], precision="float32")
    run = write_place_run(folder / "run", folder / "x.acts")
    return encode(run, folder / "x.acts", folder / "x.codes")


def test_codes_know_what_their_patches_cover(codes: CodeStore) -> None:
    assert codes.grid == (3, 3)
    assert codes.covered == (SEEN / SIDE, SEEN / SIDE)


def test_an_upsampled_corner_lies_on_its_pixels() -> None:
    corner = np.zeros((1, 3, 3), np.float32)
    corner[0, 2, 2] = 1
    share = SEEN / SIDE
    pixels = upsample(corner, SIDE, SIDE, covered=(share, share))[0]
    assert np.argwhere(pixels == pixels.max()).tolist() == [[y, x] for y in range(15, 18) for x in range(15, 18)]
    assert not pixels[SEEN:].any()
    assert not pixels[:, SEEN:].any()
    np.testing.assert_allclose(pixels[:SEEN, :SEEN], upsample(corner, SEEN, SEEN)[0], atol=1e-6)


def test_thresholded_maps_end_with_the_patches(codes: CodeStore) -> None:
    images = np.arange(5)
    fires = threshold_heat_maps(codes, 3, images, size=(SIDE, SIDE), threshold=0.0)
    assert fires[:, :SEEN, :SEEN].any()
    assert not fires[:, SEEN:].any()
    assert not fires[:, :, SEEN:].any()


def test_masks_are_cut_into_the_models_own_patches(codes: CodeStore, tmp_path: Path) -> None:
    """Only the last patch carries the concept, beside a rim that no patch sees."""
    numbers = np.zeros((SIDE, SIDE), np.uint8)
    numbers[12:SEEN, 12:SEEN], numbers[SEEN:], numbers[:, SEEN:] = 1, 2, 2
    for uri in codes.images["uri"].to_pylist():
        path = (tmp_path / uri).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbers).save(path)
    masks = read_masks(codes, masks=tmp_path)
    assert masks.names == ("1",)
    wanted = np.zeros((40, 9, 1), np.float32)
    wanted[:, 8] = 1
    np.testing.assert_array_equal(masks.coverage(codes.grid), wanted)
    np.testing.assert_array_equal(masks.centers(codes.grid), wanted > 0)


def test_a_contact_sheet_shades_each_pixel_by_its_own_patch(codes: CodeStore, tmp_path: Path) -> None:
    answer = query_latent(codes, 3, n_top=1)
    image = answer["image"].to_numpy()
    maps = heat_maps(codes, 3, image)[0]
    out = draw_sheet(codes, answer, tmp_path / "sheet.png", latents=[3])
    shown = np.asarray(Image.open(out), dtype=float)[MARGIN : MARGIN + CELL, MARGIN : MARGIN + CELL]
    picture = Image.open(codes.path.parent / "images" / answer["uri"][0].as_py()).convert("RGB")
    original = np.asarray(picture.resize((CELL, CELL), Image.Resampling.NEAREST), dtype=float)

    def ratio(rows: NDArray[np.int64], columns: NDArray[np.int64]) -> float:
        """Of the middle of some pixels of the model's picture, which are CELL / SIDE wide on the sheet."""
        y, x = ((np.asarray(each) + 0.5) * CELL / SIDE for each in (rows, columns))
        place = np.ix_(y.astype(int), x.astype(int))
        return float(shown[place].sum() / original[place].sum())

    inside = [np.arange(k * PATCH, (k + 1) * PATCH) for k in range(3)]
    for row in range(3):
        for column in range(3):
            shade = 215 / 255 * 0.8 * (1 - np.sqrt(maps[row, column] / maps.max()))
            assert ratio(inside[row], inside[column]) == pytest.approx(1 - shade, abs=0.02), (row, column)
    rim = np.arange(SEEN, SIDE)
    assert ratio(rim, np.arange(SIDE)) == pytest.approx(1, abs=1e-6)
    assert ratio(np.arange(SIDE), rim) == pytest.approx(1, abs=1e-6)


def test_a_report_lays_heat_maps_over_what_is_covered(codes: CodeStore, tmp_path: Path) -> None:
    concepts = analyze(codes, tmp_path / "x.concepts")
    assert concepts.covered == codes.covered
    page = write_report(concepts, tmp_path / "report.html").read_text()
    style = re.search(r"img\.heat \{[^}]*width: ([\d.]+)%; height: ([\d.]+)%", page)
    assert style is not None
    assert [float(each) for each in style.groups()] == pytest.approx([100 * SEEN / SIDE] * 2, abs=1e-3)
    aspect = re.search(r"aspect-ratio: ([\d.]+) / ([\d.]+)", page)
    assert aspect is not None
    assert aspect[1] == aspect[2]
